"""Bucketed gradient all-reduce that overlaps with the backward pass: what DDP does, for our float32 masters.

Processes that keep the same numbers for other rows must add up their gradients. The backward pass makes gradients from
the last block to the first, and meanwhile the network would be idle. So the weights are put into buckets, last ones
first, and a bucket leaves as soon as its gradients are complete, which is in the backward pass of the step's last
micro-batch: only what the very first weights leave has to be waited for.

Buckets leave in one order in all processes, whichever is complete first, because a message is known by its place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..mixed_precision import Masters
from .mesh import ProcessMesh

BUCKET = 1 << 22  # numbers that leave together: many small messages are slow, one large one leaves late


@dataclass
class Bucket:
    """Gradients that are all-reduced together, over one process group."""

    group: dist.ProcessGroup
    names: list[str] = field(default_factory=list)
    numbers: int = 0
    missing: int = 0


class GradReducer:
    """Bucketed all-reduce of the gradients of `masters` over replicas; FSDP reduces its own shards."""

    def __init__(self, mesh: ProcessMesh, masters: Masters) -> None:
        self.masters = masters
        self.buckets = _fill_buckets(mesh, masters)
        self.bucket_of = {name: bucket for bucket in self.buckets for name in bucket.names}
        self.left: list[dist.Work] | None = None  # the messages of the buckets that have left; None: nothing may leave
        for name, p in masters.model.named_parameters():
            for made in masters.made_from(name):
                if made in self.bucket_of:  # asked after the masters' own hooks, which take the model's gradient
                    p.register_post_accumulate_grad_hook(functools.partial(self._complete, made))

    def arm(self) -> None:
        """Enable the reduction for the next backward pass, the last one of the step."""
        self.left = []
        for bucket in self.buckets:
            bucket.missing = len(bucket.names)

    def wait(self) -> None:
        """Wait for all reductions; gradients are then sums over processes."""
        while len(self.left) < len(self.buckets):  # weights without a gradient have not told
            self._launch_bucket()
        for message in self.left:
            if message:
                message.wait()
        self.left = None

    def _complete(self, name: str, _: Tensor) -> None:
        if self.left is None:
            return
        self.bucket_of[name].missing -= 1
        while len(self.left) < len(self.buckets) and not self.buckets[len(self.left)].missing:
            self._launch_bucket()

    @torch.no_grad()
    def _launch_bucket(self) -> None:
        """Start the all-reduce of the next bucket; its gradients become views of the flat buffer."""
        bucket = self.buckets[len(self.left)]
        masters = [p for p in map(self.masters.named.get, bucket.names) if p.grad is not None]
        if not masters:
            return self.left.append(None)
        message = torch.cat([p.grad.flatten() for p in masters])
        self.left.append(dist.all_reduce(message, group=bucket.group, async_op=True))
        for p, part in zip(masters, message.split([p.numel() for p in masters])):
            p.grad = part.view_as(p)


def _fill_buckets(mesh: ProcessMesh, masters: Masters) -> list[Bucket]:
    """Assign gradients to buckets in about the order in which backward completes them."""
    groups = {"copied": mesh.make_group("dp", "ep"), "experts": mesh.make_group("dp")}  # no copies along ep
    groups["whole"] = mesh.make_group("dp", "fsdp", "ep")  # an adapter's factors, which no process has slices of
    filling: dict[str, Bucket] = {}
    full: list[Bucket] = []
    for name, p in reversed(masters.named.items()):
        where = masters.specs[name]
        kind = "experts" if where.ep is not None else "whole" if where.stream is None else "copied"
        if groups[kind] is None:
            continue
        bucket = filling.setdefault(kind, Bucket(groups[kind]))
        bucket.names.append(name)
        bucket.numbers += p.numel()
        if bucket.numbers >= BUCKET:
            full.append(filling.pop(kind))
    return full + list(filling.values())
