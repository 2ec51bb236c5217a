"""Process mesh of a run (dp, fsdp, tp, ep), its process groups, and collectives on plain values.

Every process reads the same global batch (a pure function of the step) and takes its share of the rows. So the order of
the data does not depend on how many processes there are, and each knows how many targets the whole step has: gradients
are sums over rows divided by that number, and summing them over processes gives what one process would have computed.

The processes form a grid with four axes:

    dp      copies: the same weights, other rows; gradients are added up on the way (`exchange.py`)
    fsdp    slices: other rows; each keeps a slice of every weight, gradient and moment, and gathers a block's weights
            just before it needs them (PyTorch's `fully_shard`, block by block)
    ep      experts: other rows; each owns some experts of every layer, the rest is copied as along dp
    tp      tensor parallel: the same rows; each owns some heads, features and words (`sharding.py`)

Since AdamW acts on each number alone, a shard is all that an optimizer needs to see. Slices are taken along the width
of the stream, heads and experts along other dimensions: so what a process keeps of a matrix is always one block of it.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...data.loader import Batch
from ...device import pick_device
from ...errors import InputError
from ...model import Transformer
from ...parallel.tensor_parallel import ShardSpec, check, shard, shard_specs
from ..config import TrainConfig
from ..mixed_precision import Masters
from .dcp import ShardWriter
from .rendezvous import join


class ProcessMesh:
    """This process's place in the grid, its process groups, and collectives on plain values.

    `restarted`: has torchrun started the processes again after a failure, here or on another machine? Then the run
    continues from its last checkpoint.
    """

    def __init__(self, device: torch.device, config: TrainConfig) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device, self.device_mesh = device, None
        self.axes = _grid(config, self.size)
        self.dp_size = self.size // self.axes["tp"]
        rows = config.batch_size // (config.grad_accum_steps or 1)
        if rows % self.dp_size:
            raise InputError(
                f"batch_size={config.batch_size} in grad_accum_steps={config.grad_accum_steps or 1} parts makes {rows} "
                f"rows, which {self.dp_size} processes cannot share evenly: choose a multiple"
            )
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if self.size == 1:
            return
        self.joined = not dist.is_initialized()
        follows = self.joined and join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.restarted = bool(self.all_reduce_max(self.restarted or follows))
        self.device_mesh = self._make_mesh(device.type)
        self.host_mesh = self._make_mesh("cpu") if device.type != "cpu" and self.is_sharded else self.device_mesh
        self.shard_writer = ShardWriter() if self.is_sharded else None

    def _make_mesh(self, kind: str) -> dist.DeviceMesh:
        return dist.init_device_mesh(kind, tuple(self.axes.values()), mesh_dim_names=tuple(self.axes))

    def mesh_of(self, device: torch.device) -> dist.DeviceMesh:
        """The PyTorch device mesh, for tensors on the run's device or on the host."""
        return self.device_mesh if device.type == self.device.type else self.host_mesh

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Process group along one axis; None if it has length 1."""
        return self.device_mesh.get_group(axis) if self.axes[axis] > 1 else None

    def make_group(self, *along: str) -> dist.ProcessGroup | None:
        """Process group over several axes; None if all have length 1. A collective call."""
        size = math.prod(self.axes[axis] for axis in along)
        if size == 1:
            return None
        order = sorted(range(len(self.axes)), key=lambda i: list(self.axes)[i] in along)
        ranks = torch.arange(self.size).view(*self.axes.values()).permute(order).reshape(-1, size)
        return dist.new_subgroups_by_enumeration(ranks.tolist())[0]

    @property
    def is_main(self) -> bool:
        """True in the process that writes files and logs."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which rows of the batch this process has; the same for all processes along tp."""
        return self.rank // self.axes["tp"]

    @property
    def is_sharded(self) -> bool:
        """True if no process holds the full state."""
        return self.size > self.axes["dp"]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first: the others find the files that it writes."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def destroy(self) -> None:
        """Destroy the process group; after a failure it must not be called: it would hang on dead processes."""
        if self.size > 1 and self.joined:
            dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """Broadcast the main process's value."""
        if self.size == 1:
            return value
        sent = [value]
        dist.broadcast_object_list(sent, src=0)
        return sent[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def local_rows(self, batch: Batch) -> Batch:
        """This process's rows of a micro-batch."""
        rows = len(batch.tokens_BT) // self.dp_size
        return batch if self.dp_size == 1 else batch.rows(self.dp_rank * rows, (self.dp_rank + 1) * rows)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def all_reduce_max(self, value: float) -> float:
        """Maximum over all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def grad_norm(self, masters: Masters) -> Tensor:
        """Global 2-norm of the gradients; each number counts once, however many processes hold it."""
        held = [(name, p.grad) for name, p in masters.named.items() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([grad for _, grad in held]))
        if not self.is_sharded:
            return torch.linalg.vector_norm(norms)
        copies = torch.tensor([self.replicas(masters.specs[name]) for name, _ in held], device=norms.device)
        squared = (norms.double().square() / copies).sum()
        dist.all_reduce(squared)
        return squared.sqrt().to(norms.dtype)

    def replicas(self, where: ShardSpec) -> int:
        """Number of processes that hold the same numbers of a parameter."""
        parts = self.axes["fsdp"] if where.stream is not None else 1
        parts *= self.axes["ep"] if where.ep is not None else 1
        parts *= self.axes["tp"] if where.tp is not None else 1
        return self.size // parts


def _grid(config: TrainConfig, size: int) -> dict[str, int]:
    """Length of each mesh axis; dp is what the others leave, unless it is given."""
    others = config.fsdp * config.ep * config.tp
    axes = {"dp": config.dp or max(1, size // others), "fsdp": config.fsdp, "ep": config.ep, "tp": config.tp}
    if math.prod(axes.values()) != size:
        product = " × ".join(f"{axis}={length}" for axis, length in axes.items())
        raise InputError(f"{product} needs {math.prod(axes.values())} processes, but this run has {size}")
    return axes


def apply_tp_ep(model: Transformer, mesh: ProcessMesh) -> Transformer:
    """Shard a model for tensor and expert parallelism (`apply_fsdp` follows)."""
    config, slices = model.config, mesh.axes["fsdp"]
    check(config, mesh.axes["tp"], mesh.axes["ep"])
    if config.d_model % slices:
        raise InputError(f"fsdp={slices} does not divide d_model={config.d_model}: each process needs an equal slice")
    data_group = mesh.make_group("dp", "fsdp", "ep") if config.n_experts else None
    return shard(model, mesh.group("tp"), mesh.group("ep"), data_group)


def apply_fsdp(model: Transformer, dtype: torch.dtype, mesh: ProcessMesh) -> None:
    """Shard a model by FSDP2 (`fully_shard`): float32 shards, gathered in `dtype` block by block."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    if dtype == torch.float16:
        raise InputError("fsdp trains in bfloat16 or float32, not in float16")
    where = shard_specs(model)
    dimension = {p: where[name].stream for name, p in model.named_parameters()}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fsdp = mesh.device_mesh["fsdp"]
    for module in (*model.blocks, model):
        fully_shard(module, mesh=fsdp, mp_policy=policy, shard_placement_fn=lambda p: Shard(dimension[p]))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # the view is never written to
    for method in ("losses", "log_probs", "hidden", "logits"):
        register_fsdp_forward_method(model, method)


class FSDPMasters(Masters):
    """Masters of an FSDP model: its float32 shards."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.dtype, self.specs = model, torch.float32, shard_specs(model)
        sliced = dict(model.named_parameters())
        self.named = {name: p.detach().to_local() for name, p in sliced.items()}
        for name, p in sliced.items():
            p.register_post_accumulate_grad_hook(_slice_collector(self.named[name]))


def _slice_collector(part: Tensor):
    def collect(p: Tensor) -> None:
        grad = p.grad.to_local()
        part.grad = grad if part.grad is None else part.grad + grad
        p.grad = None

    return collect


def make_masters(model: Transformer, dtype: torch.dtype, mesh: ProcessMesh) -> Masters:
    """The float32 masters of this process: of its full model, or of its shards."""
    return FSDPMasters(model) if mesh.axes["fsdp"] > 1 else Masters(model, dtype)


def local_device(name: str) -> torch.device:
    """This process's device: under torchrun, one GPU a process."""
    device, number = pick_device(name), os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or number is None:
        return device
    if int(number) >= torch.cuda.device_count():
        raise InputError(f"torchrun started a process for GPU {number}, but there are {torch.cuda.device_count()} here")
    device = torch.device("cuda", int(number))
    torch.cuda.set_device(device)  # before the processes meet: NCCL asks for the current one
    return device
