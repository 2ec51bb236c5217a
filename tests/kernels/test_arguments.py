"""Argument checks of ops before a launch: shapes that do not fit are refused, strided vectors made contiguous."""

import pytest
import torch

from warploom import kernels
from warploom.kernels import Maker, backend, ops
from warploom.kernels.core.lang import HAS_TRITON, INTERPRET
from warploom.kernels.tools.verify import parameters, tensors

pytestmark = pytest.mark.skipif(not (HAS_TRITON and INTERPRET), reason="needs triton and TRITON_INTERPRET=1")
FUSED = [op for op in ops() if op.fused is not None]
IN_ONE_PIECE = {
    "adamw_step": {"param", "exp_avg", "exp_avg_sq", "master"},
    "latent_attention": {"latents", "turned", "k_scales", "v_scales"},
    "linear_residual": {"stream"},
    "packed_linear_residual": {"stream"},
    "paged_attention": {"k_pages", "v_pages", "k_scales", "v_scales"},
    "qk_norm_rope_write": {"k_pages", "v_pages", "k_scales", "v_scales"},
    "write_pages": {"k_pages", "v_pages", "k_scales", "v_scales"},
}
"""Tensors that a copy could not stand for: they are written in place, or as large as the cache."""
CHECKED_BY_HAND = {
    "adamw_step": {"lr", "step", "grad_scale"},
    "attention": {"q", "k", "v", "sinks", "cu_seqlens"},
    "linear_cross_entropy": {"weights"},
    "moe": {"choice_bias", "b_gate_up", "b_down"},
    "normed_linear": {"square_sums"},
    "packed_moe": {"b_gate_up", "b_down"},
    "packed_normed_linear": {"square_sums"},
    "rope": {"positions"},
    "swiglu": {"gate", "up"},
}
"""Numbers, what PyTorch broadcasts, and what the letters of `Op.shapes` cannot say."""


def given(op, case):
    """A call's keyword arguments."""
    args, options = case.build(Maker())
    return {**dict(zip(parameters(op), args)), **options}


def small(op):
    return [case for case in op.cases if not case.bench and case.name not in ("wide", "256K columns")]


def spread(x):
    """The same numbers, every other one of twice as many along the last dimension; the others are NaN, or ones."""
    if not x.dim():
        return x
    wide = torch.ones(*x.shape[:-1], 2 * x.shape[-1], dtype=torch.float32).mul(
        torch.nan if x.dtype.is_floating_point else 1
    )
    wide = wide.to(x.dtype)[..., ::2]
    (wide.view(torch.uint8) if x.itemsize == 1 else wide).copy_(
        x.detach().view(torch.uint8) if x.itemsize == 1 else x.detach()
    )
    return wide.requires_grad_(x.requires_grad)


def results(op, call):
    with backend("triton"):
        found = tensors(op(**call))
    written = [call[name] for name in op.mutates if call.get(name) is not None]
    wanted = [x for x in call.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    grown = [x for x in found if x.requires_grad]
    gradients = torch.autograd.grad(grown, wanted, [torch.ones_like(x) for x in grown]) if wanted and grown else ()
    return [*found, *written, *gradients]


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_op_shapes_name_every_tensor(op):
    names = {name for case in small(op) for name, x in given(op, case).items() if isinstance(x, torch.Tensor)}
    assert names - CHECKED_BY_HAND.get(op.name, set()) == names & set(op._sizes)


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_op_shape_that_does_not_fit_refused(op):
    """Each size that two tensors share, one too small in one of them."""
    for case in small(op):
        call = given(op, case)
        shared = [letter for name, letters in op._sizes.items() if call.get(name) is not None for letter in letters]
        for name, letters in op._sizes.items():
            for i, letter in enumerate(letters if call.get(name) is not None else ()):
                x = call[name]
                axis = i if letters[0] != "..." else i - len(letters) if i else 0
                if shared.count(letter) < 2 or x.dim() < len(letters) or x.shape[axis] < 1:
                    continue
                with backend("triton"), pytest.raises(ValueError, match=f"^{op.name}: .* must be"):
                    op(**{**call, name: x.narrow(axis, 0, x.shape[axis] - 1)})


@pytest.mark.parametrize(("op", "case"), [(op, case) for op in FUSED for case in small(op)[:3]], ids=lambda x: x.name)
def test_op_strided_arguments_same_result(op, case):
    call, fixed = given(op, case), IN_ONE_PIECE.get(op.name, set())
    expected = results(op, call)
    call = given(op, case)
    loose = {name: spread(x) for name, x in call.items() if isinstance(x, torch.Tensor) and name not in fixed}
    found = results(op, {**call, **loose})
    for a, b in zip(expected, found, strict=True):  # gradients of products are PyTorch's, whose sums follow strides
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [op for op in FUSED if op.name in IN_ONE_PIECE], ids=lambda op: op.name)
def test_op_strided_memory_refused(op):
    for case in small(op):
        call = given(op, case)
        for name in IN_ONE_PIECE[op.name] & set(call):
            if call[name] is not None and call[name].numel():
                with backend("triton"), pytest.raises(ValueError, match="contiguous"):
                    op(**{**call, name: spread(call[name])})


@pytest.mark.parametrize("target", [-1, 8])
def test_cross_entropy_unknown_class_is_nan(target):
    """On a GPU nobody can refuse it without waiting; what must not be is a number of another row, or none's."""
    logits, targets = torch.randn(3, 8, generator=torch.manual_seed(0)), torch.tensor([1, target, 2])
    weight = torch.eye(8)
    with backend("triton"):
        for losses in (
            kernels.cross_entropy(logits, targets, reduction="none"),
            kernels.linear_cross_entropy(logits, weight, targets, reduction="none"),
        ):
            assert losses.isnan().tolist() == [False, True, False]


def test_packed_weight_that_does_not_fit_refused():
    op = kernels.packed_linear
    call = given(op, next(case for case in op.cases if case.name == "4 bits, minima, tails"))
    weight = call["weight"]
    others = (
        {"weight": weight._replace(units=weight.units[1:])},
        {"weight": weight._replace(codes=weight.codes[:, :-8])},
        {"weight": weight._replace(scales=weight.scales[:-1])},
        {"bias": torch.zeros(len(weight.units) + 1)},
    )
    with backend("triton"):
        expected = op(**call)
        apart = weight._replace(minima=weight.minima.contiguous(), units=spread(weight.units))
        assert torch.equal(op(**{**call, "weight": apart}), expected)
        for other in others:
            with pytest.raises(ValueError, match="must"):
                op(**{**call, **other})


def test_paged_attention_too_few_counters_refused():
    op = kernels.paged_attention
    call = given(op, op.cases[0])
    sequences, key_heads = len(call["query_lens"]), call["k_pages"].shape[2]
    few = torch.zeros(sequences * key_heads - 1, dtype=torch.int32)
    with backend("triton"):
        for more in ({"arrivals": few}, {"starts": torch.arange(sequences, dtype=torch.int32)}):
            with pytest.raises(ValueError, match="they must be at least 4 and 6"):
                op(**call, **more)


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_op_of_two_dtypes_refused(name):
    op = getattr(kernels, name)
    first, *rest = op.cases[0].build(Maker())[0]
    with backend("triton"), pytest.raises(ValueError, match="must be of one dtype"):
        op(first.bfloat16(), *rest)


def test_attention_without_sequences_is_zero():
    q, k, v = (torch.randn(5, 2, 16, requires_grad=True) for _ in range(3))
    with backend("triton"):
        o = kernels.attention(q, k, v, cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert not o.any() and not any(x.any() for x in torch.autograd.grad(o.sum(), (q, k, v)))


def test_rope_no_tokens_or_too_many():
    cos, sin = kernels.rope_tables(16, 4)
    with backend("triton"):
        q, k = kernels.rope(torch.zeros(2, 0, 4, 16), torch.zeros(2, 0, 1, 16), cos, sin)
        assert q.shape == (2, 0, 4, 16) and k.shape == (2, 0, 1, 16)
        with pytest.raises(ValueError, match="5 tokens and tables of 4 positions"):
            kernels.rope(torch.zeros(1, 5, 4, 16), torch.zeros(1, 5, 1, 16), cos, sin)


def test_moe_narrow_logits_within_groups():
    """Router logits of masked groups are −1e30, a number that float16 lacks."""
    op = kernels.moe
    call = given(op, next(case for case in op.cases if case.name == "best of four groups"))
    narrow = call["router_logits"].detach().half()
    with backend("triton"):
        y, _ = op(**{**call, "router_logits": narrow})
        expected, _ = op(**{**call, "router_logits": narrow.float()})
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "shapes", [((1, 5, 3, 16), (1, 5, 2, 16)), ((2, 5, 2, 16), (1, 5, 2, 16)), ((1, 5, 2, 16), (1, 5, 2, 8))]
)
def test_attention_shapes_that_do_not_fit_refused(shapes):
    q, k = (torch.zeros(shape) for shape in shapes)
    for name in ("triton", "eager"):
        with backend(name), pytest.raises(ValueError, match="attention: "):
            kernels.attention(q, k, k)
