"""Streaming detokenization and stop strings.

A stream obeys one law: *the pieces, joined, are the text*. The text is all the tokens decoded together and cut before
the first stop string; it does not matter how they were grouped when they arrived. Two things make that harder than it
looks. A token may end in the middle of a character: the tokenizer's own stream keeps such bytes back. And the text may
end in what could become a stop string: `StopFinder` keeps back the longest such tail, no more, until the next
characters decide.

Which stop string counts when several match? The one that is complete first, since generation would have ended
there, and of those complete at the same character the longest.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol


class Decoder(Protocol):
    """Interface of `tokenizer.stream()`: emits text once no later token can change it."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class StopFinder:
    """Stop-string matcher over a text stream; holds back only what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the text that certainly comes before any stop string."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            _, start, self.found = min(matches)
            self._held = ""
            return text[:start]
        keep = next((n for n in range(min(self._longest, len(text)), 0, -1) if self._may_stop(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the held-back text at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _may_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)


class TextStream:
    """Incremental text of one sequence: token ids in, text out, stop strings applied."""

    def __init__(
        self, decoder: Decoder | None, stops: Sequence[str] = (), skip_ids: Iterable[int] = (), start: str = ""
    ):
        self._decoder = decoder
        self._stops = StopFinder(stops)
        self._hidden = frozenset(skip_ids)
        self._parts = [start] if start else []
        self._closed = False

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return "".join(self._parts)

    @property
    def stopped(self) -> bool:
        """Return whether a stop string was found."""
        return self._stops.found is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, or None."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Return the text that this token completes; nothing after a stop string."""
        if self._decoder is None or token in self._hidden or self.stopped:
            return ""
        try:
            text = self._decoder.push(token)
        except ValueError:  # a row of the model's table that the tokenizer has no token for
            return ""
        return self._say(self._stops.push(text))

    def finish(self) -> str:
        """Return the held-back rest of the text."""
        if self._decoder is None or self._closed:
            return ""
        self._closed = True
        if self.stopped:
            return ""
        last = self._stops.push(self._decoder.finish())
        return self._say(last if self.stopped else last + self._stops.finish())

    def _say(self, piece: str) -> str:
        if piece:
            self._parts.append(piece)
        return piece
