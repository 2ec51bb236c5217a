"""Tasks: questions with a score for every answer, for evaluation and as rewards of reinforcement learning.

`open_task("addition:3")` finds a task by name; `tasks:` in front says on the command line that a name is a task's.
"""

from .catalog import PREFIX, open_task
from .task import GeneratedTask, Task, final_answer

__all__ = ["PREFIX", "GeneratedTask", "Task", "final_answer", "open_task"]
