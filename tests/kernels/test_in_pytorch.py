"""Fused ops are citizens of PyTorch: registered, compiled, autocast, differentiable in any subset of their inputs."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from warploom.kernels import Maker, backend, ops, rms_norm
from warploom.kernels.core import launch as framework
from warploom.kernels.tools.verify import call, parameters, tensors

from .device import DEVICE, pytestmark  # noqa: F401
from .test_oracles import differentiable, small_cases

FUSED = [op for op in ops() if op.fused is not None]


def each_op(wanted=lambda op: True):
    """Every fused op with the first case of its tests."""
    return pytest.mark.parametrize("op", [op for op in FUSED if wanted(op)], ids=lambda op: op.name)


def has_gradient(op):
    return differentiable(op, op.cases[0])


@pytest.fixture
def operators(monkeypatch):
    """Collects the registered operators, and their inputs, of the launchers that are called."""
    seen = []
    direct_call, differentiable_call = framework.Launcher.__call__, framework.AutogradOp.__call__

    def record(launcher, args):
        seen.append((launcher.operator, tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)))

    def call_launcher(self, *args):
        record(self, args)
        return direct_call(self, *args)

    def call_differentiable(self, *args):
        record(self.forward, args)
        return differentiable_call(self, *args)

    monkeypatch.setattr(framework.Launcher, "__call__", call_launcher)
    monkeypatch.setattr(framework.AutogradOp, "__call__", call_differentiable)
    return seen


@each_op()
def test_every_registered_operator_passes_opcheck(op, operators):
    with backend("triton"):
        call(op, op.cases[0], op, Maker(torch.float32, DEVICE))
    assert operators
    for operator, inputs in list(operators):
        torch.library.opcheck(operator, inputs)


@each_op()
def test_compiling_changes_no_bit_and_breaks_no_graph(op):
    case = op.cases[0]

    def plain(*args, **options):
        return op(*args, **options)

    with backend("triton"):
        torch._dynamo.reset()
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        expected, expected_grads = call(op, case, op, Maker(torch.float32, DEVICE))
        ours, our_grads = call(op, case, compiled, Maker(torch.float32, DEVICE))
    for a, b in zip([*expected, *expected_grads], [*ours, *our_grads]):
        assert torch.equal(a, b)


def test_kernel_runs_on_device_of_its_tensors(monkeypatch):
    """A kernel runs on the device of its tensors whichever is current."""
    entered = []

    @contextlib.contextmanager
    def guard(device):
        entered.append(device)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(rms_norm, "fused", lambda x, weight: list(entered))
    with FakeTensorMode(), backend("triton"):
        elsewhere, here = (torch.empty(4, device=f"cuda:{index}") for index in (1, 0))
        assert rms_norm(elsewhere, elsewhere) == [torch.device("cuda:1")] and rms_norm(here, here) == []


def test_the_documentation_names_every_fused_op():
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    assert not [op.name for op in FUSED if f"`{op.name}`" not in text]


@each_op(has_gradient)
def test_gradient_of_one_input_equals_among_all(op):
    """Any one input alone gets the gradient it gets among all."""
    args, options = op.cases[0].build(Maker(torch.float32, DEVICE))
    wanted = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.requires_grad]

    def gradients(chosen):
        mine = [x.detach().requires_grad_(i in chosen) if i in wanted else x for i, x in enumerate(args)]
        result = [x for x in tensors(op(*mine, **options)) if x.requires_grad]
        return torch.autograd.grad(sum(x.square().sum() for x in result), [mine[i] for i in chosen])

    with backend("triton"):
        together = gradients(wanted)
        for i, expected in zip(wanted, together):
            torch.testing.assert_close(gradients([i])[0], expected, rtol=1e-6, atol=1e-7)


@each_op(lambda op: op.autocast)
def test_autocast_dtype_forward_and_gradients(op):
    """Autocast computes in its dtype and returns gradients in that of the inputs."""

    def gradients(cast, **autocast):
        args, options = op.cases[0].build(Maker(torch.float32, DEVICE))
        leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
        with torch.autocast(DEVICE, torch.bfloat16, **autocast):
            out = op(*(cast(x) for x in args), **options)
        return out, torch.autograd.grad(out.float().square().sum(), leaves)

    def narrow(x):
        return x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    with backend("triton"):
        out, grads = gradients(lambda x: x, enabled=True)
        expected, expected_grads = gradients(narrow, enabled=False)
    assert torch.equal(out, expected)
    assert all(g.dtype == torch.float32 for g in grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads))


def test_autocast_leaves_alone_what_is_no_product():
    x, weight = Maker(torch.bfloat16).normal(3, 64), Maker(torch.float32).normal(64)
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    for name in ("eager", "triton"):
        with backend(name):
            expected = rms_norm(x, weight)
            with torch.autocast(DEVICE, torch.bfloat16):
                assert torch.equal(rms_norm(x, weight), expected)


def has_rows(op, case):
    return op.fused is not None and op.rows and not {"cu_seqlens", "index"} & set(case.build(Maker())[1])


def alone_in_memory(x, row):
    """A row with its strides, in memory of its own: aligned as any tensor is, not as the middle of one may be."""
    return torch.empty_strided((1, *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device).copy_(x[row : row + 1])


@small_cases(has_rows)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(op, case):
    args, options = case.build(Maker(torch.bfloat16, DEVICE))
    names = parameters(op)
    rowwise = [i for i in range(len(args)) if names[i] in op.rows and args[i] is not None]
    count = len(args[rowwise[0]])
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    alones = [[alone_in_memory(x, row) if i in rowwise else x for i, x in enumerate(args)] for row in range(count)]
    with backend("triton"):
        together = [x for x in tensors(op(*args, **options)) if x.dim() and len(x) == count]
        for row, alone in enumerate(alones):
            ours = [x for x in tensors(op(*alone, **options)) if x.dim() and len(x) == 1]
            assert len(ours) == len(together) or count == 1
            for a, b in zip(ours, together):
                assert torch.equal(a[0], b[row])
