"""Claims about streamed text."""

import hypothesis.strategies as st
from hypothesis import given, settings

from warploom.engine.serving.detokenizer import StopFinder, TextStream


class Utf8:
    """A decoder whose tokens are bytes."""

    def __init__(self):
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        return self._decoder.decode(bytes([token]))

    def finish(self):
        return self._decoder.decode(b"", True)


def cut(text: str, stops: list[str]) -> str:
    """The definition: the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


texts = st.text("abcé𝄞", max_size=30)
stop_sets = st.lists(st.text("abcé", min_size=1, max_size=5), max_size=4)


@settings(max_examples=400)
@given(texts, stop_sets)
def test_streamed_pieces_join_to_cut_text(text, stops):
    """Streamed pieces join to the text cut before the first stop string."""
    stream = TextStream(Utf8(), stops)
    pieces = [stream.push(byte) for byte in text.encode()] + [stream.finish()]
    assert "".join(pieces) == stream.text == cut(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


@settings(max_examples=200)
@given(st.lists(st.text("abcd", max_size=6), max_size=8), stop_sets)
def test_stop_cut_independent_of_pieces(pieces, stops):
    """The cut does not depend on how the text arrives and nothing is kept back needlessly."""
    finder, said, seen = StopFinder(stops), "", ""
    for piece in pieces:
        said += finder.push(piece)
        seen += piece
        if finder.found is None:
            held = seen[len(said) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)
    said += finder.finish()
    assert said == cut("".join(pieces), stops)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 255), max_size=20), stop_sets)
def test_any_bytes_obey_the_law(tokens, stops):
    stream = TextStream(Utf8(), stops)
    pieces = [stream.push(token) for token in tokens] + [stream.finish(), stream.finish()]
    assert "".join(pieces) == stream.text == cut(bytes(tokens).decode(errors="replace"), stops)


def test_text_stream_hides_tokens_keeps_start():
    """Hidden tokens and a start do not disturb the text."""
    stream = TextStream(Utf8(), skip_ids=[0], start="so: ")
    assert stream.push(104) + stream.push(0) + stream.push(105) == "hi"
    assert stream.text == "so: hi"
