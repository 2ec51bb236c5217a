"""The loop, and everything that makes it exact, watchable and hard to kill."""

from ..lazy import lazily

__getattr__, __all__ = lazily(
    __name__,
    {
        "checkpoint": ("load_checkpoint", "save_checkpoint"),
        "config": ("TrainConfig",),
        "evaluate": ("Evaluation",),
        "optim": ("AdamW", "Muon", "SGDDecay", "clip_grad_norm"),
        "schedule": ("constant_schedule", "cosine_schedule", "linear_schedule", "wsd_schedule"),
        "trainer": ("TrainResult", "train"),
        "callbacks": ("Progress", "Watcher"),
    },
)
