"""Pipelines of published tokenizers: small ones made with `tokenizers`, which is also the judge.

With WARPLOOM_TOKENIZERS=DIR, each directory in DIR that holds a tokenizer.json is fuzzed too.
"""

import base64
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from warploom.tokenizer import PATTERNS, BPETokenizer, load_tokenizer
from warploom.tokenizer.metaspace import WHOLE_TEXT

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre  # noqa: E402

BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
WORDS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RUNS = [AddedToken(" " * n, normalized=True, special=False) for n in (24, 8, 4, 3, 2)]
LINES = [AddedToken("\n" * n, normalized=False, special=False) for n in (3, 2)]
COMPOSED = [*(AddedToken(text, normalized=False) for text in ("<a", "K>")), AddedToken("e\u0301!", normalized=True)]
STRIPPING = [
    AddedToken("<|left|>", lstrip=True, normalized=False, special=True),
    AddedToken("<|right|>", rstrip=True, normalized=False, special=True),
    AddedToken("<|both|>", lstrip=True, rstrip=True, normalized=False),
]


def split(pattern: str, behavior: str = "isolated") -> pre.Split:
    return pre.Split(Regex(pattern) if len(pattern) > 1 else pattern, behavior)


FALCON = pre.Sequence(
    [pre.Punctuation("contiguous"), GPT2, pre.Digits(individual_digits=False), split("[0-9][0-9][0-9]")]
)
BYTE_LEVEL = {
    "gpt2": dict(pre=GPT2),
    "digits one by one": dict(pre=pre.Sequence([pre.Digits(individual_digits=True), GPT2])),
    "digits": dict(pre=pre.Sequence([pre.Digits(individual_digits=False), GPT2])),
    "punctuation": dict(pre=pre.Sequence([pre.Punctuation("isolated"), GPT2])),
    "runs of punctuation": dict(pre=pre.Sequence([pre.Punctuation("contiguous"), GPT2])),
    "three splits": dict(pre=pre.Sequence([split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(WORDS), BYTES])),
    "digits of bytes": dict(pre=FALCON),
    "merged with previous": dict(pre=pre.Sequence([split(" ", "merged_with_previous"), BYTES])),
    "merged with next": dict(pre=pre.Sequence([split(" ", "merged_with_next"), BYTES])),
    "one piece": dict(pre=BYTES),
    "NFC and runs of spaces": dict(pre=GPT2, normalizer=normalizers.NFC(), added=RUNS),
    "NFC and composed tokens": dict(pre=GPT2, normalizer=normalizers.NFC(), added=COMPOSED),
    "compatibility": dict(pre=GPT2, normalizer=normalizers.NFKC()),
    "missing bytes": dict(pre=GPT2, alphabet=sorted(pre.ByteLevel.alphabet())[5:200:2]),
    "white space taken along": dict(pre=GPT2, added=STRIPPING),
    "many added": dict(pre=GPT2, added=[f"<unused{i}>" for i in range(3000)] + ["\n\n", "\n\n\n", "the", "你"]),
}


def make(corpus, *, pre, normalizer=None, added=(), alphabet=None) -> Tokenizer:
    """A byte-level tokenizer of `tokenizers`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    letters = sorted(GPT2.alphabet()) if alphabet is None else alphabet
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=["<s>"],
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


PREPEND = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
REPLACED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIPPED = [*REPLACED, decoders.Strip(" ", 1, 0)]
BY_METASPACE = [decoders.ByteFallback(), decoders.Metaspace("▁", "always")]


def metaspace(scheme: str) -> pre.Metaspace:
    return pre.Metaspace("▁", prepend_scheme=scheme, split=False)


LLAMA = [AddedToken(name, normalized=True, special=True) for name in ("<s>", "</s>", "<u>")]
PIECES = {
    "prepend": dict(normalizer=PREPEND, decoder=STRIPPED),
    "prepend, normalized tokens": dict(normalizer=PREPEND, decoder=STRIPPED, added=LLAMA),
    "prepend, tokens that strip": dict(normalizer=PREPEND, decoder=STRIPPED, added=STRIPPING),
    "no prefix": dict(normalizer=PREPEND[1:], decoder=REPLACED, added=[*LINES, AddedToken("▁▁", normalized=False)]),
    "never matching split": dict(normalizer=PREPEND[1:], decoder=REPLACED, pre=split(" ", "merged_with_previous")),
    "replaced string": dict(normalizer=[normalizers.Replace("<!p!>", "▁"), PREPEND[1]], decoder=BY_METASPACE),
    "metaspace always": dict(pre=metaspace("always"), decoder=STRIPPED, added=STRIPPING),
    "metaspace first": dict(pre=metaspace("first"), decoder=STRIPPED, added=LLAMA),
    "metaspace never": dict(pre=metaspace("never"), decoder=REPLACED),
    "NFKC": dict(normalizer=[normalizers.NFKC(), *PREPEND], decoder=STRIPPED),
    "merges across spaces": dict(normalizer=PREPEND, decoder=STRIPPED, across=True),
}


def make_pieces(corpus, *, decoder, normalizer=(), pre=None, added=(), across=False) -> Tokenizer:
    """A SentencePiece-like BPE of `tokenizers`, with a token for each byte."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(PREPEND)
    tokenizer.pre_tokenizer = None if across else pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=90
    )
    tokenizer.train_from_iterator([line + " > </a > x" for text in corpus for line in text.split("\n")], trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["vocab"] |= {f"<0x{byte:02X}>": len(data["model"]["vocab"]) + byte for byte in range(256)}
    data["normalizer"] = data["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if normalizer:
        tokenizer.normalizer = normalizers.Sequence(list(normalizer))
    if pre:
        tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.Sequence(decoder)
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = processors.TemplateProcessing("<s> </s> $A", special_tokens=[("<s>", 1), ("</s>", 2)])
    return tokenizer


def check_same(ours, theirs: Tokenizer, texts: list[str]) -> None:
    """Ids with special tokens allowed and not, in every way to ask for them; offsets; text back."""
    for text in texts:
        theirs.encode_special_tokens = False
        assert ours.encode(text, "all") == theirs.encode(text, add_special_tokens=False).ids
        theirs.encode_special_tokens = True
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.encode_array(text).tolist() == ids and ours.count(text) == len(ids)
        assert list(ours.encode_iterable(text[i : i + 5] for i in range(0, len(text), 5))) == ids
        assert ours.encode_with_offsets(text)[0] == ids
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)
        if "\ufffd" not in theirs.decode(ids, skip_special_tokens=False):
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    theirs.encode_special_tokens = False
    assert ours.encode_batch(texts, "all") == [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]


def mix(texts, noise, added: list[str], seed: int, count: int) -> list[str]:
    """Random texts in which added tokens stand about."""
    draw = random.Random(seed)
    words = [*added[:40], "don't ", "  ", "\n\n", "1234 ", "你好", "e\u0301 ", " x", "!?", "\x04", "Ångström "]
    words += ["e\u0301!", "\u0338", "\u0301", "\u212a>", "<\u0338a"]
    mixed = ["".join(draw.choices(words, k=draw.randrange(1, 9))) for _ in range(count)]
    return [*mixed, *(noise(seed + i, 60) for i in range(count)), *texts]


@pytest.mark.parametrize("twin", [False, True], ids=["native", "twin"])
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_pipeline_ids_equal(name, twin, corpus, texts, noise, tmp_path, monkeypatch):
    theirs = make(corpus, **BYTE_LEVEL[name])
    theirs.save(str(tmp_path / "tokenizer.json"))
    if twin:
        monkeypatch.setenv("WARPLOOM_NATIVE", "0")
    ours = load_tokenizer(tmp_path)
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    check_same(ours, theirs, mix(texts, noise, added, seed=1, count=60))
    assert ours.prefix_ids == [0]


@pytest.mark.parametrize("twin", [False, True], ids=["native", "twin"])
@pytest.mark.parametrize("name", PIECES)
def test_sentencepiece_pipeline_ids_equal(name, twin, corpus, texts, noise, tmp_path, monkeypatch):
    theirs = make_pieces(corpus, **PIECES[name])
    theirs.save(str(tmp_path / "tokenizer.json"))
    if twin:
        monkeypatch.setenv("WARPLOOM_NATIVE", "0")
    ours = load_tokenizer(tmp_path)
    assert ours.pattern == (WHOLE_TEXT if PIECES[name].get("across") else "spaces")
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    words = [*added, "▁", " ▁▁", "<!p!>", "> ", "</a > x", "ü"]
    check_same(ours, theirs, mix(texts, noise, words, seed=4, count=100))
    assert ours.prefix_ids == [1, 2]


@pytest.mark.parametrize("name", PIECES)
def test_sentencepiece_stream_keeps_spaces(name, corpus, texts, noise, tmp_path):
    """A text cut into blocks, or into files' blocks, gets its space in front once, and after added tokens."""
    theirs = make_pieces(corpus, **PIECES[name])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    text = "".join(mix(texts, noise, ["<s>", " </s> ", "<|right|>  ", "▁"], seed=5, count=300)) + "word, " * 30_000
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, "all") == expected
    assert ours.encode_array(text, "all", threads=3).tolist() == expected
    if ours.pattern == "spaces":
        assert list(ours.encode_iterable((text[i : i + 777] for i in range(0, len(text), 777)), "all")) == expected
        (tmp_path / "text").write_bytes(text.encode())
        for block in (3000, 1 << 20):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warploom.tokenizer.native._BLOCK", block)
                ours.encode_file(tmp_path / "text", tmp_path / "ids", allowed_special="all")
            assert np.fromfile(tmp_path / "ids", "<u2").tolist() == expected


def test_stream_that_continues_keeps_its_first_space(corpus, tmp_path):
    make_pieces(corpus, **PIECES["prepend"]).save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    ids = ours.encode("the times")
    for continues, expected in ((False, "the times"), (True, " the times")):
        stream = ours.stream(continues=continues)
        assert "".join(map(stream.push, ids)) + stream.finish() == expected


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *PIECES])
def test_loaded_pipeline_is_saved_verbatim(name, corpus, texts, tmp_path):
    theirs = make(corpus, **BYTE_LEVEL[name]) if name in BYTE_LEVEL else make_pieces(corpus, **PIECES[name])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    ours.add_special_tokens(["<|new|>"])
    ours.save(tmp_path / "again")
    before, after = (json.loads((tmp_path / part / "tokenizer.json").read_text("utf-8")) for part in (".", "again"))
    for stage in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert after[stage] == before[stage]
    assert after["added_tokens"][:-1] == before["added_tokens"] and after["model"]["vocab"] == before["model"]["vocab"]
    theirs.add_special_tokens([AddedToken("<|new|>", normalized=False, special=True)])
    again = Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    for text in [*texts, "a<|new|>b"]:
        expected = theirs.encode(text).ids
        assert again.encode(text).ids == expected
        assert load_tokenizer(tmp_path / "again").encode(text, "all") == expected[len(ours.prefix_ids) :]


def test_long_text_with_added_tokens_is_cut_rightly(corpus, texts, noise, tmp_path):
    theirs = make(corpus, pre=GPT2, added=[*STRIPPING, *LINES])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    text = "".join(mix(texts, noise, ["<|left|>", " <|right|> \n ", "<s>", "  "], seed=3, count=400)) * 3
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, "all") == expected
    assert ours.encode_array(text, "all", threads=3).tolist() == expected
    assert list(ours.encode_iterable((text[i : i + 777] for i in range(0, len(text), 777)), "all")) == expected
    (tmp_path / "text").write_bytes(text.encode())
    assert ours.encode_file(tmp_path / "text", tmp_path / "ids", allowed_special="all") == len(expected)


def test_tokens_of_two_rounds_that_overlap_are_refused(corpus, tmp_path):
    for other in (AddedToken(" b>", normalized=False), AddedToken("|", lstrip=True, normalized=False)):
        added = [other, AddedToken("<a ", normalized=True)]
        make(corpus, pre=GPT2, added=added).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="'<a ' is normalized and may overlap"):
            load_tokenizer(tmp_path)


SPM = dict(model_type="bpe", vocab_size=600, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
           remove_extra_whitespaces=False, user_defined_symbols=["<|user|>"])  # fmt: skip


@pytest.fixture
def spm(corpus, tmp_path):
    """Write a SentencePiece model that was trained with some options changed."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer

    def train(**changes) -> Path:
        path = tmp_path / "tokenizer.model"
        with open(path, "wb") as file:
            lines = iter([line for text in corpus for line in text.split("\n")])
            trainer.train(sentence_iterator=lines, model_writer=file, **{**SPM, **changes})
        return path

    return train


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizer_model_ids_equal(prefix, spm, texts, noise, tmp_path):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spm(add_dummy_prefix=prefix)))
    ours = load_tokenizer(tmp_path)
    assert ours.prefix_ids == [theirs.bos_id()] and ours.eos_id == theirs.eos_id()
    for text in mix(texts, noise, [], seed=4, count=100):
        text = text.replace("\0", "")  # which that library takes for the end
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    ours.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    for text in texts:
        assert again.encode(text) == ours.encode(text)


@pytest.mark.parametrize("changes, refused", [
    (dict(model_type="unigram", vocab_size=480), "model_type is 1; only 2, BPE"),
    (dict(normalization_rule_name="nmt_nfkc"), "normalizer_spec.name is 'nmt_nfkc'"),
    (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces is true"),
    (dict(byte_fallback=False), "vocab lacks a token for the byte"),
])  # fmt: skip
def test_tokenizer_model_unknown_kind_is_refused(changes, refused, spm):
    with pytest.raises(ValueError, match=refused):
        load_tokenizer(spm(**changes))


def test_tokenizer_model_broken_is_refused(spm):
    path = spm()
    whole = path.read_bytes()
    for data in (
        b"",
        whole[:-7],
        whole[: len(whole) // 2],
        b"\x0a\xff\xff\xff\xff\x0fx",
        b"\xff" * 99,
        b"\x0a\x02\x0a\x05",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"tokenizer\.model"):
            load_tokenizer(path)


def test_tekken_ids_equal_tiktokens(corpus, texts, noise, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    tok = BPETokenizer.train(corpus, 500, pattern="tekken", special_tokens=())
    ranks = sorted(tok.vocab.items(), key=lambda item: item[1])
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for token, rank in ranks]
    config = dict(pattern=PATTERNS["tekken"], default_vocab_size=480, default_num_special_tokens=30)
    (tmp_path / "tekken.json").write_text(json.dumps(dict(config=config, vocab=vocab)))
    ours = load_tokenizer(tmp_path)
    theirs = tiktoken.Encoding("t", pat_str=config["pattern"], mergeable_ranks=dict(ranks[:450]), special_tokens={})
    for text in mix(texts, noise, [], seed=5, count=60):
        assert ours.encode(text) == [rank + 30 for rank in theirs.encode_ordinary(text)]
    assert ours.encode("[INST]<SPECIAL_29>", "all") == [3, 29] and ours.prefix_ids == [1]
    (tmp_path / "tekken.json").write_text(json.dumps(dict(config=config, vocab=vocab[:9])))
    with pytest.raises(ValueError, match="all 256 bytes"):
        load_tokenizer(tmp_path)


PUBLISHED = sorted(Path(os.environ.get("WARPLOOM_TOKENIZERS", "-")).glob("*/tokenizer.json"))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_published_tokenizer_ids_equal(file, texts, noise):
    theirs = Tokenizer.from_file(str(file))
    try:
        ours = load_tokenizer(file)
    except ValueError as error:
        pytest.skip(f"refused: {error}")
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    random.Random(0).shuffle(added)
    check_same(ours, theirs, mix(texts, noise, added, seed=2, count=1000))
