"""What BPETokenizer promises, against `tiktoken` and `tokenizers` as independent judges."""

import base64
import copy
import json
import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.tokenizer import PATTERNS, BPETokenizer, load_tokenizer

tiktoken = pytest.importorskip("tiktoken")
tokenizers = pytest.importorskip("tokenizers")


def as_tiktoken(tok: BPETokenizer) -> "tiktoken.Encoding":
    return tiktoken.Encoding(
        "test", pat_str=PATTERNS[tok.pattern], mergeable_ranks=tok.vocab, special_tokens=tok.special_tokens
    )


def test_ids_equal_tiktokens_and_hugging_faces(tok, tmp_path, texts, noise):
    tok.save(tmp_path)
    peer, hugging = as_tiktoken(tok), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*texts, *(noise(seed, 200) for seed in range(50))]:
        ids = tok.encode(text)
        assert ids == peer.encode_ordinary(text)
        assert ids == hugging.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids) == text


def test_ids_equal_tiktoken_and_tokenizers(tok, tmp_path):
    """Ids equal tiktokens and hugging faces on any text."""
    tok.save(tmp_path)
    peer, hugging = as_tiktoken(tok), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    @settings(max_examples=300)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def check(text):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        # The oracles carry Unicode tables of other versions; on what Unicode 3.2 knew, all agree.
        known = "".join(c for c in text if unicodedata.ucd_3_2_0.category(c) != "Cn")
        assert tok.encode(known) == peer.encode_ordinary(known)
        assert tok.encode(known, allowed_special="all") == hugging.encode(known, add_special_tokens=False).ids

    check()


def test_every_way_to_encode_gives_the_same_ids(tok, tmp_path, texts):
    batch = tok.encode_batch(texts, threads=2)
    flat, offsets = tok.encode_batch_array(texts, threads=2)
    for i, text in enumerate(texts):
        ids = tok.encode(text)
        array = tok.encode_array(text)
        assert array.dtype == np.uint16 and array.tolist() == ids == batch[i]
        assert flat[offsets[i] : offsets[i + 1]].tolist() == ids
        assert tok.count(text) == len(ids)
        path, out = tmp_path / "text", tmp_path / "ids"
        path.write_bytes(text.encode())
        assert tok.encode_file(path, out) == len(ids)
        assert np.fromfile(out, dtype="<u2").tolist() == ids
        pieces = [text[j : j + 7] for j in range(0, len(text), 7)]
        assert list(tok.encode_iterable(pieces)) == ids


def test_a_stream_may_be_cut_anywhere(tok, texts):
    text = "".join(texts) * 40
    assert list(tok.encode_iterable(text[i : i + 999] for i in range(0, len(text), 999))) == tok.encode(text)


def test_offsets_are_the_characters_a_token_touches(tok, texts):
    for text in texts:
        ids, spans = tok.encode_with_offsets(text)
        assert ids == tok.encode(text) and len(spans) == len(ids)
        for token_id, (start, end) in zip(ids, spans):
            assert tok.token_bytes(token_id) in text[start:end].encode()


def test_text_never_injects_a_special_token(tok):
    text = "a<|endoftext|>b"
    end = tok.special_tokens["<|endoftext|>"]
    assert end not in tok.encode(text) and tok.decode(tok.encode(text)) == text
    assert tok.encode(text, allowed_special="all") == [*tok.encode("a"), end, *tok.encode("b")]
    assert tok.encode(text, allowed_special={"<|end|>"}) == tok.encode(text)
    assert list(tok.encode_iterable(text, allowed_special="all")) == tok.encode(text, allowed_special="all")
    with pytest.raises(ValueError, match="nope"):
        tok.encode(text, allowed_special={"nope"})


def test_the_longest_special_token_wins(corpus):
    tok = BPETokenizer.train(corpus, 300, special_tokens=("<a>", "<a><b>", "<b>"))
    a, ab, b = (tok.special_tokens[name] for name in ("<a>", "<a><b>", "<b>"))
    assert tok.encode("<a><b><a><a><b><b>", allowed_special="all") == [ab, a, ab, b]


def test_added_special_tokens_come_last(tok):
    """Added special tokens come last and keep other ids."""
    fresh = BPETokenizer(tok.vocab, tok.merges, tok.special_tokens, tok.pattern)
    before = fresh.encode("hello world")
    assert fresh.add_special_tokens(["<|new|>", "<|end|>"]) == [tok.vocab_size, tok.special_tokens["<|end|>"]]
    assert fresh.encode("hello world") == before
    assert fresh.encode("<|new|>", allowed_special="all") == [tok.vocab_size]
    assert fresh.decode([tok.vocab_size]) == "<|new|>"


def test_unknown_ids_are_refused(tok):
    for bad in (tok.vocab_size, -1, 1 << 40):
        with pytest.raises(ValueError, match=str(bad)):
            tok.decode([5, bad])
    with pytest.raises(ValueError, match="surrogates"):
        tok.encode("a\ud800b")


def test_pushes_joined_equal_decode(tok):
    @settings(max_examples=300)
    @given(st.lists(st.integers(0, tok.vocab_size - 1), max_size=40))
    def check(ids):
        stream = tok.stream()
        pushed = [stream.push(token_id) for token_id in ids]
        assert "".join(pushed) + stream.finish() == tok.decode(ids)

    check()


def test_a_stream_holds_back_half_a_character(tok):
    stream = tok.stream()
    emoji = [tok.vocab[bytes([byte])] for byte in "👍".encode()]
    assert [stream.push(token_id) for token_id in emoji] == ["", "", "", "👍"]
    assert stream.push(emoji[0]) == "" and stream.finish() == "�"


def test_saving_and_loading_changes_nothing(tok, tmp_path):
    tok.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.vocab, again.merges, again.special_tokens) == (tok.vocab, tok.merges, tok.special_tokens)
    assert again.pattern == tok.pattern
    assert again.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<|endoftext|>"
    tok.to_tiktoken(tmp_path / "ranks")
    ranked = BPETokenizer.from_tiktoken(tmp_path / "ranks", tok.pattern, tok.special_tokens)
    assert (ranked.vocab, ranked.merges) == (tok.vocab, tok.merges)
    tok.chat_template = None


def test_tiktoken_unreachable_tokens_follow_tiktoken(tmp_path):
    """A rank file with tokens no merge reaches is followed as tiktoken does."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256, b"de": 257, b"def": 258, b"ef": 259}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (tmp_path / "ranks").write_text("".join(lines))
    tok = BPETokenizer.from_tiktoken(tmp_path / "ranks", "gpt4")
    peer = tiktoken.Encoding("test", pat_str=PATTERNS["gpt4"], mergeable_ranks=ranks, special_tokens={})
    for text in ("abc", " abc", "abcdef abc", "def ef defef deef"):
        assert tok.encode(text) == peer.encode(text)


def test_tokenizer_copies_and_pickles_equal(tok):
    """Copies and other processes get the same tokenizer."""
    for copied in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok))):
        assert copied.encode("it's a copy") == tok.encode("it's a copy") and copied.vocab == tok.vocab


def test_gpt2_files_load(tok, tmp_path):
    tok.save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), "utf-8")
    again = BPETokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt", pattern=tok.pattern)
    assert (again.vocab, again.merges) == (tok.vocab, tok.merges)
    assert again.special_tokens == {"<|endoftext|>": len(tok.vocab)}


def test_a_pattern_of_ones_own_loses_no_text(corpus, texts):
    tok = BPETokenizer.train(corpus, 400, pattern=r"\w+")
    for text in texts:
        assert tok.decode(tok.encode(text)) == text
        assert list(tok.encode_iterable(text)) == tok.encode(text)
    with pytest.raises(ValueError, match="regular expression"):
        BPETokenizer.train(corpus, 400, pattern="(")


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DOTS = {"type": "Split", "pattern": {"Regex": "[.]"}, "behavior": "Isolated"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "model.type"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model.type"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"normalizer": {"type": "Prepend", "prepend": "_"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "add_prefix_space"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES, {"type": "Digits"}, DOTS]}},
            "behind ByteLevel",
        ),
        ({"added_tokens": [{"id": 9999, "content": "<m>", "single_word": True}]}, "single_word"),
        ({"model": {"type": "BPE"}}, "vocab"),
    ],
)
def test_tokenizer_json_unknown_stage_refused(tok, tmp_path, change, field):
    """A file we cannot follow exactly is refused by field."""
    tok.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "odd.json").write_text(json.dumps({**data, **change}), "utf-8")
    with pytest.raises(ValueError, match=field):
        load_tokenizer(tmp_path / "odd.json")


@pytest.mark.parametrize(
    ("merge", "says"),
    [(["", "a"], "not two tokens"), (["a"], "not two tokens"), ("a b c", "not two tokens"), (["a", "\u00e9"], "lacks")],
)
def test_tokenizer_json_merge_without_sense_refused(tok, tmp_path, merge, says):
    """Among them one that makes what it is made of: merging would never end."""
    tok.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    data["model"]["merges"].append(merge)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ValueError, match=rf"tokenizer.json: model.merges has .*{says}"):
        load_tokenizer(tmp_path)


def test_a_normalizer_is_applied(tok, tmp_path, texts):
    composed = BPETokenizer(tok.vocab, tok.merges, tok.special_tokens, tok.pattern, normalizer="NFC")
    composed.save(tmp_path)
    hugging = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("e\u0301 caf\u0065\u0301", "Å", *texts):
        assert load_tokenizer(tmp_path).encode(text) == hugging.encode(text, add_special_tokens=False).ids
