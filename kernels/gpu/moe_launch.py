"""Launch of the mixture-of-experts kernels, and their autograd.

Forward: route and count, offsets, scatter, the gated product, the way back, the combination: six launches. Kept for the
backward: the gate and up products, and the lines. Shapes depend on T, E and top_k alone, so a CUDA graph can hold all.

T tokens, C channels, E experts, F features of an expert, K = top_k, A = T · K assignments.
"""

import torch

from ..core.lang import cdiv, generation, next_power_of_2
from ..core.launch import AutogradOp, launch, launcher
from ..core.tuned import tuned
from .moe_experts import (
    moe_combine_kernel,
    moe_grouped_dw_kernel,
    moe_grouped_gemm_kernel,
    moe_grouped_gemm_swiglu_bwd_kernel,
    moe_grouped_gemm_swiglu_kernel,
)
from .moe_route import moe_offsets_kernel, moe_route_backward_kernel, moe_route_kernel, moe_scatter_kernel

LARGE = 128
"""Assignments per expert from which tiles of 128 rows pay; below, 64. Both use the same instructions: the same bits."""


def _tile(kernel: str, x: torch.Tensor, assignments: int, w: torch.Tensor) -> dict:
    """Tile of the grouped GEMMs: BLOCK_M of assignments, BLOCK_N of columns, BLOCK_K of the sum.

    Rows of odd widths are read a number at a time, each by an address of its own in two registers: small tiles."""
    arch = generation(x.device)
    large = assignments >= LARGE * len(w)
    odd = any(width % 16 for width in w.shape[1:])
    if arch == 0:
        M, N, K, warps, stages = 16, 16, 16, 4, 1
    elif x.dtype == torch.float32 or odd:
        M, N, K, warps, stages = 64, 32, 32, 8, 2
    else:
        M, N, K = 128 if large else 64, 128, 64
        if kernel == "moe_gate_backward" or (kernel == "moe_gate" and arch < 90):
            N = 64  # two products, or an epilogue of five tables: at 128 columns they spill
        warps, stages = 8 if large else 4, 3 if arch >= 90 else 2
    sizes = {"BLOCK_N": N, "BLOCK_K": K, "num_warps": warps, "num_stages": stages}
    key = f"{'odd' if odd else 'large' if large else 'small'} {str(x.dtype)[6:]}"
    return {"BLOCK_M": M, **tuned(kernel, x.device, key, sizes)}


def _rows_of_route(E: int) -> int:
    """Tokens a program routes, so that its (tokens, experts) tile stays in registers."""
    return max(1, min(16, 4096 // next_power_of_2(E)))


@launcher
def moe_forward(
    x: torch.Tensor,
    logits: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    top_k: int,
    first: int,
    softmax: bool,
    normalize: bool,
    activation: str,
    save: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    (E, C, F), A = w_down.shape, x.shape[0] * top_k
    weights_TK, experts_TK, order_A, offsets_E, counts_E, balance, z = _route(logits, top_k, softmax, normalize)
    here = _here(logits, w_down, first)
    offsets_E = offsets_E if here is None else offsets_E[first : first + E + 1].clone()
    block_e = max(16, next_power_of_2(E))

    gate_up = torch.empty(A if save else 0, 2 * F, dtype=x.dtype, device=x.device)
    h_AF = torch.empty(A, F, dtype=x.dtype, device=x.device)
    tile = _tile("moe_gate", x, A, w_down)
    columns = cdiv(F, tile["BLOCK_N"])
    launch(
        moe_grouped_gemm_swiglu_kernel, ((A // tile["BLOCK_M"] + E) * columns if A else 0,),
        x, w_gate_up, order_A, offsets_E, gate_up, h_AF,
        E, C, F, columns, *x.stride(), *w_gate_up.stride(),
        TOP_K=top_k, ACTIVATION=activation, SAVE=save, BLOCK_E=block_e, **tile,
    )  # fmt: skip
    parts_AC = _rows_product("moe_down", h_AF, w_down, w_down.stride(), C, order_A, offsets_E)
    y = _combine(parts_AC, weights_TK, experts_TK, x, here)
    return y, balance, z, counts_E, weights_TK, experts_TK, order_A, offsets_E, gate_up


def _route(logits, top_k, softmax, normalize):
    T, E = logits.shape
    device = logits.device
    rows = _rows_of_route(E)
    blocks = cdiv(T, rows)
    shape = {"TOP_K": top_k, "ROWS": rows, "BLOCK_E": max(16, next_power_of_2(E))}
    weights_TK = torch.empty(T, top_k, dtype=torch.float32, device=device)
    experts_TK = torch.empty(T, top_k, dtype=torch.int32, device=device)
    counts_BE = torch.empty(blocks, E, dtype=torch.int32, device=device)
    shares_BE = torch.empty(blocks, E, dtype=torch.float32, device=device)
    squares_B = torch.empty(blocks, dtype=torch.float32, device=device)
    launch(
        moe_route_kernel, (blocks,),
        logits, weights_TK, experts_TK, counts_BE, shares_BE, squares_B, T, E, *logits.stride(),
        SOFTMAX=softmax, NORMALIZE=normalize, BLOCK_K=next_power_of_2(top_k), **shape,
    )  # fmt: skip
    begins_BE = torch.empty_like(counts_BE)
    offsets_E = torch.empty(E + 1, dtype=torch.int32, device=device)
    counts_E = torch.empty(E, dtype=torch.int64, device=device)
    balance, z = (torch.empty((), dtype=torch.float32, device=device) for _ in "bz")
    launch(
        moe_offsets_kernel, (1,), counts_BE, shares_BE, squares_B, begins_BE, offsets_E, counts_E, balance, z,
        blocks, E, E / (max(T, 1) * max(T * top_k, 1)), 1 / max(T, 1),
        BLOCK_B=max(1, 4096 // shape["BLOCK_E"]), BLOCK_E=shape["BLOCK_E"], num_warps=8,
    )  # fmt: skip
    order_A = torch.empty(T * top_k, dtype=torch.int32, device=device)
    launch(moe_scatter_kernel, (blocks,), experts_TK, begins_BE, order_A, T, E, **shape)
    return weights_TK, experts_TK, order_A, offsets_E, counts_E, balance, z


def _rows_product(name, a_AK, w, strides, N, order_A, offsets_E):
    """Grouped GEMM: each expert's rows of `a` times its matrix W (N, K), given by strides; results by assignment."""
    A, K = a_AK.shape
    E = w.shape[0]
    out = torch.empty(A, N, dtype=a_AK.dtype, device=a_AK.device)
    tile = _tile(name, a_AK, A, w)
    columns = cdiv(N, tile["BLOCK_N"])
    launch(
        moe_grouped_gemm_kernel, ((A // tile["BLOCK_M"] + E) * columns if A else 0,),
        a_AK, w, order_A, offsets_E, out, E, N, K, columns, *strides,
        BLOCK_E=max(16, next_power_of_2(E)), **tile,
    )  # fmt: skip
    return out


def _here(logits, w, first):
    """Range of the experts whose weights are in this process; None if all are."""
    return None if len(w) == logits.shape[1] else (first, first + len(w))


def _combine(parts_AC, weights_TK, experts_TK, x, here):
    """Sum the outputs of a token's experts in order, by weight if weights are given."""
    T, C = x.shape
    out = torch.empty(T, C, dtype=x.dtype, device=x.device)
    launch(
        moe_combine_kernel, (cdiv(T, 4), cdiv(C, 512)),
        parts_AC, weights_TK, experts_TK, out, T, C, *(here or (0, 0)),
        TOP_K=experts_TK.shape[1], WEIGHTED=weights_TK is not None, SOME=here is not None, BLOCK_T=4, BLOCK_C=512,
    )  # fmt: skip
    return out


@launcher
def moe_backward(
    dy: torch.Tensor,
    dbalance: torch.Tensor,
    dz: torch.Tensor,
    x: torch.Tensor,
    logits: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    counts_E: torch.Tensor,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    order_A: torch.Tensor,
    offsets_E: torch.Tensor,
    gate_up: torch.Tensor,
    first: int,
    softmax: bool,
    normalize: bool,
    activation: str,
    want_x: bool,
    want_gate_up: bool,
    want_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (T, C), (E, _, F), A, top_k = x.shape, w_down.shape, order_A.shape[0], weights_TK.shape[1]
    block_e = max(16, next_power_of_2(E))
    here = _here(logits, w_down, first)
    tile = _tile("moe_gate_backward", x, A, w_down)
    columns = cdiv(F, tile["BLOCK_N"])
    dgate_up = torch.empty_like(gate_up)
    weighted_AF = torch.empty(A, F, dtype=x.dtype, device=x.device)
    make = torch.empty if here is None else torch.zeros  # experts in other processes contribute no gradient here
    shares = make(columns, A, dtype=torch.float32, device=x.device)
    launch(
        moe_grouped_gemm_swiglu_bwd_kernel, ((A // tile["BLOCK_M"] + E) * columns if A else 0,),
        dy, w_down, order_A, offsets_E, weights_TK, gate_up, dgate_up, weighted_AF, shares,
        E, C, F, A, columns, *dy.stride(), *w_down.stride(),
        TOP_K=top_k, ACTIVATION=activation, BLOCK_E=block_e, **tile,
    )  # fmt: skip

    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=x.device)
    routed = logits.shape[1]
    rows = _rows_of_route(routed)
    launch(
        moe_route_backward_kernel, (cdiv(T, rows),),
        logits, weights_TK, experts_TK, shares.sum(0), counts_E, dbalance, dz, dlogits, T, routed, *logits.stride(),
        TOP_K=top_k, SOFTMAX=softmax, NORMALIZE=normalize, ROWS=rows, BLOCK_E=max(16, next_power_of_2(routed)),
    )  # fmt: skip

    nothing = x.new_empty(0)
    dx, dw_gate_up, dw_down = nothing, nothing.clone(), nothing.clone()
    if want_x:
        by_channel = w_gate_up.stride(0), w_gate_up.stride(2), w_gate_up.stride(1)
        parts_AC = _rows_product("moe_dx", dgate_up, w_gate_up, by_channel, C, order_A, offsets_E)
        dx = _combine(parts_AC, None, experts_TK, x, here)
    if want_gate_up:
        dw_gate_up = _weights_product(dgate_up, x, w_gate_up, order_A, offsets_E, top_k, gather_p=False)
    if want_down:
        dw_down = _weights_product(dy, weighted_AF, w_down, order_A, offsets_E, top_k, gather_p=True)
    return dx, dlogits, dw_gate_up, dw_down


def _weights_product(p, q, w, order_A, offsets_E, top_k, gather_p):
    """Weight gradient (E, N, M): for each expert pᵀ · q, one of which is indexed by token and gathered."""
    E, N, M = w.shape
    dw = torch.empty(E, N, M, dtype=w.dtype, device=w.device)
    tile = _tile("moe_weights", q, LARGE * E, w)
    tile = {**tile, "BLOCK_M": tile["BLOCK_N"]}
    columns = cdiv(M, tile["BLOCK_M"])
    launch(
        moe_grouped_dw_kernel, (cdiv(N, tile["BLOCK_N"]) * columns, E),
        p, q, order_A, offsets_E, dw, N, M, columns, *p.stride(), *q.stride(),
        TOP_K=top_k, GATHER_P=gather_p, GATHER_Q=not gather_p, **tile,
    )  # fmt: skip
    return dw


def _save(ctx, inputs, output):
    x, logits, w_gate_up, w_down, _top_k, *ctx.meaning, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, logits, w_gate_up, w_down, *output[3:])


def _gradient(ctx, dy, dbalance, dz, *_):
    x, logits, *rest = ctx.saved_tensors
    zero = torch.zeros((), dtype=torch.float32, device=x.device)
    dy = torch.zeros_like(x) if dy is None else dy
    dbalance, dz = (zero if g is None else g for g in (dbalance, dz))
    wants = ctx.needs_input_grad
    grads = moe_backward(dy, dbalance, dz.clone(), x, logits, *rest, *ctx.meaning, wants[0], wants[2], wants[3])
    return *(g if want else None for g, want in zip(grads, wants)), *(None,) * 6


_experts = AutogradOp(moe_forward, _save, _gradient)


def moe_fused(
    x, router_logits, w_gate_up, w_down, top_k, *, score="softmax", normalize=True, activation="silu", first=0
):
    """Fused implementation of `moe`: (y, load_balance, z, tokens_per_expert).

    Under autocast the products run in its dtype, as a linear layer's would; routing never does."""
    kind = x.device.type
    tensors = x.flatten(0, -2), router_logits.flatten(0, -2), w_gate_up, w_down
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = tensors[0].to(dtype), tensors[1], w_gate_up.to(dtype), w_down.to(dtype)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    y, balance, z, counts = _experts(*tensors, top_k, first, score == "softmax", normalize, activation, save)[:4]
    return y.view(x.shape).to(x.dtype), balance, z, counts
