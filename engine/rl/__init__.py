"""Reinforcement learning and evaluation by tasks: where the trainer and the server meet."""

from ..lazy import lazily

__getattr__, __all__ = lazily(
    __name__,
    {
        "config": ("RLConfig",),
        "evaluate": ("TaskResult", "evaluate_task"),
        "report": ("RLProgress",),
        "trainer": ("reinforce",),
    },
)
