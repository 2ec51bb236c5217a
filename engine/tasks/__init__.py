"""Tasks: questions with a scoring function, for evaluation and as RL rewards.

`open_task("addition:3")` finds a task by name; `tasks:` in front says on the command line that a name is a task's.
"""

from .catalog import PREFIX, open_task
from .task import GeneratedTask, Task, final_answer

__all__ = ["PREFIX", "GeneratedTask", "Task", "final_answer", "open_task"]
