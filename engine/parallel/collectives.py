"""What processes say to each other in the middle of a forward pass, with the backward pass that belongs to it.

    spread        x as it is                          gradients of all processes, added up
    add_up        the sum of all processes' y         the gradient as it is
    even          x as it is                          this process's equal share of the gradient
    gather        the rows of all processes           sums over processes, of which each receives its own rows
    scatter       ... and the other way round
    side_by_side  the features of all processes       this process's features

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


def share_of(length: int, rank: int, size: int) -> slice:
    """Equal shares, but for the last, which may be smaller (as `torch.chunk` cuts)."""
    step = -(-length // size)
    return slice(min(rank * step, length), min((rank + 1) * step, length))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad, ctx.group), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        return _sum(y, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Even(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.size = group.size()
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.size, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return concatenate(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        ctx.group = group
        return _reduce_scatter(y, group)

    @staticmethod
    def backward(ctx, grad):
        return concatenate(grad, ctx.group), None


class _Side(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length, group):
        ctx.length, ctx.group = length, group
        step = -(-length // group.size())
        padded = F.pad(x, (0, step - x.shape[-1]))
        return torch.cat(concatenate(padded[None], group).unbind(), -1)[..., :length]

    @staticmethod
    def backward(ctx, grad):
        return grad[..., share_of(ctx.length, ctx.group.rank(), ctx.group.size())], None, None


def spread(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The same x enters every process's part: gradients come back from each and add up."""
    return x if group is None else _Spread.apply(x, group)


def add_up(y: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of what the processes have made."""
    return y if group is None else _AddUp.apply(y, group)


def even(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """x, computed alike in every process behind a `spread`: each contributes an equal share of its gradient."""
    return x if group is None else _Even.apply(x, group)


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """The rows of all processes, one after the other."""
    return _Gather.apply(x, group)


def scatter(y: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over processes, of which each receives its own rows."""
    return _Scatter.apply(y, group)


def side_by_side(x: Tensor, length: int, group: ProcessGroup) -> Tensor:
    """The last dimensions of all processes' x, together `length` long."""
    return _Side.apply(x, length, group)


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def concatenate(x: Tensor, group: ProcessGroup) -> Tensor:
    every = x.new_empty(group.size() * len(x), *x.shape[1:])
    _gather_rows(every, x.contiguous(), group=group)
    return every


def _reduce_scatter(y: Tensor, group: ProcessGroup) -> Tensor:
    own = y.new_empty(len(y) // group.size(), *y.shape[1:])
    _scatter_sums(own, y.contiguous(), group=group)
    return own
