"""Every fused twin against the float64 oracle, forward and backward, in the Triton interpreter or on a GPU.

The rule: our largest error is at most twice that of the same formula in eager PyTorch at the same precision, both
measured against float64, plus a floor of a few roundings of the result.
"""

import inspect

import pytest
import torch

from warploom.kernels import Maker, backend
from warploom.kernels.lang import HAS_TRITON, INTERPRET

from .test_oracles import double, small_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRET), reason="needs triton and TRITON_INTERPRET=1 or a GPU"
)


def fused_cases():
    return small_cases(lambda op, case: op.fused is not None)


def run(op, case, function, maker, convert=lambda x: x):
    """Results of a call, its in-place results, and the gradients of all inputs that want one."""
    args, options = case.build(maker)
    args, options = [convert(x) for x in args], {k: convert(v) for k, v in options.items()}
    outputs = function(*args, **options)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else tensors(outputs)
    outputs += [
        args[i] if i < len(args) else options.get(name) for i, name in enumerate(parameters(op)) if name in op.mutates
    ]
    outputs = [x for x in outputs if x is not None]
    wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    grown = [x for x in outputs if x.requires_grad]
    if not wanted or not grown:
        return outputs, []
    seeds = Maker(maker.dtype, maker.device, seed=1)
    upstream = [gradient(seeds, x, case.expanded) for x in grown]
    return outputs, torch.autograd.grad(grown, wanted, upstream)


def gradient(seeds, x, expanded):
    if expanded and x.dim():
        return seeds.normal(1, grad=False).to(x.dtype).expand(x.shape)
    return seeds.normal(*x.shape, grad=False).to(x.dtype)


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [x for item in result or () for x in tensors(item)]


def parameters(op):
    return inspect.signature(op.reference).parameters


def check(name, ours, eager, exact, dtype):
    if not ours.is_floating_point():
        assert torch.equal(ours.cpu(), exact.cpu()), name
        return
    assert ours.shape == exact.shape, name
    if not exact.numel():
        return
    ours, eager, exact = (x.detach().double().cpu() for x in (ours, eager, exact))
    assert ours.isfinite().all() or not exact.isfinite().all(), name
    floor = 4 * torch.finfo(dtype).eps * exact.abs().max() + 4 * torch.finfo(torch.float32).eps
    mine, theirs = (ours - exact).abs().max(), (eager - exact).abs().max()
    assert mine <= 2 * theirs + floor, f"{name}: our error {mine:.3g}, eager's {theirs:.3g}, floor {floor:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@fused_cases()
def test_errors_are_at_most_twice_those_of_eager(op, case, dtype):
    exact, exact_grads = run(op, case, op.reference, Maker(dtype), double)
    eager, eager_grads = run(op, case, op.reference, Maker(dtype, DEVICE))
    with backend("triton"):
        ours, our_grads = run(op, case, op, Maker(dtype, DEVICE))
    assert len(ours) == len(exact) and len(our_grads) == len(exact_grads)
    for i, three in enumerate(zip(ours, eager, exact)):
        check(f"result {i}", *three, dtype)
    for i, three in enumerate(zip(our_grads, eager_grads, exact_grads)):
        check(f"gradient {i}", *three, dtype)


@fused_cases()
def test_the_same_call_gives_the_same_bits(op, case):
    with backend("triton"):
        first, second = (run(op, case, op, Maker(torch.bfloat16, DEVICE)) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]]):
        assert torch.equal(a, b)
