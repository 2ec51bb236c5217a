"""Sharded training state: shards of weights, moments and averages, and conversion from and to full tensors.

A weight, its moments and its running average have one shape and are cut alike: by `tp` and `ep` as
`tensor_parallel.shard_spec` says, by `fsdp` along the width of the stream. So a shard is one block of each matrix that
is packed in the weight, and PyTorch's DTensor, told where that block lies, can find the whole of it or write it to a
checkpoint that any other grid of processes reads (`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ...model import Transformer
from ...parallel.tensor_parallel import ShardSpec, chunk_range, shard_specs
from ..mixed_precision import Masters
from .mesh import ProcessMesh


class ShardedState:
    """Conversion between this process's shards and full tensors, by the names of weights."""

    def __init__(self, mesh: ProcessMesh, whole: Transformer) -> None:
        self.mesh, self.specs = mesh, shard_specs(whole)
        self.shapes = {name: p.shape for name, p in whole.named_parameters()}
        self.parameters = sum(shape.numel() for shape in self.shapes.values())

    def add_whole(self, tensors: dict[str, Tensor]) -> None:
        """Register replicated tensors beside the model's weights: LoRA factors."""
        self.specs |= dict.fromkeys(tensors, ShardSpec(stream=None))
        self.shapes |= {name: tensor.shape for name, tensor in tensors.items()}

    def shard(self, name: str, whole: Tensor) -> Tensor:
        """This process's shard of a full tensor (a view if it is one contiguous block)."""
        where, axes = self.specs[name], self.mesh.axes
        if where.tp is not None and axes["tp"] > 1:
            whole = where.cut(whole, self._rank("tp"), axes["tp"])
        for axis, dim in (("ep", where.ep), ("fsdp", where.stream)):
            if dim is not None and axes[axis] > 1:
                share = chunk_range(whole.shape[dim], self._rank(axis), axes[axis])
                whole = whole[(slice(None),) * dim + (share,)]
        return whole

    def full(self, name: str, part: Tensor) -> Tensor:
        """Gather the full tensor from its shards; a collective call."""
        if not self.mesh.is_sharded:
            return part
        blocks = [block.full_tensor() for block in self.blocks(name, part).values()]
        return torch.cat(blocks, self.specs[name].tp or 0)

    def with_full_matrix(self, name: str, part: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `rule` to the full matrix, in every process; return this process's shard. A collective call.

        Whole experts are matrices of their own and need no communication.
        """
        cut = self.mesh.axes["fsdp"] > 1 or (self.specs[name].tp is not None and self.mesh.axes["tp"] > 1)
        return self.shard(name, rule(self.full(name, part))) if cut else rule(part)

    def blocks(self, name: str, part: Tensor) -> dict[str, Tensor]:
        """Views of a shard as DTensors, one for each packed matrix, that know their place in it."""
        where, axes, whole = self.specs[name], self.mesh.axes, self.shapes[name]
        if where.tp is None:
            return {name: self._placed(name, part, whole)}
        shares = [chunk_range(length, self._rank("tp"), axes["tp"]) for length in where.parts]
        views = part.split([share.stop - share.start for share in shares], where.tp)
        sizes = [torch.Size([*whole[: where.tp], length, *whole[where.tp + 1 :]]) for length in where.parts]
        return {f"{name}.{i}": self._placed(name, view, size) for i, (view, size) in enumerate(zip(views, sizes))}

    def _placed(self, name: str, part: Tensor, whole: torch.Size) -> Tensor:
        if not self.mesh.is_sharded:
            return part
        from torch.distributed.tensor import DTensor, Replicate, Shard

        where = self.specs[name]
        dims = {"dp": None, "fsdp": where.stream, "ep": where.ep, "tp": where.tp}
        places = [Replicate() if dim is None else Shard(dim) for dim in dims.values()]
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh.mesh_of(part.device), places, run_check=False, shape=whole, stride=stride
        )

    def _rank(self, axis: str) -> int:
        return 0 if self.mesh.device_mesh is None else self.mesh.device_mesh.get_local_rank(axis)


def local(p: Tensor) -> Tensor:
    """The local tensor of a DTensor; any other tensor as it is."""
    return p.to_local() if hasattr(p, "to_local") else p


def full_weights(shards: ShardedState, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield full weights (or averages of them) by name; a collective call."""
    return ((name, shards.full(name, part)) for name, part in weights.items())


def state_parts(masters: Masters, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> dict:
    """Every sharded tensor of the training state by (kind, name of weight), to be saved or filled."""
    parts = {("model", name): p.detach() for name, p in masters.named.items()}
    parts |= {("average", name): part for name, part in average.items()}
    for name, p in masters.named.items():
        parts |= {(key, name): part for key, part in optimizer.state.get(p, {}).items() if is_moment(part)}
    return parts


def state_blocks(shards: ShardedState, parts: dict) -> dict[str, Tensor]:
    """The state as DTensor blocks, by name."""
    return {
        f"{kind}.{key}": block
        for (kind, name), part in parts.items()
        for key, block in shards.blocks(name, part).items()
    }


def whole_state(
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    moments: dict,
    average: dict[str, Tensor],
    weights: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the state from a checkpoint that one process wrote: (kind, name of weight, full tensor)."""
    yield from (("model", name, whole) for name, whole in weights)
    yield from (("average", name, whole) for name, whole in average.items())
    order = _order(masters, optimizer)
    for index, entry in moments["state"].items():
        yield from ((key, order[index], value) for key, value in entry.items() if is_moment(value))


def map_optimizer(masters: Masters, optimizer: torch.optim.Optimizer, state: dict, change) -> dict:
    """Map the weight-shaped tensors of an optimizer's `state_dict` by `change(name of weight, tensor)`."""
    order = _order(masters, optimizer)

    def changed(name: str, value: object) -> object:
        if value is None or is_moment(value):
            return change(name, value)
        return value.clone() if isinstance(value, Tensor) else value

    moments = {
        index: {key: changed(order[index], value) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


def _order(masters: Masters, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of weights in the order in which an optimizer's `state_dict` numbers them."""
    names = {id(p): name for name, p in masters.named.items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def is_moment(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
