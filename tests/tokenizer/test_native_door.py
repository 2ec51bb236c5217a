"""The tokenizer extension by itself, fed with what no caller of ours gives it: errors, never a crash."""

import contextlib
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from warploom.tokenizer import BPETokenizer, native

extension = native.extension()
pytestmark = pytest.mark.skipif(extension is None, reason="the C++ tokenizer is not built")
BYTES = list(range(256))


def bpe(bytes_=BYTES, left=(), right=(), merged=()):
    return extension.BPE16(bytes_, left, right, merged, "gpt4", [], 256, extension.Metaspace())


@pytest.mark.parametrize("lists", [dict(left=[97], right=[98], merged=[256, 257]), dict(bytes_=[])])
def test_bpe_of_unequal_lists_raises(lists):
    with pytest.raises(ValueError):
        bpe(**lists)


def test_word_counter_without_threads_counts():
    """A count of threads of 0 once divided by it."""
    code = "from warploom import _tokenizer as t; c = t.WordCounter('gpt4', 0); c.add(b'hello world', None)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_empty_special_token_ends():
    """An empty token was found at every place for ever."""
    code = (
        "from warploom import _tokenizer as t\n"
        "s = t.Specials([(b'', 5, False, False)])\n"
        "t.BPE16(list(range(256)), [], [], [], 'gpt4', [], 256, t.Metaspace()).encode('ab\\0c', s)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode in (0, 1)


def test_large_id_takes_no_table_of_its_size():
    vocab = {bytes([i]): i for i in range(256)} | {b"ab": 1 << 22}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokenizer = BPETokenizer(vocab, [(b"a", b"b")], {})
    assert tokenizer.decode(tokenizer.encode("xxab")) == "xxab"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def test_ids_that_change_while_decoded_are_bytes_or_an_error():
    """Lengths were summed before ids were written: an id that grew in between overran the result."""
    tokenizer = BPETokenizer({bytes([i]): i for i in range(256)}, [], {"<" + "x" * 3000 + ">": 256})
    ids, stop = np.zeros(20_000, tokenizer.dtype), threading.Event()

    def flip():
        while not stop.is_set():
            ids[:] = 256
            ids[:] = 97

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(100):
            with contextlib.suppress(ValueError):
                tokenizer.decode_bytes(ids)
    finally:
        stop.set()
        thread.join()
