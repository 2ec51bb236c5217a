"""Traces what each fused op launches, forward and backward, as `torch.compile` would for a Hopper GPU that need not be
there: on fake tensors that claim to lie on one. One JSON line: op → [kernels seen, opaque operators].

A PyTorch without CUDA lets no tensor claim that; then they lie on the meta device, which stands for a GPU too."""

import json
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from warploom.kernels import Maker, backend, ops
from warploom.kernels.core import launch as fused
from warploom.kernels.tools.compile_offline import compiling_for
from warploom.kernels.tools.verify import call


def launches(op):
    """The operators that the forward and backward of an op's first case stand for, and their arguments, on meta."""
    seen = []

    def recording(original, operator_of):
        def __call__(self, *args):
            seen.append((operator_of(self), args))
            return original(self, *args)

        return __call__

    before = fused.Launcher.__call__, fused.AutogradOp.__call__
    fused.Launcher.__call__ = recording(before[0], lambda self: self.operator)
    fused.AutogradOp.__call__ = recording(before[1], lambda self: self.forward.operator)
    call(op, op.cases[0], op, Maker(torch.bfloat16, "meta"))
    fused.Launcher.__call__, fused.AutogradOp.__call__ = before
    return seen


DEVICE = "cuda:0" if torch.version.cuda else "meta"


def trace(operator, args):
    """What a compiler sees of a call."""

    def on_gpu(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)

    def run(*given):
        given = iter(given)
        return operator(*(next(given) if isinstance(x, torch.Tensor) else x for x in args))

    with FakeTensorMode():
        graph = make_fx(dispatch_functionalize(run))(*(on_gpu(x) for x in args if isinstance(x, torch.Tensor)))
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


if __name__ == "__main__":
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
    found = {}
    with compiling_for(90), backend("triton"):
        for op in ops():
            if op.fused is not None:
                called = [name for launch in launches(op) for name in trace(*launch)]
                kernels = sum("triton_kernel_wrapper" in name for name in called)
                found[op.name] = kernels, [name for name in called if "warploom" in name]
    print(json.dumps(found))
