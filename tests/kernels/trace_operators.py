"""Traces each fused op as `torch.compile` would for a GPU; one JSON line: op → [kernels seen, opaque operators]."""

import json

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from warploom.kernels import Maker, backend, ops
from warploom.kernels.offline import compiling_for
from warploom.kernels.verify import tensors


def trace(op):
    with FakeTensorMode():
        args, options = op.cases[0].build(Maker(torch.float32, "meta"))

        def call(*given):
            given = iter(given)
            full = [next(given) if isinstance(x, torch.Tensor) else x for x in args]
            return tensors(op(*full, **options))

        graph = make_fx(dispatch_functionalize(call))(*(x.detach() for x in args if isinstance(x, torch.Tensor)))
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return sum("triton_kernel_wrapper" in name for name in called), [name for name in called if "warploom" in name]


if __name__ == "__main__":
    with compiling_for(90), backend("triton"):
        print(json.dumps({op.name: trace(op) for op in ops() if op.fused is not None}))
