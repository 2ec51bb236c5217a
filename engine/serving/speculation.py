"""Guessing ahead: the text so far often says what comes next.

A draft costs almost nothing to check: the model computes the guessed tokens in the same step as the next one, samples
after each, and keeps going while the guess is what it sampled. The draw at a position depends only on (seed, position)
and the logits there, so the tokens are exactly those of a run without drafts; only the number of steps changes.

`NGramDraft` looks for the last few tokens earlier in the sequence and proposes what followed them there.
"""

from .sequence import Sequence


class NGramDraft:
    """Proposes up to `most` tokens that once followed the last `longest` to `shortest` tokens."""

    def __init__(self, most: int = 4, longest: int = 4, shortest: int = 2, window: int = 2048):
        self.most, self.longest, self.shortest, self.window = most, longest, shortest, window

    def __call__(self, sequence: Sequence, most: int) -> list[int]:
        """Guesses for what follows the sequence's last token."""
        tokens = sequence.tokens[-self.window :]
        last = len(tokens) - 1
        candidates = [i for i in range(last - 1, -1, -1) if tokens[i] == tokens[last]]
        for size in range(self.longest, self.shortest - 1, -1):
            tail = tokens[-size:]
            for end in candidates:
                if end >= size - 1 and tokens[end - size + 1 : end + 1] == tail:
                    return tokens[end + 1 : end + 1 + min(most, self.most)]
        return []
