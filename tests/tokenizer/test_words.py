"""Character and word tokenizers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.tokenizer import CharTokenizer, WordTokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

NOVEL = "　　話說天下大勢，分久必合，合久必分。\n　　周末七國分爭，并入於秦。\n"


def test_a_chinese_novel_round_trips_by_characters(tmp_path):
    (tmp_path / "novel.txt").write_text(NOVEL, "utf-8")
    tok = CharTokenizer.train(tmp_path / "novel.txt")
    assert tok.decode(tok.encode(NOVEL)) == NOVEL
    assert len(tok.encode(NOVEL)) == len(NOVEL)
    assert tok.vocab_size == len(set(NOVEL)) + 2 and list(tok.vocab) == sorted(set(NOVEL))
    assert tok.encode("x") == [tok.special_tokens["<unk>"]] and tok.eos_id == tok.special_tokens["<|endoftext|>"]


def test_words_are_kept_by_frequency():
    tok = WordTokenizer.train(["The dog, the cat; the dog!"], vocab_size=7)
    assert tok.special_tokens == {"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3}
    assert list(tok.vocab) == ["the", "dog", "!"]
    assert tok.decode(tok.encode("THE dog barks")) == "the dog <unk>"
    assert WordTokenizer.train(["a a b"], 10, min_frequency=2).vocab == {"a": 4}
    assert WordTokenizer.train(["Aa"], 10, lowercase=False).vocab == {"Aa": 4}


@pytest.mark.parametrize("kind", ["char", "word", "Word"])
def test_saved_files_are_read_alike_by_hugging_face(kind, tmp_path, texts, samples):
    corpus = [samples["english"], samples["many"]]
    tok = CharTokenizer.train(corpus) if kind == "char" else WordTokenizer.train(corpus, 60, lowercase=kind == "word")
    tok.save(tmp_path)
    again, hugging = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert type(again) is type(tok)
    for text in [*texts, "ΑΣ, ΟΔΟΣ", NOVEL]:
        ids = tok.encode(text)
        assert again.encode(text) == ids == hugging.encode(text).ids
        assert tok.decode(ids) == again.decode(ids)


@pytest.mark.parametrize("kind", ["char", "word"])
def test_every_way_to_encode_gives_the_same_ids(kind, tmp_path, texts, samples):
    tok = CharTokenizer.train([samples["many"]]) if kind == "char" else WordTokenizer.train([samples["many"]], 100)
    for text in texts:
        ids = tok.encode(text)
        assert tok.encode_array(text).tolist() == ids and tok.count(text) == len(ids)
        (tmp_path / "text").write_bytes(text.encode())
        assert tok.encode_file(tmp_path / "text", tmp_path / "ids") == len(ids)
        assert list(tok.encode_iterable(text[i : i + 3] for i in range(0, len(text), 3))) == ids
        stream = tok.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tok.decode(ids)
        offset_ids, spans = tok.encode_with_offsets(text)
        assert offset_ids == ids and len(spans) == len(ids)


@settings(max_examples=100)
@given(st.lists(st.text(st.sampled_from("aΣσς İ.,\n你"), max_size=9), max_size=6))
def test_a_stream_of_words_may_be_cut_anywhere(pieces):
    tok = WordTokenizer.train(["".join(pieces) + " x"], 50)
    assert list(tok.encode_iterable(pieces)) == tok.encode("".join(pieces))


def test_wrong_ids_and_sizes_are_refused():
    tok = CharTokenizer.train(["abc"])
    with pytest.raises(ValueError, match="token id 5"):
        tok.decode([5])
    with pytest.raises(ValueError, match="vocab_size is 4"):
        WordTokenizer.train(["a"], 4)
    with pytest.raises(ValueError, match="surrogates"):
        tok.encode("\ud800")
