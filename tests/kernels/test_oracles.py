"""The eager half: every reference has correct gradients, and the eager path means what the reference says."""

import pytest
import torch

from warploom.kernels import Maker, ops
from warploom.kernels.cpu import pointwise as passes_cpu
from warploom.kernels.tools.verify import double, errors, tensors


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@small_cases(lambda op, case: op.eager is not None)
def test_the_eager_path_means_what_the_reference_says(op, case, native, dtype, monkeypatch):
    monkeypatch.setattr(passes_cpu, "HAS_PASSES", native and passes_cpu.HAS_PASSES)
    assert errors(op, case, dtype, "cpu", "eager") == []
