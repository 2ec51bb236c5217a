"""Mixture of experts with packed weights: 8- or 4-bit codes, as in `packed_linear`.

Experts are nearly all of a model's weights, and a batch that decodes reads most of them, since tokens choose apart.
Codes are 0.27 to 0.52 of bfloat16's bytes. Products take the codes (`gpu/moe_packed.py`), for few rows and for many,
and give the bits of `moe` on the dequantized weights, rounded once. The gate stays a launch of its own, as biases and
gpt-oss's clamped gate are no case of their own then.

A packed weight has the rows of all experts (E · N), one below the other.
"""

import torch

from .core.op import Budget, Case, Op
from .gpu.moe_packed import moe_packed_combine, moe_packed_gemm, moe_packed_route
from .moe import MoEAux, by_highest_logits, moe
from .packed_linear import E2M1, PackedTensor, dequantize, packed_batch
from .swiglu import swiglu_packed


def dequantized(weight: PackedTensor, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Dequantize (E · N, columns) to the dtype of `like`."""
    return dequantize(weight, columns, torch.promote_types(like.dtype, torch.float32)).to(like.dtype)


def _packed_moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate_up: PackedTensor,
    down: PackedTensor,
    experts: int,
    top_k: int,
    **options,
) -> tuple[torch.Tensor, MoEAux]:
    """x (…, C) through the experts chosen by `router_logits`, of which `experts` are in this process; options as in
    `moe`."""
    return _by(moe.reference, x, router_logits, gate_up, down, experts, top_k, options)


def _packed_moe_eager(x, router_logits, gate_up, down, experts, top_k, **options):
    return _by(moe.eager, x, router_logits, gate_up, down, experts, top_k, options)


def _by(run, x, router_logits, gate_up, down, experts, top_k, options):
    C, F = x.shape[-1], len(gate_up.codes) // experts // 2
    weights = dequantized(gate_up, C, x).view(experts, 2 * F, C), dequantized(down, F, x).view(experts, C, F)
    return run(x, router_logits, *weights, top_k, **options)


def _packed_moe_fused(x, router_logits, gate_up, down, experts, top_k, **options):
    def run(logits, *, score="softmax", normalize=True, activation="silu", first=0, b_gate_up=None, b_down=None):
        x_TC, logits_TE = x.flatten(0, -2), logits.flatten(0, -2)
        weights_TK, experts_TK, *places, counts, balance, z = moe_packed_route(
            logits_TE, top_k, score == "softmax", normalize, first, experts
        )
        gated_AF = swiglu_packed(_product(x_TC, places, gate_up, b_gate_up, top_k), activation)
        parts_AC = _product(gated_AF, places, down, b_down, 0)
        y_TC = moe_packed_combine(parts_AC, weights_TK, experts_TK, x_TC, first, experts, logits.shape[-1])
        return y_TC.view(x.shape), balance, z, counts

    return by_highest_logits(run, router_logits, top_k, **options)


def _product(rows, places, weight, bias, top_k):
    return moe_packed_gemm(rows, *places, None if bias is None else bias.flatten(), top_k, *weight)


def _batch(m, T, C, E, F, layout=(), biases=False, **more):
    """Test case. Layout: bits, group, minimum, table, rotate, bias, float8."""

    def weight(rows, columns):
        return packed_batch(m, 1, columns, E * rows, *layout)[1]

    own = {"b_gate_up": m.normal(E, 2 * F, grad=False), "b_down": m.normal(E, C, grad=False)} if biases else {}
    router = m.normal(T, E, dtype=torch.float32, grad=False)
    return m.normal(T, C, grad=False), router, weight(2 * F, C), weight(C, F), E, more.get("top_k", 2), own


MXFP4, MINIMA = (4, 32, False, E2M1), (4, 64, True)

packed_moe = Op(
    name="packed_moe",
    reference=_packed_moe,
    eager=_packed_moe_eager,
    native=True,
    fused=_packed_moe_fused,
    shapes="x ... C, router_logits ... E",
    rows=("x", "router_logits"),
    cases=[
        Case("8 bits", lambda m: _batch(m, 9, 64, 4, 64)),
        Case("float8", lambda m: _batch(m, 5, 64, 3, 32, (8, 64, False, (), False, False, True))),
        Case("4 bits, minima, tails", lambda m: _batch(m, 9, 96, 4, 40, (4, 32, True)), {"score": "sigmoid"}),
        Case("4 bits, rotated", lambda m: _batch(m, 5, 64, 3, 32, (4, 64, True, (), True)), {"normalize": False}),
        Case("table, biases, clamped", lambda m: _batch(m, 9, 64, 4, 32, MXFP4, True), {"activation": "clamped"}),
        Case("best of two groups", lambda m: _batch(m, 7, 64, 4, 32), {"groups": (2, 1), "normalize": False}),
        Case("128 tokens, 8 of 128, 4 bits", lambda m: _batch(m, 128, 2048, 128, 768, MINIMA, top_k=8), bench=True),
        Case("4096 tokens, 8 of 128, table", lambda m: _batch(m, 4096, 2048, 128, 768, MXFP4, top_k=8), bench=True),
    ],
    budget={"moe_packed_gemm_kernel": Budget(registers=168, vector=True, wgmma=True, copies=2, products=1)},
    traffic=lambda x, logits, up, down, *_, **__: (2 * x.nbytes + up.codes.nbytes + down.codes.nbytes, 0),
    flops=lambda x, logits, up, down, experts, top_k, **_: (
        6 * x.numel() * top_k * (len(up.codes) // experts // 2),
        0,
    ),
)
