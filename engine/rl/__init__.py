"""Reinforcement learning (GRPO) and evaluation on tasks: sampling by the serving engine, updates by the trainer."""

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
