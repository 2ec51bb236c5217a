"""Serving executors: the whole model in one C++ call on a CPU, quantized weights, or the GPU's fused model.

Decoding reads every weight once a token, so its speed is the weights' bytes, and everything between the products is
overhead. `serving_model` returns an executor of the model that is one C++ call from tokens to hidden states, and a head
that is another, with weights packed in the order in which they are read. Its products are batch-invariant.

In 8 bits, weights and activations are rounded in groups of 64 columns, each with a scale, after a Walsh-Hadamard
transform of the group (csrc/cpu/serving/hadamard.hpp): products of whole numbers are four times as many an instruction.
What that costs SmolLM2-135M: log-probabilities move by 0.08 (root mean square; bfloat16 moves them by 0.02), KL 0.0025;
a tenth of that in models trained for minutes. `scheme.py` has the other schemes. Outlier channels are smoothed
beforehand (`outlier_smoothing.py`). A MoE block is several calls: one for each of its products and one for its experts.
On a GPU the executor is `gpu_model.py`'s; without the extension the model runs in PyTorch. In both cases packed layers
are `kernels.packed_linear`, and only weights are quantized, not activations.
"""

import dataclasses
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.moe import MoEAux, route
from ...config import ModelConfig
from ...executors import BIASES, LATENT, OUTSIDE, ROUTING, SCALED, SHAPE, STREAM, WINDOWS, Supported
from ...formats.packed_weight import (
    MATRICES,
    PackedExperts,
    PackedLinear,
    PackedWeight,
    install,
    matrix_of,
    packed_in,
)
from ...layers import NoNorm, gate_of
from ...model import Block, Linear, MoE, Transformer, growth_table, rotary_tables, sinusoids
from ...parallel.tensor_parallel import ShardedLinear
from ..scheme import INT8, Scheme, scheme_of
from .gpu_model import (
    BatchInvariantLinear,
    MakeLinear,
    batch_invariant_linear,
    fused_model,
    keeps_latents,
    replace,
    replace_linear,
    shallow_copy,
)
from .kv_cache import HAS_NATIVE, NativeAttend, _native
from .lora import ServedAdapters
from .native_matrix import native_matrix, pack, stored
from .outlier_smoothing import is_supported as can_smooth
from .outlier_smoothing import smoothed

ROTATED = "fw"  # kinds of layers in the order of their rotations; those of kind n have none
WEIGHT_ONLY = dataclasses.replace(INT8, rotate=False)  # float activations: rotation gains nothing, costs a launch
FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Head:
    """LM head: hidden states to logits, by the model's own layer or an executor of it, with soft-capping."""

    def __init__(self, model: Transformer, linear: nn.Module | None = None):
        self.logits = model.logits if linear is None else linear
        self.softcap = None if linear is None else model.config.logit_softcap
        self.needs_padding = not isinstance(linear, NativeLinear)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class NativeLinear(nn.Module):
    """Linear layer in C++, float or quantized."""

    def __init__(
        self, weight: Tensor | PackedWeight, bias: Tensor | None, form: str | Scheme = INT8, name: str = "ffn.up"
    ):
        super().__init__()
        self.outputs = weight.shape[0]
        self.matrix = native_matrix(weight, bias, form, name)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float().contiguous()
        y = torch.empty(*x.shape[:-1], self.outputs)
        self.matrix.multiply(rows, y)
        return y.to(x.dtype)


class PaddedLinear(nn.Module):
    """Bias-free PyTorch linear layer made batch-invariant by padding to `deterministic_min_rows`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        missing = max(0, deterministic_min_rows(x.dtype) - len(x))
        return F.linear(F.pad(x, (0, 0, 0, missing)), self.weight)[: len(x)]


def factor_linear(weight: Tensor, model: Transformer) -> nn.Module:
    """Linear layer for a LoRA factor, batch-invariant on this device."""
    if model.device.type == "cpu" and HAS_NATIVE:
        return NativeLinear(weight, None, "float32")
    weight = weight.to(model.device, model.embedding.weight.dtype).contiguous()
    return BatchInvariantLinear(weight, None) if model.device.type == "cuda" else PaddedLinear(weight)


@cache
def deterministic_min_rows(dtype: torch.dtype) -> int:
    """Least number of rows from which PyTorch's product on this CPU gives a row the same bits in any batch."""
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(shape, generator=generator).to(dtype) for shape in ((256, 256), (384, 256)))
    whole = x @ weights.T
    differing = [rows for rows in range(1, 160) if not torch.equal(x[:rows] @ weights.T, whole[:rows])]
    return next((rows for rows in (1, 16, 32, 64, 128) if rows > max(differing, default=0)), 256)


class NativeTransformer:
    """C++ executor of the whole model except its head."""

    is_supported = Supported(
        computed={
            *SHAPE,
            *OUTSIDE,
            *SCALED,
            *WINDOWS,
            *ROUTING,
            *BIASES,
            *STREAM,
            "rotary_dim",
            "qk_norm",
            "norm_weight",
            "ffn",
            "query_growth",
            "attention_sinks",
        },
        only={"n_experts": (0,)},
    )
    training = False

    def __init__(self, model: Transformer, form: str | Scheme, release: bool, adapters: ServedAdapters | None = None):
        c = self.config = model.config
        self.device, self.embedding, self.adapters = model.device, model.embedding, adapters
        blocks, smooth = [], isinstance(form, Scheme) and can_smooth(c) and adapters is None
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            changes = [] if adapters is None else _low_rank(adapters, index, c)
            blocks.append(_native_block(smoothed(block, c) if smooth else block, c, form, changes))
            if release:  # so that no more than one layer is ever held twice
                model.blocks[index] = nn.Identity()
        kinds = ROTATED if c.local_rope else ROTATED[:1]
        self.rotations = [rotary_tables(c, kind) for kind in kinds] if c.position == "rope" else []
        grown = c.query_growth
        self.growth = grown and growth_table(grown["beta"], grown["length"], c.max_seq_len)
        self.positions = None
        if c.position == "learned":
            self.positions = model.positions.weight
        elif c.position == "sinusoidal":
            self.positions = sinusoids(c.max_seq_len, c.d_model) * model.embedding.std
        # Detached, the tables' memory stays theirs: `model.to` replaces that of a parameter.
        tables = (None if table is None else table.detach() for table in (model.embedding.weight, self.positions))
        self.native = _native.Transformer(c.d_model, *tables, c.embedding_scale, blocks, _native_norm(model.norm, c))

    def hidden(self, tokens_BT: Tensor, positions: Tensor, attend: NativeAttend) -> Tensor:
        """As `Transformer.hidden`; positions are those of `attend`."""
        hidden_BTC = torch.empty(*tokens_BT.shape, self.config.d_model)
        chosen_T = None if self.adapters is None else self.adapters.chosen_T
        self.native.run(tokens_BT, attend.step, attend.layers, self.rotations, self.growth, hidden_BTC, chosen_T)
        return hidden_BTC if self.config.logit_scale == 1 else hidden_BTC * self.config.logit_scale


class NativeExperts:
    """C++ executor of a layer's experts (a `MoE.product`), whole or sharded."""

    is_supported = Supported(  # whatever surrounds the experts
        computed={*SHAPE, *OUTSIDE, *SCALED, *STREAM, *WINDOWS, *ROUTING, *BIASES, *LATENT}
        | {"rotary_dim", "ffn", "n_experts", "qk_norm", "attention_sinks"},
    )

    def __init__(self, moe: MoE, form: str | Scheme):
        none = [None] * moe.config.n_experts
        halves = (moe.w_gate_up, moe.b_gate_up, "ffn.up"), (moe.w_down, moe.b_down, "ffn.down")
        matrices = (
            [native_matrix(w, b, form, name) for w, b in zip(weights, none if biases is None else biases)]
            for weights, biases, name in halves
        )
        self.native = _native.Experts(*matrices, gate_of(moe.config))

    @classmethod
    def install(cls, module: nn.Module, form: str | Scheme) -> None:
        """Replace the experts of every MoE layer inside, and release their weights."""
        for moe in module.modules():
            if isinstance(moe, MoE):
                moe.product = cls(moe, form)
                moe.w_gate_up = moe.w_down = cast("nn.Parameter", None)

    def __call__(
        self, x: Tensor, logits: Tensor, w_gate_up: None, w_down: None, top_k: int, *,
        activation: str, b_gate_up: Tensor | None = None, b_down: Tensor | None = None, **options,
    ) -> tuple[Tensor, MoEAux]:  # fmt: skip
        x_TC = x.flatten(0, -2).float().contiguous()
        weights_TK, experts_TK, aux = route(logits.flatten(0, -2), top_k, **options)
        y_TC = torch.empty(x_TC.shape)
        self.native.run(x_TC, experts_TK.contiguous(), weights_TK.float().contiguous(), y_TC)
        return y_TC.to(x.dtype).view_as(x), aux


def serving_model(
    model: Transformer,
    quantize: str | Scheme | None,
    release: bool = False,
    batch_invariant: bool = True,
    native_pages: bool = True,
    adapters: ServedAdapters | None = None,
) -> tuple[Transformer | NativeTransformer, Head]:
    """Executor of a model for serving, and its head; whatever need not change is shared with the original.

    `release` frees the original's layers as they are packed: it cannot be used afterwards. Without
    `batch_invariant`, products of 16 bits and more are PyTorch's; without `native_pages`, attention is the kernels'.
    With `adapters`, channels in 8 bits are as large as the factors know them.
    """
    served, head = _serving_model(model, quantize, release, batch_invariant, native_pages, adapters)
    if adapters is None or isinstance(served, NativeTransformer):
        return served, head
    return adapters.install(served, model, factor_linear), head


def _serving_model(
    model: Transformer,
    quantize: str | Scheme | None,
    release: bool,
    batch_invariant: bool,
    native_pages: bool,
    adapters: ServedAdapters | None,
) -> tuple[Transformer | NativeTransformer, Head]:
    scheme = scheme_of(quantize, model.config.parameter_count())
    by_weight = WEIGHT_ONLY if scheme is INT8 else scheme
    make = partial(_packed_layer, scheme=by_weight) if by_weight else None
    if model.device.type == "cuda" and type(model) is Transformer:
        make = make or (batch_invariant_linear if batch_invariant else None)
        latent = keeps_latents(model.config, model.device, adapters)
        served = fused_model(model, make, norms=adapters is None, latent=latent)
        _pack_experts(served.blocks, by_weight)
        return served, Head(model, _kernel_head(model, make))
    if not batch_invariant and quantize is None:
        return model, Head(model)
    dtype = model.embedding.weight.dtype
    form = scheme or FORMATS.get(dtype)
    native = HAS_NATIVE and model.device.type == "cpu" and form is not None
    if type(model) is not Transformer or (quantize is None and not native):  # shards communicate
        _pack_in_place(model, scheme, by_weight, form)
        return model, Head(model)
    if not native:
        twin = shallow_copy(model)
        replace_linear(twin.blocks, make)
        _pack_experts(twin.blocks, by_weight)
        return twin, Head(model, _kernel_head(model, make))
    weight = model.embedding.weight if model.head is None else stored(model.head)
    head = NativeLinear(weight, model.head_bias, form, "head")
    if native_pages and NativeTransformer.is_supported(model.config) and dtype in FORMATS:
        return NativeTransformer(model, form, release, adapters), Head(model, head)
    twin = shallow_copy(model)
    smooth = isinstance(form, Scheme) and can_smooth(model.config) and adapters is None
    for index, block in enumerate(twin.blocks):
        twin.blocks[index] = block = smoothed(block, model.config) if smooth else block
        if NativeExperts.is_supported(model.config):
            NativeExperts.install(block, form)
        for path, layer in [(path, m) for path, m in block.named_modules() if type(m) in (Linear, PackedLinear)]:
            block.set_submodule(path, NativeLinear(stored(layer), layer.bias, form, matrix_of(path)))
    return twin, Head(model, head)


def _pack_in_place(
    model: Transformer, scheme: Scheme | None, by_weight: Scheme | None, form: str | Scheme | None
) -> None:
    """Quantize in place a model with sharded or PyTorch layers; products run in C++ where available."""
    in_cpp = HAS_NATIVE and model.device.type == "cpu"
    if scheme is not None and in_cpp:
        _pack_shares(model, partial(_native_layer, form=scheme))
    elif by_weight is not None:
        _pack_shares(model, partial(_packed_layer, scheme=by_weight))
    if in_cpp and (scheme or any(isinstance(found, PackedExperts) for _, found in packed_in(model))):
        NativeExperts.install(model, form or "float32")
    _pack_experts(model, by_weight)
    if in_cpp:
        replace(model, PackedLinear, lambda layer: NativeLinear(stored(layer), cast("PackedLinear", layer).bias))


def _packed_layer(weight: Tensor, bias: Tensor | None, path: str, scheme: Scheme) -> nn.Module:
    return PackedLinear(pack(weight, scheme.layout(matrix_of(path))), bias)


def _native_layer(weight: Tensor, bias: Tensor | None, path: str, form: str | Scheme) -> nn.Module:
    return NativeLinear(weight, bias, form, matrix_of(path))


def _pack_shares(model: Transformer, make: MakeLinear) -> None:
    """Quantize this process's shards of linear layers under tensor parallelism, and release the floats."""
    replace_linear(model.blocks, make)
    for path, layer in model.named_modules():
        if isinstance(layer, ShardedLinear) and layer.packed is None:
            layer.packed, layer.weight = make(layer.weight, None, path), cast("nn.Parameter", None)
    if model.head is None:
        model.head = cast("Linear", make(model.embedding.weight, None, "head"))


def _pack_experts(module: nn.Module, scheme: Scheme | None) -> None:
    """Quantize float experts, each matrix as one stack, as the kernel reads it."""
    for moe in [m for m in module.modules() if isinstance(m, MoE)] if scheme else ():
        for name in ("w_gate_up", "w_down"):
            weight = getattr(moe, name)
            if isinstance(weight, Tensor):  # in C++ they are packed already
                layout = scheme.layout(matrix_of(name))
                install(moe, name, PackedExperts(pack(w, layout) for w in weight).stacked(weight.device))


def _kernel_head(model: Transformer, make: MakeLinear | None) -> nn.Module | None:
    """LM head by our kernels, packed as stored or made by `make`; None to keep the model's own."""
    if isinstance(model.head, PackedLinear):
        return model.head
    return make and make(model.head_weight, model.head_bias, "head")


def _low_rank(adapters: ServedAdapters, index: int, config: ModelConfig) -> list[list]:
    """C++ LoRA factors of the four linear layers of a block, for all adapters."""
    paths = "attention.qkv", "attention.output", "ffn.gate_up" if config.gated else "ffn.up", "ffn.down"
    return [adapters.low_rank(f"blocks.{index}.{path}.weight", _native.LowRank) for path in paths]


def _native_block(block: Block, config, form: str | Scheme, adapters: list[list]):
    """C++ executor of a `Block`."""
    c, attention, ffn = config, block.attention, block.ffn
    layers = attention.qkv, attention.output, ffn.gate_up if c.gated else ffn.up, ffn.down
    around = block.attention_norm, block.attention_post, block.ffn_norm, block.ffn_post
    norms = _native.BlockNorms(
        *(_native_norm(norm, c) for norm in around),
        _floats(getattr(attention.q_norm, "weight", None)), _floats(getattr(attention.k_norm, "weight", None)),
    )  # fmt: skip
    rotation = -1 if c.rope(block.kind) is None else ROTATED.index(block.kind) if c.local_rope else 0
    return _native.Block(
        norms, *(native_matrix(stored(layer), layer.bias, form, name) for layer, name in zip(layers, MATRICES)),
        width=c.d_model, heads=c.n_heads, kv_heads=c.kv_heads, head_dim=c.head_size, hidden=c.ff_size,
        window=attention.window or 0, softcap=attention.softcap or 0.0, scale=attention.scale, qk_eps=c.norm_eps,
        activation=c.ffn, gated=c.gated, qk_norm=c.qk_norm, residual=c.residual, residual_scale=c.residual_scale,
        rotation=rotation, sinks=_floats(attention.sinks), adapters=adapters,
    )  # fmt: skip


def _native_norm(norm: nn.Module | None, config: ModelConfig):
    kind = "none" if norm is None or isinstance(norm, NoNorm) else config.norm
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None and kind != "none":
        weight = torch.ones(config.d_model)
    return _native.Norm(kind, config.norm_eps, _floats(weight), _floats(bias))


def _floats(tensor: Tensor | None) -> list[float]:
    return [] if tensor is None else tensor.detach().float().tolist()
