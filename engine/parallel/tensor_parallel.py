"""Tensor and expert parallelism (Megatron-LM): how weights are sharded, and the modules that compute with shards.

A matrix product can be cut in two ways. By *columns of the output*: every process holds some rows of W (of the fused
qkv: some heads; of gate_up: some features), gets the whole x and makes its features of y. Or by *rows of the input*:
every process holds some columns of W, has just those features of x, and makes a partial y; the sum over processes is
y. One after the other they need no words in between: attention is cut by heads, the feed-forward by its hidden
features, and each costs one sum forward and, by the chain rule, one sum backward:

    copy_to_group(x)    identity forward, all-reduce backward       (enters a sharded computation; Megatron's f)
    all_reduce(y)       all-reduce forward, identity backward       (leaves it; Megatron's g)

Between them the stream is whole and the same everywhere, norms and dropout included. The vocabulary is cut too, in
the embedding and in the head: a process knows the logits of its own words only, and the loss needs just three numbers
a token from each process (`vocab_parallel_cross_entropy`). Matrices are cut; vectors (norms, biases) are whole
everywhere, and one that meets a share of the features goes through `copy_to_group`.

Experts can be sharded instead (`ep`): each process has rows of its own, as in data parallelism, and owns some experts.
Tokens are gathered by all, each process lets its experts answer, and the sum is scattered back. An exchange of only
the chosen tokens would send less where there are many processes; this one has fixed sizes, no token is ever dropped,
and sums always have the same order.

`shard(model, tp, ep)` puts all of this into a `Transformer` from outside. Everything else holds for the result: it
makes `hidden` states with any `attend` (which sees this process's heads), whole `logits`, and `losses`.

B batch, T time, C width of the stream, N rows, S rows of a slab, V vocabulary of this process, E experts, R processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ... import kernels
from ...kernels.linear_cross_entropy import gpu_rows_per_slab, rows_per_slab
from ...kernels.moe import route
from ..config import ModelConfig
from ..errors import InputError
from ..executors import BIASES, OUTSIDE, ROUTING, SCALED, SHAPE, STREAM, WINDOWS, Supported
from ..layers import routing_options
from ..model import Attention, Embedding, Linear, MoE, RMSNorm, SwiGLU, Transformer
from .collectives import (
    all_gather,
    all_gather_detached,
    all_gather_last_dim,
    all_reduce,
    chunk_range,
    copy_to_group,
    reduce_scatter,
    scale_gradient,
)

# How weights are cut

is_supported = Supported(
    computed={*SHAPE, *OUTSIDE, *SCALED, *STREAM, *WINDOWS, *ROUTING, *BIASES, "rotary_dim", "ffn", "n_experts"}
    - {"head_bias", "n_dense_layers", "dense_ff", "shared_gate", "router_bias", "choice_bias", "expert_bias"}
    - {"expert_groups", "groups_used"},
    only={"qk_norm": ("none", "head", "after")},
)


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Sharding of a parameter. Packed matrices (`parts`) are cut one by one."""

    tp: int | None = None
    """The dimension that tensor parallelism cuts."""
    ep: int | None = None
    """The dimension that counts experts."""
    stream: int | None = 0
    """The dimension of size C, which neither of them touches (of a vector: its only one), and FSDP cuts; None: whole
    in every process, as an adapter's factors are."""
    parts: tuple[int, ...] = ()
    """Sizes of what is packed along dimension `tp`."""

    def cut(self, whole: Tensor, rank: int, size: int, dim: int | None = None) -> Tensor:
        """Shard of process `rank` of a tensor, along `tp` or along `dim`."""
        return _cut(whole, self.tp if dim is None else dim, self.parts, rank, size)


def _cut(whole: Tensor, dim: int, parts: tuple[int, ...], rank: int, size: int) -> Tensor:
    shares = [chunk_range(len_, rank, size) for len_ in parts]
    return torch.cat([p[(slice(None),) * dim + (s,)] for p, s in zip(whole.split(parts, dim), shares)], dim)


def shard_spec(config: ModelConfig, name: str) -> ShardSpec:
    """Sharding of the parameter of this name."""
    c, words = config, (config.vocab_size,)
    q, kv = c.n_heads * c.head_size, c.kv_heads * c.head_size
    width, shared = c.ff_size, c.shared_ff
    known = {
        "embedding.weight": ShardSpec(tp=0, stream=1, parts=words),
        "head.weight": ShardSpec(tp=0, stream=1, parts=words),
        "positions.weight": ShardSpec(stream=1),
        "attention.qkv.weight": ShardSpec(tp=0, stream=1, parts=(q, kv, kv)),
        "attention.output.weight": ShardSpec(tp=1, parts=(q,)),
        "ffn.up.weight": ShardSpec(tp=0, stream=1, parts=(width,)),
        "ffn.gate_up.weight": ShardSpec(tp=0, stream=1, parts=(width, width)),
        "ffn.down.weight": ShardSpec(tp=1, parts=(width,)),
        "ffn.router.weight": ShardSpec(stream=1),
        "ffn.w_gate_up": ShardSpec(tp=1, ep=0, stream=2, parts=(width, width)),
        "ffn.w_down": ShardSpec(tp=2, ep=0, stream=1, parts=(width,)),
        "ffn.shared.up.weight": ShardSpec(tp=0, stream=1, parts=(shared,)),
        "ffn.shared.gate_up.weight": ShardSpec(tp=0, stream=1, parts=(shared, shared)),
        "ffn.shared.down.weight": ShardSpec(tp=1, parts=(shared,)),
    }
    return known.get(re.sub(r"^blocks\.\d+\.", "", name), ShardSpec())


def shard_specs(model: Transformer) -> dict[str, ShardSpec]:
    """Sharding of each of a model's parameters, by name."""
    return {name: shard_spec(model.config, name) for name, _ in model.named_parameters()}


def shard_weights(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]], tp: ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    """Yield this process's shard of each full weight, one at a time."""
    for name, whole in weights:
        where = shard_spec(config, name)
        yield name, whole if where.tp is None else where.cut(whole, tp.rank(), tp.size())
        del whole


def check(config: ModelConfig, tp: int, ep: int = 1) -> None:
    """Raise an InputError if this architecture cannot be sharded into so many parts."""
    c = config
    for field, value in is_supported.refused(c).items() if tp * ep > 1 else ():
        raise InputError(f"tp and ep cannot shard a model with {field}={value!r}: use fsdp, or one process")
    for field, value in (("n_heads", c.n_heads), ("n_kv_heads", c.kv_heads), ("d_ff", c.ff_size)):
        if value % tp:
            raise InputError(f"tp={tp} does not divide {field}={value}: each process needs an equal share of it")
    if (tp - 1) * -(-c.vocab_size // tp) >= c.vocab_size:
        raise InputError(f"vocab_size={c.vocab_size} is too small to be cut into tp={tp} pieces")
    if ep > 1 and (not c.n_experts or c.n_experts % ep):
        raise InputError(f"ep={ep} does not divide n_experts={c.n_experts}: each process needs equally many experts")


# Sharded modules


class ShardedModule(nn.Module):
    """Base of sharded modules: the attributes of the module it replaces, and the process group of the shards."""

    def __init__(self, whole: nn.Module, group: ProcessGroup | None) -> None:
        vars(self).update(vars(whole))
        self.group = group

    def keep(self, name: str, spec: ShardSpec) -> None:
        """Replace a weight by this process's shard of it."""
        share = spec.cut(getattr(self, name).detach(), self.group.rank(), self.group.size())
        setattr(self, name, nn.Parameter(share.contiguous()))


class ShardedLinear(ShardedModule, Linear):
    """Linear layer with a sharded weight."""

    def __init__(self, whole: Linear, group: ProcessGroup, spec: ShardSpec) -> None:
        super().__init__(whole, group)
        self.parts = spec.parts
        self.keep("weight", spec)
        self.packed: nn.Module | None = None  # computes the product where the share of the weight is packed

    def multiply(self, x: Tensor) -> Tensor:
        """Return x · weightᵀ with this process's shard, without the bias."""
        return x @ self.weight.T if self.packed is None else self.packed(x)


class ColumnParallel(ShardedLinear):
    """Column-parallel linear layer: full x in, this process's output features out."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(copy_to_group(x, self.group))
        if self.bias is None:
            return y
        return y + _cut(copy_to_group(self.bias, self.group), 0, self.parts, self.group.rank(), self.group.size())


class RowParallel(ShardedLinear):
    """Row-parallel linear layer: this process's input features in, all-reduced y out; the bias is added once."""

    def forward(self, x: Tensor) -> Tensor:
        y = all_reduce(self.multiply(x), self.group)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(ShardedModule, Embedding):
    """Vocabulary-parallel embedding: zero for tokens of other processes, then an all-reduce."""

    def __init__(self, whole: Embedding, group: ProcessGroup, spec: ShardSpec) -> None:
        super().__init__(whole, group)
        self.first = chunk_range(len(whole.weight), group.rank(), group.size()).start
        self.keep("weight", spec)

    def forward(self, index: Tensor) -> Tensor:
        row = index - self.first
        mine = (row >= 0) & (row < len(self.weight))
        vectors = F.embedding(row.where(mine, 0), self.weight)
        return all_reduce(vectors.masked_fill(~mine.unsqueeze(-1), 0), self.group)


class HeadNorm(ShardedModule, RMSNorm):
    """QK norm under tensor parallelism: the gradient of its shared weight is all-reduced over heads."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, copy_to_group(self.weight, self.group), self.eps)


def reduce_router_stats(
    aux: kernels.MoEAux, logits_BTE: Tensor, config: ModelConfig, data_group: ProcessGroup | None
) -> kernels.MoEAux:
    """Router losses over the data group: balance loss is no sum over rows, so its factors are averaged first."""
    if data_group is None:
        return aux
    logits_TE = logits_BTE.flatten(0, -2).to(torch.promote_types(logits_BTE.dtype, torch.float32))
    scores_TE = torch.softmax(logits_TE, -1) if config.router == "softmax" else torch.sigmoid(logits_TE)
    mean_E = (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)
    own = copy_to_group(torch.cat([mean_E, aux.z[None]]), data_group)
    *mean_E, z = (all_reduce(own, data_group) / data_group.size()).unbind()
    counts_E = all_gather_detached(aux.tokens_per_expert[None], data_group).sum(0)
    share_E = counts_E.to(z.dtype) / counts_E.sum()
    return kernels.MoEAux(len(share_E) * (share_E * torch.stack(mean_E)).sum(), z, counts_E)


class TensorParallelMoE(ShardedModule, MoE):
    """Tensor-parallel MoE: a slice of every expert in each process, routing replicated."""

    def __init__(self, whole: MoE, tp: ProcessGroup | None, data_group: ProcessGroup | None) -> None:
        super().__init__(whole, tp)
        self.data_group = data_group
        for name in ("w_gate_up", "w_down") if tp is not None else ():
            self.keep(name, shard_spec(whole.config, f"ffn.{name}"))

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, kernels.MoEAux]:
        c, x, logits = self.config, copy_to_group(x_BTC, self.group), copy_to_group(self.router(x_BTC), self.group)
        y_BTC, aux = self.experts(x, logits)
        y_BTC, aux = all_reduce(y_BTC, self.group), reduce_router_stats(aux, logits, c, self.data_group)
        balance, z = (scale_gradient(x, self.group) for x in (aux.load_balance, aux.z))
        return self.with_shared(y_BTC, x_BTC), aux._replace(load_balance=balance, z=z)


class ExpertParallelMoE(ShardedModule, MoE):
    """Expert-parallel MoE: whole experts (or slices of them under `tp`) and different rows in each process."""

    def __init__(
        self, whole: MoE, group: ProcessGroup, tp: ProcessGroup | None, data_group: ProcessGroup | None
    ) -> None:
        super().__init__(whole, group)
        self.tp, self.data_group = tp, data_group
        own = chunk_range(whole.config.n_experts, group.rank(), group.size())
        self.first = own.start
        for name in ("w_gate_up", "w_down"):
            mine = getattr(whole, name)[own]  # packed ones, too, are a sequence
            setattr(self, name, nn.Parameter(mine.detach().clone()) if isinstance(mine, Tensor) else mine)

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, kernels.MoEAux]:
        c, x_TC = self.config, x_BTC.flatten(0, -2)
        logits_TE = self.router(x_TC)
        options = routing_options(c)
        _, _, aux = route(logits_TE, c.experts_per_token, options["score"], options["normalize"])
        everyone = (all_gather(copy_to_group(rows, self.tp), self.group) for rows in (x_TC, logits_TE))
        y_TC, _ = self.experts(*everyone, first=self.first)
        y_BTC = all_reduce(reduce_scatter(y_TC.view(-1, *x_BTC.shape[1:]), self.group), self.tp)
        aux = reduce_router_stats(aux, logits_TE, c, self.data_group)
        return self.with_shared(y_BTC, x_BTC), aux


class VocabParallelTransformer(ShardedModule, Transformer):
    """Transformer with a vocabulary-parallel embedding, head and loss."""

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = copy_to_group(hidden, self.group)
        packed = self.head.packed if isinstance(self.head, ShardedLinear) else self.head  # a tied one that is packed
        local = super().logits(hidden) if packed is None else self.capped(packed(hidden))
        return all_gather_last_dim(local, self.config.vocab_size, self.group)

    def cross_entropy(self, hidden_NC: Tensor, targets_N: Tensor, **options) -> Tensor:
        return vocab_parallel_cross_entropy(
            hidden_NC, self.head_weight, targets_N, self.config.vocab_size, self.group,
            softcap=self.config.logit_softcap, **options,
        )  # fmt: skip


def shard(
    model: Transformer,
    tp: ProcessGroup | None = None,
    ep: ProcessGroup | None = None,
    data_group: ProcessGroup | None = None,
) -> Transformer:
    """Shard `model` in place for tensor and expert parallelism; `model` itself must not be used afterwards.

    `tp` cuts heads, features and vocabulary, and its processes must be given the same rows; `ep` spreads experts over
    processes that each have rows of their own (equally many). `data_group` are the processes whose rows together make a
    micro-batch: the load of experts is judged over all of them.
    """
    check(model.config, 1 if tp is None else tp.size(), 1 if ep is None else ep.size())
    c = model.config
    for block in model.blocks:
        if isinstance(block.ffn, MoE):
            block.ffn = _shard_experts(block.ffn, tp, ep, data_group)
        elif tp is not None:
            _shard_feed_forward(c, block.ffn, "ffn", tp)
        if tp is not None:
            _shard_attention(c, block.attention, tp)
    if tp is None:
        return model
    model.embedding = VocabParallelEmbedding(model.embedding, tp, shard_spec(c, "embedding.weight"))
    if model.head is not None:
        model.head = ColumnParallel(model.head, tp, shard_spec(c, "head.weight"))
    return VocabParallelTransformer(model, tp)


def _shard_attention(config: ModelConfig, attention: Attention, group: ProcessGroup) -> None:
    attention.heads = tuple(count // group.size() for count in attention.heads)
    attention.qkv = ColumnParallel(attention.qkv, group, shard_spec(config, "attention.qkv.weight"))
    attention.output = RowParallel(attention.output, group, shard_spec(config, "attention.output.weight"))
    if attention.q_norm is not None:
        attention.q_norm, attention.k_norm = HeadNorm(attention.q_norm, group), HeadNorm(attention.k_norm, group)


def _shard_feed_forward(config: ModelConfig, ffn: nn.Module, name: str, group: ProcessGroup) -> None:
    first = "gate_up" if isinstance(ffn, SwiGLU) else "up"
    setattr(ffn, first, ColumnParallel(getattr(ffn, first), group, shard_spec(config, f"{name}.{first}.weight")))
    ffn.down = RowParallel(ffn.down, group, shard_spec(config, f"{name}.down.weight"))


def _shard_experts(moe: MoE, tp: ProcessGroup | None, ep: ProcessGroup | None, data_group: ProcessGroup | None) -> MoE:
    if tp is not None and moe.shared is not None:
        _shard_feed_forward(moe.config, moe.shared, "ffn.shared", tp)
    if tp is not None or data_group is not None:
        moe = TensorParallelMoE(moe, tp, data_group)
    return moe if ep is None else ExpertParallelMoE(moe, ep, tp, data_group)


# The loss of a sharded vocabulary


def vocab_parallel_cross_entropy(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Vocabulary-parallel fused linear cross-entropy: each process holds its rows of the head.

    Per slab of rows a process makes its logits, and tells the others three numbers a row: the logsumexp of its logits,
    its logit of the target (0 if it is another's), their sum. From all processes' numbers follow the loss and, at once
    and in place, the gradient of its own logits; no process ever has the logits of another.
    """
    if reduction != "mean":
        raise ValueError(f"with tp > 1 the loss is a mean over targets; reduction={reduction!r} needs a whole head")
    options = (vocab_size, label_smoothing, z_loss, softcap)
    wants_grad = torch.is_grad_enabled() and (hidden_NC.requires_grad or weight_VC.requires_grad)
    return _VocabLoss.apply(copy_to_group(hidden_NC, group), weight_VC, targets_N, weights, group, options, wants_grad)


class _VocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, targets_N, factors_N, group, options, wants_grad):
        N, V = len(hidden_NC), len(weight_VC)
        first = chunk_range(options[0], group.rank(), group.size()).start
        step = gpu_rows_per_slab(V) if hidden_NC.is_cuda else rows_per_slab(V)
        loss = torch.zeros((), dtype=torch.promote_types(hidden_NC.dtype, torch.float32), device=hidden_NC.device)
        counted_N = (targets_N != -100).to(loss.dtype)
        weights_N = counted_N / counted_N.sum().clamp(min=1)
        if factors_N is not None:
            weights_N = weights_N * factors_N.to(loss.dtype)
        d_hidden_NC, d_weight_VC = torch.empty_like(hidden_NC), torch.zeros_like(weight_VC, dtype=loss.dtype)
        for start in range(0, N, step):
            rows = slice(start, start + step)
            x_SV = (hidden_NC[rows] @ weight_VC.T).to(loss.dtype)
            part, d_x_SV = _slab(x_SV, targets_N[rows] - first, weights_N[rows], group, options, wants_grad)
            loss += part
            if wants_grad:
                d_x_SV = d_x_SV.to(weight_VC.dtype)
                torch.mm(d_x_SV, weight_VC, out=d_hidden_NC[rows])
                d_weight_VC += d_x_SV.T @ hidden_NC[rows]
        ctx.save_for_backward(d_hidden_NC, d_weight_VC.to(weight_VC.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *(g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None, None, None


def _slab(x_SV, targets_S, weights_S, group, options, wants_grad):
    """Weighted loss of a slab of rows, and the gradient of this process's logits."""
    words, smoothing, z_loss, softcap = options
    if softcap is not None:
        x_SV = softcap * torch.tanh(x_SV / softcap)
    mine_S = (targets_S >= 0) & (targets_S < x_SV.shape[-1])
    target_S1 = targets_S.where(mine_S, 0).unsqueeze(-1)
    picked_S = x_SV.gather(-1, target_S1).squeeze(-1) * mine_S
    numbers = torch.stack([torch.logsumexp(x_SV, -1), picked_S, x_SV.sum(-1)])
    lse_RS, picked_RS, sum_RS = all_gather_detached(numbers[None], group).unbind(1)
    lse_S = torch.logsumexp(lse_RS, 0)
    losses_S = lse_S - (1 - smoothing) * picked_RS.sum(0) - smoothing / words * sum_RS.sum(0) + z_loss * lse_S.square()
    loss = (losses_S * weights_S).sum()
    if not wants_grad:
        return loss, None
    grad_SV = (x_SV - lse_S.unsqueeze(-1)).exp_()
    grad_SV *= (weights_S * (1 + 2 * z_loss * lse_S)).unsqueeze(-1)
    if smoothing:
        grad_SV -= (weights_S * (smoothing / words)).unsqueeze(-1)
    grad_SV.scatter_add_(-1, target_S1, (-weights_S * (1 - smoothing) * mine_S).unsqueeze(-1))
    if softcap is not None:
        grad_SV *= 1 - (x_SV / softcap).square()
    return loss, grad_SV
