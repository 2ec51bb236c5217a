"""The loop, and everything that makes it exact, watchable and hard to kill."""

from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .evaluate import Evaluation, evaluate
from .optim import AdamW, Muon, SGDDecay, clip_grad_norm
from .schedule import constant_schedule, cosine_schedule, linear_schedule, wsd_schedule
from .trainer import TrainResult, train
from .watch import Progress, Watcher

__all__ = [
    "AdamW",
    "Evaluation",
    "Muon",
    "Progress",
    "SGDDecay",
    "TrainConfig",
    "TrainResult",
    "Watcher",
    "clip_grad_norm",
    "constant_schedule",
    "cosine_schedule",
    "evaluate",
    "linear_schedule",
    "load_checkpoint",
    "save_checkpoint",
    "train",
    "wsd_schedule",
]
