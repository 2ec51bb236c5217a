"""The C++ extension: the same results as the twin and as `regex`, whatever the machine and the input."""

import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.tokenizer import PATTERNS, BPETokenizer
from warploom.tokenizer.native import byte_ends, extension, train_merges
from warploom.tokenizer.reference import PythonBPE, count_words
from warploom.tokenizer.reference import train_merges as train_twin

native = extension()
pytestmark = pytest.mark.skipif(native is None, reason="the extension is not built, or WARPLOOM_NATIVE=0")

ROOT = Path(__file__).resolve().parents[2]
PIECES = [
    "the",
    " dog",
    "'s",
    "'",
    "\n",
    " ",
    "  ",
    "\n\n",
    "\r\n",
    "\t",
    "can't",
    "DON'T",
    "'ll",
    "x=",
    "(a)",
    "12345",
]
PIECES += [
    "Foo",
    "fooBar",
    "...\n",
    "//\n/",
    "é",
    " 你好",
    "\u3000",
    "ſ",
    "'ſ",
    "\u0301",
    "中A",
    "ǅ",
    "👍",
    " \u0301a",
    "²",
]


def ready(isa: str) -> bool:
    try:
        native.use_instruction_set(isa)
    except ValueError:
        return False
    finally:
        native.use_instruction_set("best")
    return True


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    if not ready(request.param):
        pytest.skip(f"this machine or build has no {request.param}")
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("best")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_are_those_of_regex(isa, pattern, texts, noise):
    for text in [*texts, *(noise(seed, 150) for seed in range(200))]:
        assert native.split(text, pattern).tolist() == byte_ends(text, pattern)

    @settings(max_examples=150)
    @given(st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=60).map("".join))
    def check(text):
        assert native.split(text, pattern).tolist() == byte_ends(text, pattern)

    check()


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k", "qwen3.5", "deepseek", "falcon"])
def test_unicode_classes_equal_regex(pattern):
    """Assigned or not: after a letter and before one; in used planes also twice, and among digits and signs."""
    for start in range(0, 0x110000, 0x8000):
        codes = [code for code in range(start, start + 0x8000) if not 0xD800 <= code < 0xE000]
        more = pattern == "gpt4" and (start < 0x38000 or start == 0xE0000)
        text = "".join(f"a{c}B {c}{c}1 !{c}b\n" if more else f"a{c}B " for c in map(chr, codes))
        assert native.split(text, pattern).tolist() == byte_ends(text, pattern)


def test_the_class_table_is_what_its_script_writes():
    script = ROOT / "csrc" / "tokenizer" / "make_unicode_classes.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0


def test_ids_equal_the_twins(tok, texts, noise):
    twin = PythonBPE(tok.vocab, tok.merges, tok.pattern, whole_words=False)
    for text in [*texts, "".join(texts) * 20, *(noise(seed, 300) for seed in range(50))]:
        assert tok.encode(text) == twin.encode(text)
        assert tok.encode_array(text, threads=3).tolist() == twin.encode(text)


@st.composite
def any_merges(draw):
    """A vocabulary and merges in no order that training would give, with repeated results."""
    vocab = {bytes([byte]): 255 - byte for byte in range(256)}
    merges = []
    for _ in range(draw(st.integers(0, 12))):
        token = st.sampled_from(sorted(t for t in vocab if len(t) > 1 or t in b"ab"))
        left, right = draw(token), draw(token)
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    return vocab, draw(st.permutations(merges)), draw(st.booleans())


@settings(max_examples=200)
@given(any_merges(), st.lists(st.tuples(st.text("abc", min_size=1, max_size=100), st.integers(1, 40)), max_size=4))
def test_any_list_of_merges_is_applied_like_the_twin_does(vocabulary, texts):
    vocab, merges, whole = vocabulary
    pattern = r"(?s).+"
    tok, twin = BPETokenizer(vocab, merges, {}, pattern, whole_words=whole), PythonBPE(vocab, merges, pattern, whole)
    for text, times in texts:  # at a c, words fall apart; beyond a kilobyte, they are encoded in blocks
        for form in (text, text * times):
            assert tok.encode(form) == twin.encode(form)


@settings(max_examples=200)
@given(any_merges(), st.lists(st.text("aabbc", min_size=1, max_size=17), max_size=60))
def test_merges_x16_equal_one_by_one(vocabulary, words):
    """New words are merged side by side as they are alone."""
    vocab, merges, whole = vocabulary
    tok, twin = BPETokenizer(vocab, merges, {}, "gpt2", whole_words=whole), PythonBPE(vocab, merges, "gpt2", whole)
    text = "\n".join(words)
    assert tok.encode(text) == twin.encode(text)


@settings(max_examples=150)
@given(
    st.lists(st.text("ab é'1", max_size=30), max_size=6),
    st.sampled_from(["bytes", "hf", "ids"]),
    st.sampled_from(["gpt2", "gpt4", "o200k", r"\w"]),
    st.integers(1, 3),
)
def test_training_equals_the_twins(corpus, ties, pattern, threads):
    options = (60, ties, 1, 6, None)
    twin = train_twin(count_words(corpus, pattern), *options)
    assert train_merges(native, corpus, pattern, [], threads, *options) == twin


def test_bpe_training_independent_of_threads(tmp_path, texts, monkeypatch):
    """Training does not depend on threads or on how the corpus is cut."""
    text = "<|endoftext|>".join(texts) * 30
    (tmp_path / "corpus.txt").write_bytes(text.encode())
    one = BPETokenizer.train([text], 600, threads=1)
    monkeypatch.setattr("warploom.tokenizer.native._BLOCK", 1000)
    assert BPETokenizer.train(tmp_path / "corpus.txt", 600, threads=3).merges == one.merges
    twin = train_twin(count_words([text], "gpt4", ["<|endoftext|>"]), 600 - 257)
    assert one.merges == twin


def test_a_file_is_encoded_alike_in_small_blocks(tok, tmp_path, texts, monkeypatch):
    text = "<|endoftext|>".join(texts) * 3
    (tmp_path / "text").write_bytes(text.encode())
    for size in (64, 1000, 1 << 20):
        monkeypatch.setattr("warploom.tokenizer.native._BLOCK", size)
        tok.encode_file(tmp_path / "text", tmp_path / "ids", allowed_special="all")
        assert np.fromfile(tmp_path / "ids", dtype="<u2").tolist() == tok.encode(text, allowed_special="all")


def test_file_not_utf8_refused_with_place(tok, tmp_path):
    """A file that is not utf8 is refused with its place."""
    (tmp_path / "bad").write_bytes(b"a word " * 500 + b"\xff" + b" more" * 10)
    with pytest.raises(ValueError, match="not valid UTF-8 at byte 3500"):
        tok.encode_file(tmp_path / "bad", tmp_path / "ids")
    assert not list(tmp_path.glob("*ids*"))


@pytest.mark.timeout(60)
def test_a_megabyte_without_a_break_is_no_trap(tok):
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)
    for text in ("a" * 1_000_000, "".join(letters), "1" * 1_000_000, " " * 1_000_000, "你" * 300_000, "é" * 500_000):
        assert tok.decode(tok.encode_array(text)) == text


@pytest.mark.parametrize("ties", ["bytes", "hf", "ids"])
def test_bpe_training_right_with_forgotten_merges(ties):
    """Enough merges for many sweeps, of words long enough to leave many pairs behind."""
    words = words_of_many_scripts(1500)
    rules = (4000, ties, 1, None, None)
    expected = train_twin(count_words([words], "gpt4"), *rules)
    assert train_merges(native, [words], "gpt4", [], 1, *rules) == expected


def test_any_bytes_decode_as_python_decodes_them(tok):
    draw = random.Random(0)
    for _ in range(1000):
        data = draw.randbytes(draw.randrange(40))
        ids = [tok.vocab[bytes([byte])] for byte in data]
        assert tok.decode_bytes(ids) == data and tok.decode(ids) == data.decode(errors="replace")
        stream = tok.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == data.decode(errors="replace")
    for bad in ([-1], [1 << 70], [tok.vocab_size], [1.5], ["a"], np.array([0.5]), np.zeros((2, 2), int), [None]):
        with pytest.raises(ValueError):
            tok.decode(bad)


def test_many_ids_are_as_wide_as_they_must_be(tok):
    wide = BPETokenizer(tok.vocab, tok.merges, {"<|far|>": 70_000}, tok.pattern)
    assert wide.encode_array("hello").dtype == np.uint32 and wide.encode("hello") == tok.encode("hello")
    assert wide.encode("a<|far|>", allowed_special="all")[-1] == 70_000
    with pytest.raises(ValueError, match="60000"):
        wide.decode([60_000])


def words_of_many_scripts(count: int) -> str:
    """Distinct words, many longer than a cache entry holds, some of them of characters no token joins."""
    draw = random.Random(1)
    alphabets = [
        "abcdefghijklmnopqrst",
        "абвгдежзиклмноп",
        "你好世界天气今日的是不了",
        "ABCdefg",
        "éàüßñ",
        "ひらがなカタカナ",
        "👍👩🏽",
    ]
    words = ("".join(draw.choices(draw.choice(alphabets), k=draw.choice([2, 4, 6, 9, 20, 70]))) for _ in range(count))
    return "".join(word + draw.choice([" ", " ", ", ", "\n", "  ", "\u3000", "\xa0"]) for word in words)


def test_encode_large_text_equals_twin(isa):
    """Large enough for several segments, and with more new words than are merged at once."""
    source = "".join(path.read_text("utf-8", "ignore") for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60])
    tok = BPETokenizer.train([source, words_of_many_scripts(3000)], 12_000, "gpt4")
    text = words_of_many_scripts(20_000) + source[:300_000]
    assert len(text.encode()) > 1 << 20
    expected = PythonBPE(tok.vocab, tok.merges, tok.pattern, whole_words=False).encode(text)
    for _ in range(2):  # cold, then warm
        assert tok.encode_array(text, threads=1).tolist() == expected
    assert tok.encode_array(text, threads=2).tolist() == expected
    assert tok.decode(expected) == text


@pytest.mark.parametrize("beyond", ["é", "你", "👍"])
def test_strings_of_any_width_are_read_as_their_utf8(isa, tok, beyond):
    """CPython keeps characters in one, two or four bytes; long strings are turned to UTF-8 here."""
    draw = random.Random(2)
    for alphabet in ("a" * 40 + beyond, "aé" + beyond, beyond, "a\0\x7f\x80߿ࠀ\uffff\U00010000\U0010ffff" + beyond):
        for size in range(5000, 5020):
            text = "".join(draw.choices([c for c in alphabet if c <= beyond], k=size))
            assert tok.encode_array(text).tolist() == tok.encode_array(text.encode()).tolist()
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        tok.encode("é" * 5000 + "\ud800" + beyond)


def test_batches_keep_their_order_and_their_borders(tok, noise):
    texts = [noise(seed, random.Random(seed).randrange(400)) for seed in range(500)]
    ids, offsets = tok.encode_batch_array(texts, threads=3)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == tok.encode_batch(texts) == list(map(tok.encode, texts))
    empty, offsets = tok.encode_batch_array([])
    assert len(empty) == 0 and offsets.tolist() == [0]
