"""The head, as the runner calls it."""

from torch import Tensor


class Head:
    """Hidden states to logits."""

    def __init__(self, model):
        self.model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)
