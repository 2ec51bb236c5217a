"""Autograd-aware collectives for tensor and expert parallelism. Each pairs a forward collective with its conjugate.

    name                 forward                            backward
    copy_to_group        identity (Megatron's f)            all-reduce
    all_reduce           all-reduce (Megatron's g)          identity
    scale_gradient       identity                           divide by the size of the group
    all_gather           rows of all processes              reduce-scatter of rows
    reduce_scatter       sums, each process its own rows    all-gather of rows
    all_gather_last_dim  features of all processes          this process's features

A group of None is a process by itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

# newer PyTorch has new names for them
_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sums = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def chunk_range(length: int, rank: int, size: int) -> slice:
    """Range of chunk `rank` of `size`, equal up to the last ones, as `torch.chunk` cuts."""
    step = -(-length // size)
    return slice(min(rank * step, length), min((rank + 1) * step, length))


class _Conjugates(torch.autograd.Function):
    """Autograd function: one collective forward, its conjugate backward."""

    @staticmethod
    def forward(ctx, x, group, collective, conjugate):
        ctx.group, ctx.conjugate = group, conjugate
        return collective(x, group)

    @staticmethod
    def backward(ctx, grad):
        return ctx.conjugate(grad, ctx.group), None, None, None


class _AllGatherLastDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length, group):
        ctx.length, ctx.group = length, group
        step = -(-length // group.size())
        padded = F.pad(x, (0, step - x.shape[-1]))
        return torch.cat(all_gather_detached(padded[None], group).unbind(), -1)[..., :length]

    @staticmethod
    def backward(ctx, grad):
        return grad[..., chunk_range(ctx.length, ctx.group.rank(), ctx.group.size())], None, None


def copy_to_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Identity forward, all-reduce backward (Megatron's f): x enters a sharded computation."""
    return x if group is None else _Conjugates.apply(x, group, _identity, _sum)


def all_reduce(y: Tensor, group: ProcessGroup | None) -> Tensor:
    """All-reduce forward, identity backward (Megatron's g)."""
    return y if group is None else _Conjugates.apply(y, group, _sum, _identity)


def scale_gradient(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Identity forward, gradient / group size backward: x is computed redundantly in every process of the group."""
    return x if group is None else _Conjugates.apply(x, group, _identity, _share)


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """All-gather of rows forward, reduce-scatter backward."""
    return _Conjugates.apply(x, group, all_gather_detached, _reduce_scatter)


def reduce_scatter(y: Tensor, group: ProcessGroup) -> Tensor:
    """Reduce-scatter of rows forward, all-gather backward."""
    return _Conjugates.apply(y, group, _reduce_scatter, all_gather_detached)


def all_gather_last_dim(x: Tensor, length: int, group: ProcessGroup) -> Tensor:
    """All-gather of the last dimension, `length` long in all; backward takes this process's part."""
    return _AllGatherLastDim.apply(x, length, group)


def _identity(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.view_as(x)


def _share(grad: Tensor, group: ProcessGroup) -> Tensor:
    return grad / group.size()


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def all_gather_detached(x: Tensor, group: ProcessGroup) -> Tensor:
    """All-gather rows, without autograd."""
    every = x.new_empty(group.size() * len(x), *x.shape[1:])
    _gather_rows(every, x.contiguous(), group=group)
    return every


def _reduce_scatter(y: Tensor, group: ProcessGroup) -> Tensor:
    own = y.new_empty(len(y) // group.size(), *y.shape[1:])
    _scatter_sums(own, y.contiguous(), group=group)
    return own
