"""Counts what a serving step of Qwen3-0.6B launches, on meta tensors. One JSON line: step → [Triton kernels, others].

"graph" is what a decoding step's graph holds, from the tokens before to those drawn; "train 2" a training step of two
layers of Llama 1B.

Others are PyTorch's operators that compute; views and empty tensors launch nothing."""

import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from warploom.engine.config import ModelConfig
from warploom.engine.formats.packed_weight import Layout, PackedLinear, PackedWeight, Segment
from warploom.engine.model import Transformer
from warploom.engine.serving.execution.cuda_graphs import DecodeGraphs
from warploom.engine.serving.execution.gpu_model import batch_invariant_linear, fused_model
from warploom.engine.serving.execution.kv_cache import KernelAttention, PagedKVCache
from warploom.engine.serving.execution.sampler import RowSettings
from warploom.engine.serving.execution.serving_model import Head
from warploom.kernels import backend
from warploom.kernels.tools.compile_offline import compiling_for

PAGE, PAGES = 16, 64
STEPS = {"decode": [1, 1, 1, 1], "mixed": [1, 1, 300, 17]}
"""Tokens of each sequence."""


class Operators(TorchDispatchMode):
    """Those that are neither views nor empty tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        free = operator.is_view or "empty" in name or name in ("aten::_unsafe_view", "aten::result_type")
        free = free and (name != "aten::to" or args[0].dtype in args[1:])
        if name.startswith("aten::") and not free:
            self.seen.append(name)
        return operator(*args, **(kwargs or {}))


def step_launches(model, store, counts):
    """Of the blocks and the last norm; sampling has its own kernel."""

    def ints(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    T, N = sum(counts), len(counts)
    ids = ints(1, T, dtype=torch.int64)
    with backend("triton"), compiling_for(90) as kernels, Operators() as others, torch.inference_mode():
        batch = ints(N, 64), ints(N), ints(N), ints(N + 1)
        attend = KernelAttention(store, ints(T, dtype=torch.int64), ints(T, dtype=torch.int64), *batch)
        model.hidden(ids, attend.positions[None], attend)
    return len(kernels), others.seen


def graph_launches(model, store, batch=4):
    """Of one recording: all else that a step sends to the device is a copy there and a copy back."""
    found = []

    def record(run):
        with backend("triton"), compiling_for(90) as kernels, Operators() as others:
            run()
        found.append((len(kernels), others.seen))

    head = Head(model, batch_invariant_linear(model.embedding.weight, None, "head"))
    settings = RowSettings(batch + 1, torch.device("meta"))
    tokens = torch.empty(batch + 1, PAGE * PAGES + 1, dtype=torch.int32, device="meta")
    DecodeGraphs(model, store, tokens, PAGES, record, lambda x, *where: settings.draw(head(x), *where))
    return found[0]


def training_launches(n_layers):
    """Of a loss and its gradients in bfloat16, without the optimizer."""
    config = ModelConfig.preset("llama-1b", n_layers=n_layers)
    with torch.device("meta"):
        model, tokens = Transformer(config).to(torch.bfloat16), torch.empty(4, 2049, dtype=torch.int64)
    with backend("triton"), compiling_for(90) as kernels, Operators() as others:
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    return len(kernels), others.seen


def packed(layout):
    """Linear layers of a layout's codes, of one scale a group."""

    def make(weight, bias, path):
        F, C = weight.shape
        G = layout.groups(C)
        codes = torch.empty(F, G * layout.group * layout.bits // 8, dtype=torch.uint8, device="meta")
        scales = torch.empty(G, F, dtype=torch.float16, device="meta").T
        segment = Segment(layout, codes, scales, scales if layout.minimum else None, torch.empty(F, device="meta"))
        return PackedLinear(PackedWeight((segment,), C), bias)

    return make


def built(make=batch_invariant_linear, **changes):
    """The model as a GPU serves it, and its pages."""
    config = ModelConfig.preset("qwen3-0.6b", **changes)
    with torch.device("meta"):
        model = fused_model(Transformer(config).to(torch.bfloat16).eval(), make)
        return model, PagedKVCache(config, PAGES, PAGE, torch.bfloat16, torch.device("meta"))


if __name__ == "__main__":
    dense, experts = built(), built(n_experts=16, experts_per_token=4, n_layers=2)
    counted = {name: step_launches(*dense, counts) for name, counts in STEPS.items()}
    layouts = {"8 bits": Layout(8, rotate=False), "4 bits rotated": Layout(4, 32, True)}
    for name, layout in layouts.items():
        counted[name] = step_launches(*built(packed(layout), n_layers=2), STEPS["decode"])
    counted |= {f"train {n}": training_launches(n) for n in (1, 2)}
    counted |= {"graph": graph_launches(*dense), "experts": step_launches(*experts, STEPS["decode"])}
    print(json.dumps(counted))
