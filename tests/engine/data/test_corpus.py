import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.engine.data.corpus import cut
from warploom.engine.data.sources import files, open_corpus, stdlib


def texts(source):
    return ["".join(blocks) for blocks in source.read()]


def test_corpus_reads_text_jsonl_gzip_globs(tmp_path):
    """Text json lines gzip and globs are read as documents."""
    (tmp_path / "a.txt").write_text("first\r\n", newline="")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "second"}) + "\n\n" + json.dumps({"text": "third"}))
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("fourth")
    assert texts(files([tmp_path / "*"])) == ["first\r\n", "second", "third", "fourth"]
    assert texts(files([tmp_path])) == texts(files([tmp_path / "*"]))
    assert texts(files([tmp_path / "b.jsonl"], limit=1)) == ["second"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"text\0more", "is a binary file"),
        ("a.txt", b"\xff\xfe\x80", "not UTF-8"),
        ("a.jsonl", b'{"body": "x"}', "has? ?a field 'text'|with a field 'text'"),
        ("a.jsonl", b'{"text": 3}', "must be a string"),
        ("a.txt.gz", b"not gzip", "not a complete gzip"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_it(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        list(files([path]).passages())
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names_say_what_is_valid(tmp_path):
    with pytest.raises(ValueError, match="no file matches"):
        files([tmp_path / "*.txt"])
    with pytest.raises(ValueError, match="stdlib, file, tinystories"):
        open_corpus("moon")


def test_stdlib_corpus_is_large_and_ordered():
    """The standard library is a large corpus of python in a fixed order."""
    first, second = (texts(stdlib(limit=30)) for _ in range(2))
    assert first == second and len(first) == 30
    assert sum("import" in text for text in first) > 15
    assert sum(len(text) for text in texts(stdlib())) > 5_000_000


@settings(max_examples=60)
@given(st.text(alphabet="ab \n你.", max_size=300), st.integers(1, 40), st.integers(1, 50))
def test_cutting_loses_nothing_and_keeps_passages_short(text, size, block):
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    passages = list(cut(blocks, size))
    assert "".join(passages) == text
    assert all(0 < len(passage) <= 2 * size for passage in passages)


def test_passages_are_cut_before_words_that_begin_a_line():
    text = "def f():\n    return 1\n" * 50
    passages = list(cut([text], 100))
    assert len(passages) > 5
    assert all(passage.startswith("def") for passage in passages)


def test_documents_keep_place_copies_share_it(tmp_path):
    """Many documents keep their place and copies share it."""
    documents = [f"document {i % 60}" for i in range(120)]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    places = {}
    for passage in files([path]).passages():
        assert passage.ends
        assert places.setdefault(passage.text, passage.place) == passage.place
    assert len(set(places.values())) == 60


def test_one_long_document_is_split_by_position(tmp_path):
    (tmp_path / "novel.txt").write_text("".join(f"line {i}\n" for i in range(2000)))
    passages = list(files([tmp_path / "novel.txt"]).passages())
    places = [passage.place for passage in passages]
    assert places == sorted(places) and places[0] < 0.02 and places[-1] > 0.98
    assert [passage.ends for passage in passages] == [False] * (len(passages) - 1) + [True]


def test_splits_of_few_short_documents_stay_whole(tmp_path):
    """A few short documents stay whole and share out the splits among them."""
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document number {i} "}) for i in range(20)))
    passages = list(files([path]).passages())
    assert [passage.text for passage in passages] == [f"document number {i} " for i in range(20)]
    assert [sum(passage.place < edge for passage in passages) for edge in (0.5, 0.8, 0.9)] == [10, 16, 18]
