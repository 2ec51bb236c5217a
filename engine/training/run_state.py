"""`RunState`: the complete training state, as plain data.

The trainer's loop changes it, checkpoints hold it, the report tells of it; nothing here acts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.tokens import TokenSplit
from ..model import Transformer
from .callbacks import Spikes
from .config import TrainConfig
from .distributed.mesh import ProcessMesh
from .distributed.sharded_state import ShardedState
from .evaluate import Evaluation
from .inputs import RunInputs
from .mixed_precision import EMA, LossScale, Masters


@dataclass
class RunState:
    """Training state: everything that the next step depends on. The first block of fields is fixed by the
    configuration, the second changes."""

    config: TrainConfig
    inputs: RunInputs
    train_split: TokenSplit
    context: int
    mesh: ProcessMesh
    dtype: torch.dtype
    shards: ShardedState
    steps: int
    """Steps in all (an estimate, where the budget is time)."""
    grad_accum_steps: int

    model: Transformer
    masters: Masters
    ema: EMA
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    """Steps that were skipped because their loss or gradient was not finite."""
    bad_run: int = 0
    """Of these, the last ones in a row."""
    best: Evaluation | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    spikes: Spikes = field(default_factory=Spikes)

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters: the model's, or the adapter's."""
        return sum(self.shards.shapes[name].numel() for name in self.masters.named)

    @property
    def micro_batch_rows(self) -> int:
        """Rows of a micro-batch over all processes."""
        return self.config.batch_size // self.grad_accum_steps


@dataclass(frozen=True)
class TrainResult:
    """Result of a run. `directory` holds the best model by validation loss."""

    directory: Path
    val_loss: float | None
    evaluation: Evaluation | None
    """The best evaluation, over the whole validation split or `eval_batches` of it."""
    history: list[dict[str, Any]]
    """The lines of log.jsonl: training losses (`loss`) and evaluations (`val_loss` without `loss`)."""
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    stopped_by: str | None = None
    """The signal that ended the run early, if one did; its state is saved and `resume` continues it."""
