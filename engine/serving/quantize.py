"""The model as it serves: on a CPU in C++, all layers in one call; with `quantize="int8"`, in 8 bits.

Decoding reads every weight once a token, so its speed is the weights' bytes, and everything between the products is
overhead. `serving_model` gives a twin of the model that is one C++ call from tokens to hidden states, and a head that
is another, with weights packed in the order in which they are read. A product there gives a row the same bits in any
batch.

In 8 bits, weights have a scale a row, and activations are quantized as they arrive, in groups of 64 columns. A model
with experts is not known to C++: only its linear layers are replaced, and only in 8 bits. Without the extension, or on
a GPU, the model serves as it is, and 8-bit layers are `kernels.int8_linear`.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import kernels
from ..model import Block, Linear, Transformer, sinusoids
from .store import HAS_NATIVE, NativeAttend, _native

FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Head:
    """Hidden states to logits: by the model's own head, or by a linear layer that stands for it."""

    def __init__(self, model: Transformer, linear: nn.Module | None = None):
        self.logits = model.logits if linear is None else linear
        self.softcap = None if linear is None else model.config.logit_softcap
        self.needs_padding = not isinstance(linear, NativeLinear)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.logits(hidden)
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
    """A linear layer in C++."""

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str = "int8"):
        super().__init__()
        self.outputs = weight.shape[0]
        self.matrix = native_matrix(weight, bias, form)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float().contiguous()
        y = torch.empty(*x.shape[:-1], self.outputs)
        self.matrix.multiply(rows.data_ptr(), rows.numel() // rows.shape[-1], y.data_ptr())
        return y.to(x.dtype)


class NativeTransformer:
    """The whole model but its head, in C++; the twin of `Transformer`, as far as a runner asks."""

    training = False

    def __init__(self, model: Transformer, form: str, release: bool):
        c = self.config = model.config
        self.device, self.embedding = model.device, model.embedding
        blocks = []
        for index, block in enumerate(model.blocks):
            blocks.append(_native_block(block, c, form))
            if release:  # so that no more than one layer is ever held twice
                model.blocks[index] = nn.Identity()
        self.rotation: tuple[Tensor, ...] = ()
        if c.position == "rope":
            self.rotation = kernels.rope_tables(c.head_size, c.max_seq_len, c.rope_theta, c.rope_scaling)
        self.positions = None
        if c.position == "learned":
            self.positions = model.positions.weight
        elif c.position == "sinusoidal":
            self.positions = sinusoids(c.max_seq_len, c.d_model) * model.embedding.std
        tables = (x for table in (model.embedding.weight, self.positions) for x in _native_table(table))
        self.native = _native.Transformer(c.d_model, *tables, blocks, _native_norm(model.norm, c))

    def hidden(self, tokens_BT: Tensor, positions: Tensor, attend: NativeAttend) -> Tensor:
        """What `Transformer.hidden` gives; the positions are those of `attend`."""
        hidden_BTC = torch.empty(*tokens_BT.shape, self.config.d_model)
        columns = self.rotation[0].shape[1] if self.rotation else 0
        rotation = (table.data_ptr() for table in self.rotation) if self.rotation else (0, 0)
        self.native.run(
            tokens_BT.data_ptr(), attend.step, attend.layers, *rotation, columns, hidden_BTC.data_ptr()
        )  # fmt: skip
        return hidden_BTC


def serving_model(
    model: Transformer, quantize: str | None, release: bool = False
) -> tuple[Transformer | NativeTransformer, Head]:
    """The model as it is served, and its head; what need not change is shared with the original.

    `release` lets go of the original's layers as they are packed: it cannot be used afterwards.
    """
    dtype = model.embedding.weight.dtype
    form = quantize or FORMATS.get(dtype)
    native = HAS_NATIVE and model.device.type == "cpu" and form is not None
    whole = native and not model.config.n_experts and dtype in FORMATS
    if quantize is None and not whole:
        return model, Head(model)
    head = NativeLinear(model.head_weight, None, form) if native else Int8Linear(model.head_weight, None)
    if whole:
        return NativeTransformer(model, form, release), Head(model, head)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    shared = {id(tensor): tensor for tensor in model.parameters()}
    twin.blocks = copy.deepcopy(model.blocks, shared)
    _replace_linears(twin.blocks, NativeLinear if native else Int8Linear)
    return twin, Head(model, head)


def _native_block(block: Block, config, form: str):
    """A whole layer in C++: the twin of `Block`."""
    c, attention, ffn = config, block.attention, block.ffn
    layers = attention.qkv, attention.output, ffn.gate_up if c.gated else ffn.up, ffn.down
    return _native.Block(
        c.d_model, c.n_heads, c.kv_heads, c.head_size, c.ff_size, attention.window or 0, attention.softcap or 0.0,
        attention.scale, c.norm_eps, c.ffn, _native_norm(block.attention_norm, c), _native_norm(block.ffn_norm, c),
        _floats(getattr(attention.q_norm, "weight", None)), _floats(getattr(attention.k_norm, "weight", None)),
        *(native_matrix(layer.weight, layer.bias, form) for layer in layers),
    )  # fmt: skip


def _native_table(table: Tensor | None) -> tuple[int, bool]:
    return (0, False) if table is None else (table.data_ptr(), table.dtype == torch.bfloat16)


def native_matrix(weight: Tensor, bias: Tensor | None, form: str):
    """A weight as C++ keeps it."""
    rows = weight.detach().float().contiguous()
    offset = None if bias is None else bias.detach().float().contiguous()
    return _native.Matrix(form, rows.data_ptr(), *rows.shape, 0 if offset is None else offset.data_ptr())


def _replace_linears(module: nn.Module, kind: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, Linear):
            setattr(module, name, kind(child.weight, child.bias))
        else:
            _replace_linears(child, kind)


def _native_norm(norm: nn.Module, config):
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return _native.Norm(config.norm, config.norm_eps, _floats(weight), _floats(bias))


def _floats(tensor: Tensor | None) -> list[float]:
    return [] if tensor is None else tensor.detach().float().tolist()
