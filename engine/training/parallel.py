"""Many processes, one run: what is split, what is copied, and what must be agreed on.

Every process reads the same global batch (a pure function of the step) and takes its share of the rows. So the order of
the data does not depend on how many processes there are, and each knows how many targets the whole step has: gradients
are sums over rows divided by that number, and summing them over processes gives what one process would have computed.

The world is a grid of `dp` × `fsdp` processes. Along `dp`, processes hold copies of the state and add up their
gradients. Along `fsdp`, they share one copy: each keeps a slice of every weight, gradient and moment (PyTorch's
`fully_shard`, block by block) and gathers a block's weights just before it is needed. Since AdamW acts on each number
alone, a slice is all that an optimizer needs to see.

A checkpoint is written whole, by one process, in the same format whatever the grid was: a run saved by two processes
resumes in one, or in eight.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.loader import Batch
from ..model import Transformer
from .precision import Masters


class Team:
    """This process's place among those of the run, and the little they say to each other."""

    def __init__(self, device: torch.device, fsdp: int, batch_rows: int) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.fsdp, self.mesh, self.device = fsdp, None, device
        if self.size % fsdp:
            raise ValueError(f"fsdp={fsdp} does not divide the {self.size} processes of this run")
        if batch_rows % self.size:
            raise ValueError(f"a micro-batch of {batch_rows} rows cannot be shared by {self.size} processes evenly")
        if self.size == 1:
            return
        self.joined = not dist.is_initialized()
        if self.joined:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if fsdp > 1:
            shape = (self.size // fsdp, fsdp)
            mesh = torch.distributed.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=("dp", "fsdp"))
            self.mesh = mesh if shape[0] > 1 else mesh["fsdp"]

    @property
    def leads(self) -> bool:
        """Is this the process that writes files and talks to people?"""
        return self.rank == 0

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader runs the block before the others do: what it leaves on disk is there for them."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def leave(self) -> None:
        """End what joining began."""
        if self.size > 1 and self.joined:
            dist.destroy_process_group()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, batch: Batch) -> Batch:
        """The rows of a micro-batch that are this process's."""
        rows = len(batch.tokens_BT) // self.size
        return batch if self.size == 1 else batch.rows(self.rank * rows, (self.rank + 1) * rows)

    def total(self, *values: float) -> list[float]:
        """Sums over all processes, the same in each of them."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def most(self, value: float) -> float:
        """The largest of all processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def add_gradients(self, masters: Masters) -> None:
        """Sum the gradients of replicas (slices arrive summed)."""
        if self.size == 1 or self.fsdp > 1:
            return
        grads = [p.grad for p in masters.named.values() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))

    def norm(self, masters: Masters) -> Tensor:
        """The joint 2-norm of all gradients, slices of other processes included."""
        grads = [p.grad for p in masters.named.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if self.fsdp > 1:
            squared = norm.double().square()
            dist.all_reduce(squared, group=self.mesh.get_group("fsdp"))
            norm = squared.sqrt().to(norm.dtype)
        return norm


class ShardedMasters(Masters):
    """Slices of the float32 weights, of which `fully_shard` gathers rounded copies block by block."""

    def __init__(self, model: Transformer, dtype: torch.dtype, team: Team) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        if dtype == torch.float16:
            raise ValueError("fsdp trains in bfloat16 or float32, not in float16")
        self.model, self.dtype = model, torch.float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=team.mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        for method in ("losses", "hidden", "logits"):
            register_fsdp_forward_method(model, method)
        self.sharded = dict(model.named_parameters())
        self.named = {name: p.detach().to_local() for name, p in self.sharded.items()}
        for name, p in self.sharded.items():
            p.register_post_accumulate_grad_hook(_slice_collector(self.named[name]))

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, part in self.named.items():
            part.copy_(self.part(name, weights[name]))

    def part(self, name: str, whole: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        like = self.sharded[name]
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements).to_local()

    def whole(self, name: str, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = self.sharded[name]
        place = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(part, like.device_mesh, like.placements, **place).full_tensor()


def _slice_collector(part: Tensor):
    def collect(p: Tensor) -> None:
        grad = p.grad.to_local()
        part.grad = grad if part.grad is None else part.grad + grad
        p.grad = None

    return collect


def restarted() -> bool:
    """Did torchrun start this process again after a failure? Then the run continues from its last checkpoint."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def make_masters(model: Transformer, dtype: torch.dtype, team: Team) -> Masters:
    """The trained weights of this process: all of them, or its slices."""
    return ShardedMasters(model, dtype, team) if team.fsdp > 1 else Masters(model, dtype)


def whole_weights(masters: Masters, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights (or averages of them) as any other program knows them."""
    return {name: masters.whole(name, part) for name, part in weights.items()}


def whole_optimizer(masters: Masters, optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state with whole tensors in the place of slices."""
    return _map_state(masters, optimizer, optimizer.state_dict(), masters.whole)


def load_optimizer(masters: Masters, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Give this process its part of a whole optimizer state."""
    optimizer.load_state_dict(_map_state(masters, optimizer, state, masters.part))


def _map_state(masters: Masters, optimizer: torch.optim.Optimizer, state: dict, change) -> dict:
    names = {id(p): name for name, p in masters.named.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {key: change(order[index], value) if _is_moment(value) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


def _is_moment(value) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
