"""The tokenizer extension by itself, fed with what no caller of ours gives it: errors, never a crash."""

import contextlib
import random
import resource
import string
import subprocess
import sys
import threading
import time

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


def test_too_many_merges_are_refused():
    """The rank of a merge has 22 bits in the table of pairs: ids came out wrong beyond."""
    with pytest.raises(ValueError, match="merges are more than 4194304"):
        bpe(left=[97] * (1 << 22), right=[98] * (1 << 22), merged=[256] * (1 << 22))


def seconds(call, *args):
    began = time.process_time()
    call(*args)
    return time.process_time() - began


def test_words_of_one_old_hash_cost_no_more():
    """Under the public constants that hashes once had, this prefix made every hash 0 (a factor of its product)."""
    rng = random.Random(0)

    def text(prefix):
        letters = ("".join(rng.choices(string.ascii_lowercase, k=32 - len(prefix))) for _ in range(16_000))
        return "\n".join(prefix + word for word in letters)

    plain, hostile = text(""), text("qpaivytuewouvswvkvflablh")
    tokenizer = BPETokenizer({bytes([i]): i for i in range(256)}, [], {})
    for call in (tokenizer.encode_array, lambda x: extension.WordCounter("gpt4", 1).add(x, None)):
        fair = min(seconds(call, plain) for _ in range(3))
        assert min(seconds(call, hostile) for _ in range(3)) < 4 * fair  # 25 and 120 times before


@pytest.mark.unsanitized("it fills what is zeroed: 4 GiB")
def test_piece_of_4_gib_is_refused():
    """Its end is a number of 32 bits: a thousand ids came out."""
    text = np.zeros((1 << 32) + 1000, np.uint8)  # one page of zeros, mapped everywhere
    with pytest.raises(ValueError, match="4 GiB"):
        bpe().encode_array(text, None, 1)


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
