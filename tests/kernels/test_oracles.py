"""The eager half: every reference has correct gradients, and the eager path means what the reference says."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from warploom.kernels import Case, Maker, attention, backend, ops
from warploom.kernels.cpu import pointwise
from warploom.kernels.tools.verify import call, double, errors, tensors


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
    """By our rule where the numbers are ours. Those of PyTorch's attention depend on the make of the CPU: the test
    below holds them to PyTorch's promise; here it computes by its formula, and a steep case in float64."""
    native = native and pointwise.HAS_NATIVE
    monkeypatch.setattr(pointwise, "HAS_NATIVE", native)
    if op is attention and case.steep and dtype == torch.float32 and not native:
        dtype = torch.float64
    with sdpa_kernel(SDPBackend.MATH):
        assert errors(op, case, dtype, "cpu", "eager") == []


class Calls:
    """The C++ extension, and which of its functions were called."""

    def __init__(self, module):
        self.module, self.names = module, set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.module, name)


@pytest.mark.skipif(not pointwise.HAS_NATIVE, reason="needs the C++ extension")
@pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
def test_op_native_says_what_runs_in_cpp(op, monkeypatch):
    calls = Calls(pointwise._native)
    monkeypatch.setattr(pointwise, "_native", calls)
    for case in op.cases:
        if not case.bench:
            call(op, case, op.eager or op.reference, Maker())
    assert op.native == bool(calls.names)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float32, 1e-5, 5e-6), (torch.bfloat16, 5e-2, 5e-2)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 30}], ids=str)
def test_pytorchs_fused_attention_is_its_formula(options, dtype, atol, rtol, monkeypatch):
    """Within the tolerances of PyTorch's own tests (test_scaled_dot_product_fused_attention_vs_math_cpu)."""
    monkeypatch.setattr(pointwise, "HAS_NATIVE", False)
    case = Case(
        "longer than what our bfloat16 path takes", lambda m: [m.normal(1, 530, n, 16) for n in (4, 2, 2)], options
    )

    def results(kernel):
        with backend("eager"), sdpa_kernel(kernel):
            return call(attention, case, attention, Maker(dtype))

    torch.testing.assert_close(results(SDPBackend.FLASH_ATTENTION), results(SDPBackend.MATH), atol=atol, rtol=rtol)
