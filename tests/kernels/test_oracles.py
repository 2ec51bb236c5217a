"""The eager half: every reference has correct gradients, and the eager path means what the reference says."""

import pytest
import torch

from warploom.kernels import Maker, backend, ops
from warploom.kernels.verify import double, tensors


def floats(result):
    """The floating-point tensors of whatever an op returned, in order."""
    return [x for x in tensors(result) if x.is_floating_point()]


def small_cases(wanted=lambda op, case: True):
    chosen = [(op, case) for op in ops() for case in op.cases if not case.bench and wanted(op, case)]
    return pytest.mark.parametrize(("op", "case"), chosen, ids=[f"{op.name}: {case.name}" for op, case in chosen])


def differentiable(op, case):
    return any(isinstance(x, torch.Tensor) and x.requires_grad and x.numel() for x in case.build(Maker())[0])


@small_cases(differentiable)
def test_the_gradient_is_the_derivative(op, case):
    args, options = case.build(Maker(torch.float64))
    args = [double(x) for x in args]
    wanted = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.requires_grad]
    for path in filter(None, (op.reference, op.eager)):

        def call(*some, path=path):
            full = list(args)
            for i, x in zip(wanted, some):
                full[i] = x
            return tuple(x for x in floats(path(*full, **options)) if x.requires_grad)

        assert torch.autograd.gradcheck(call, [args[i] for i in wanted], fast_mode=True, atol=1e-6)


PRECISIONS = pytest.param(torch.float32, 2e-5, id="float32"), pytest.param(torch.bfloat16, 4e-2, id="bfloat16")


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@small_cases(lambda op, case: op.eager is not None)
def test_the_eager_path_means_what_the_reference_says(op, case, dtype, tolerance):
    args, options = case.build(Maker(dtype))
    with backend("eager"):
        ours = floats(op(*args, **options))
    exact = floats(op.reference(*map(double, args), **options))
    assert len(ours) == len(exact) > 0
    for mine, true in zip(ours, exact):
        assert mine.dtype in (dtype, torch.float32)
        torch.testing.assert_close(mine.double(), true, atol=tolerance, rtol=tolerance)
