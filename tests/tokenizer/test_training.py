"""Training learns what the rules say, whoever computes it."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.tokenizer import PATTERNS, BPETokenizer
from warploom.tokenizer.byte_alphabet import to_bytes


def textbook(words: dict[bytes, int], steps: int) -> list[tuple[bytes, bytes]]:
    """Byte-pair encoding as one would define it: recount everything at each step."""
    pieces = {word: [bytes([byte]) for byte in word] for word in words}
    merges = []
    for _ in range(steps):
        counts: dict[tuple[bytes, bytes], int] = {}
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                counts[pair] = counts.get(pair, 0) + words[word]
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            out = []
            for part in parts:
                if out and (out[-1], part) == best and out[-1] is not None:
                    out[-1:] = [best[0] + best[1], None]
                else:
                    out.append(part)
            pieces[word] = [part for part in out if part is not None]
    return merges


def test_bpe_most_frequent_then_greatest_pair():
    """The most frequent pair wins and the greatest among equals."""
    text = "low low low low low lower lower widest widest widest newest newest newest newest newest newest"
    tok = BPETokenizer.train([text], 256 + 6, pattern=r"\S+", special_tokens=())
    assert tok.merges == [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow"), (b"w", b"est"), (b"n", b"e")]
    assert tok.vocab_size == 262 and tok.id_of(b"\x00") == 0 and tok.id_of("st") == 256


@settings(max_examples=100)
@given(st.lists(st.text("abcé\U0001f44d", max_size=12), max_size=8))
def test_training_follows_the_textbook(texts):
    words: dict[bytes, int] = {}
    for text in texts:
        if text:
            words[text.encode()] = words.get(text.encode(), 0) + 1
    tok = BPETokenizer.train(iter(texts), 256 + 30, pattern=r"(?s).+", special_tokens=())
    assert tok.merges == textbook(words, 30)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
def test_hf_ties_give_hugging_faces_merges(pattern, samples):
    corpus = [samples["english"] * 3, samples["code"], samples["many"]]
    tok = BPETokenizer.train(corpus, 800, pattern=pattern, special_tokens=(), ties="hf")
    tokenizers = pytest.importorskip("tokenizers")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    peer.train_from_iterator(
        corpus, tokenizers.trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    )
    merges = json.loads(peer.to_str())["model"]["merges"]
    assert tok.merges == [(to_bytes(left), to_bytes(right)) for left, right in merges]


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
def test_id_ties_give_rustbpes_merges(pattern, samples):
    corpus = [samples["english"] * 3, samples["code"], samples["many"]]
    tok = BPETokenizer.train(corpus, 800, pattern=pattern, special_tokens=(), ties="ids")
    rustbpe = pytest.importorskip("rustbpe")
    peer = rustbpe.Tokenizer()
    peer.train_from_iterator(iter(corpus), 800, pattern=PATTERNS[pattern])
    ranks = {bytes(token): rank for token, rank in peer.get_mergeable_ranks()}
    assert tok.vocab == ranks


def test_special_tokens_are_never_merged_across(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("xy<|endoftext|>" * 50)
    tok = BPETokenizer.train(path, 300, special_tokens=("<|endoftext|>",))
    assert list(tok.vocab)[256:] == [b"xy"]
    assert tok.special_tokens == {"<|endoftext|>": 257}
    assert tok.vocab_size == 258


def test_corpus_paths_and_texts_are_equal(tmp_path, samples):
    """Paths lists of paths and texts are the same corpus."""
    for name, text in (("a", samples["english"]), ("b", samples["code"])):
        (tmp_path / name).write_bytes((text + "\n").encode())
    files = [tmp_path / "a", tmp_path / "b"]
    expected = BPETokenizer.train([samples["english"] + "\n", samples["code"] + "\n"], 400).merges
    assert BPETokenizer.train(files, 400, threads=2).merges == expected
    assert BPETokenizer.train([str(path) for path in files], 400, threads=1).merges == expected
    assert (
        BPETokenizer.train((text for text in (samples["english"] + "\n", samples["code"] + "\n")), 400).merges
        == expected
    )


def test_options_bound_what_is_learned(samples):
    english = samples["english"]
    short = BPETokenizer.train([english * 3], 600, max_token_length=4)
    assert max(map(len, short.vocab)) == 4
    assert len(BPETokenizer.train([samples["english"]], 600, min_frequency=5).merges) < len(
        BPETokenizer.train([samples["english"]], 600).merges
    )
    seen = []
    BPETokenizer.train([samples["english"]], 300, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (43, 43)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corpus": ["x"], "vocab_size": 10}, "vocab_size is 10"),
        ({"corpus": "no/such/file", "vocab_size": 300}, "no/such/file"),
        ({"corpus": [3], "vocab_size": 300}, "int"),
        ({"corpus": ["x"], "vocab_size": 300, "ties": "random"}, "ties"),
        ({"corpus": ["x"], "vocab_size": 300, "min_frequency": 0}, "min_frequency"),
        ({"corpus": ["x"], "vocab_size": 300, "max_token_length": 0}, "max_token_length"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train(**arguments)


def test_corpus_not_utf8_refused_with_place(tmp_path):
    """A corpus that is not utf8 is refused with its place."""
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"fine so far, caf\xe9 not")
    with pytest.raises(ValueError, match=r"latin1\.txt is not valid UTF-8 at byte 16"):
        BPETokenizer.train(path, 300)


@pytest.mark.parametrize("native", ["1", "0"])
def test_long_work_says_how_far_it_is(tmp_path, monkeypatch, native):
    monkeypatch.setenv("WARPLOOM_NATIVE", native)
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path, text in zip(texts, ("so far, so good " * 500, "näher und näher " * 300)):
        path.write_text(text)
    size = sum(path.stat().st_size for path in texts)
    read, merged, encoded = [], [], []
    tokenizer = BPETokenizer.train(
        texts, 270, progress=lambda *at: merged.append(at), reading=lambda *at: read.append(at)
    )
    tokenizer.encode_file(texts[0], tmp_path / "ids", progress=lambda *at: encoded.append(at))
    assert read[-1] == (size, size) and merged[-1] == (13, 13)
    assert encoded[-1] == (texts[0].stat().st_size,) * 2
