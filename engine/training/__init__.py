"""Training: loop, optimizers, mixed precision, checkpoints, distributed training."""

from ..lazy import lazily

__getattr__, __all__ = lazily(
    __name__,
    {
        "checkpoint": ("load_checkpoint", "save_checkpoint"),
        "config": ("TrainConfig",),
        "evaluate": ("Evaluation",),
        "optim": ("AdamW", "Muon", "SGDDecay", "clip_grad_norm"),
        "schedule": ("constant_schedule", "cosine_schedule", "linear_schedule", "wsd_schedule"),
        "run_state": ("RunState", "TrainResult"),
        "trainer": ("train",),
        "callbacks": ("Callback", "Progress"),
    },
)
