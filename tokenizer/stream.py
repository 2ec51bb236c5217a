"""Streaming decode: token ids in, text out, never half a character.

A byte-level token may end in the middle of a character (an emoji is four bytes, often two tokens). The decoder keeps
the unfinished bytes until the rest arrives, so what it has returned so far is always valid text, and all pushes
together equal `decode` of all ids.
"""

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Streaming decoder, made by `tokenizer.stream()`."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        errors: str = "replace",
        opening: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """`opening` gives the bytes of the first token of a text, where they differ."""
        self._token_bytes, self._opening = token_bytes, opening
        self._first = opening  # until the first token has come
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; often one word, sometimes empty."""
        data = self._token_bytes(token_id)
        if self._first:
            data, self._first = self._first(data), None
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Decode the bytes of an unfinished character at the end; resets the stream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._first = self._opening
        return rest
