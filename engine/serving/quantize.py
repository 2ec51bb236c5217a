"""Weights in 8 bits, on a CPU.

Decoding reads every weight once a token, so its speed is the weights' bytes. `quantized(model)` gives a model whose
blocks are C++ twins of `Block`: one call a layer, weights in int8 with a scale a row, activations quantized as they
arrive in groups of 64 columns. Integer sums are exact, so a row's result is the same in any batch.

Where a block is one that C++ does not know (experts), its linear layers alone are replaced; where the extension is
missing, by `kernels.int8_linear`. Embedding and norms stay as they are.
"""

import copy

import torch
from torch import Tensor, nn

from ... import kernels
from ..model import Block, Linear, Transformer
from .store import HAS_NATIVE, NativeAttend, _native


class Head:
    """Hidden states to logits, by the model's own head."""

    def __init__(self, model: Transformer):
        self.model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


class Int8Head:
    """The head in 8 bits."""

    def __init__(self, model: Transformer):
        self.linear = int8_linear(model.head_weight, None)
        self.softcap = model.config.logit_softcap

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Int8Linear(nn.Module):
    """A linear layer in 8 bits by the kernels."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.scale = kernels.quantize_int8(weight.detach())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return kernels.int8_linear(x, self.weight, self.scale, self.bias)


class NativeLinear(nn.Module):
    """A linear layer in 8 bits in C++."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.outputs = weight.shape[0]
        self.matrix = native_matrix(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float().contiguous()
        y = torch.empty(*x.shape[:-1], self.outputs)
        self.matrix.multiply(rows.data_ptr(), rows.numel() // rows.shape[-1], y.data_ptr())
        return y.to(x.dtype)


class NativeBlock(nn.Module):
    """A whole layer in C++: the twin of `Block`."""

    def __init__(self, block: Block, config):
        super().__init__()
        c, attention, ffn = config, block.attention, block.ffn
        self.index = attention.index
        self.tables = None
        if c.position == "rope":
            self.tables = kernels.rope_tables(c.head_size, c.max_seq_len, c.rope_theta, c.rope_scaling)
        up = ffn.gate_up if c.gated else ffn.up
        self.native = _native.Block(
            c.d_model, c.n_heads, c.kv_heads, c.head_size, c.ff_size, attention.window or 0, attention.softcap or 0.0,
            attention.scale, c.norm_eps, c.ffn, _native_norm(block.attention_norm, c), _native_norm(block.ffn_norm, c),
            _floats(getattr(attention.q_norm, "weight", None)), _floats(getattr(attention.k_norm, "weight", None)),
            *(native_matrix(layer.weight, layer.bias) for layer in (attention.qkv, attention.output, up, ffn.down)),
        )  # fmt: skip

    def forward(self, stream: Tensor, delta: Tensor, rotate, attend: NativeAttend):
        """(stream, delta) after this layer; `rotate` is not asked, the tables say it all."""
        stream, delta = stream.float().contiguous(), delta.float().contiguous()
        tables = (0, 0, 0) if self.tables is None else (*(t.data_ptr() for t in self.tables), self.tables[0].shape[1])
        self.native.run(stream.data_ptr(), delta.data_ptr(), attend.step, attend.layers[self.index], *tables)
        return stream, delta, None


def quantized(model: Transformer) -> tuple[Transformer, Int8Head]:
    """A copy of the model with 8-bit weights, and its head; what is not quantized is shared."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    native = HAS_NATIVE and model.device.type == "cpu"
    for index, block in enumerate(model.blocks):
        if native and not model.config.n_experts:
            twin.blocks[index] = NativeBlock(block, model.config)
        else:
            _replace_linears(twin.blocks[index])
    if native:
        twin.norm = copy.deepcopy(model.norm).float()
    return twin, Int8Head(model)


def int8_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The fastest 8-bit linear layer there is here."""
    native = HAS_NATIVE and weight.device.type == "cpu"
    return (NativeLinear if native else Int8Linear)(weight, bias)


def native_matrix(weight: Tensor, bias: Tensor | None):
    """A weight as C++ keeps it."""
    rows = weight.detach().float().contiguous()
    offset = None if bias is None else bias.detach().float().contiguous()
    return _native.Int8Matrix(rows.data_ptr(), *rows.shape, 0 if offset is None else offset.data_ptr())


def _replace_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Linear):
            setattr(module, name, int8_linear(child.weight, child.bias))
        else:
            _replace_linears(child)


def _native_norm(norm: nn.Module, config):
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return _native.Norm(config.norm, config.norm_eps, _floats(weight), _floats(bias))


def _floats(tensor: Tensor | None) -> list[float]:
    return [] if tensor is None else tensor.detach().float().tolist()
