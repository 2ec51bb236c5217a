import itertools
import json
import tracemalloc

import numpy as np
import pytest

from warploom.engine.data import TokenData, text_of, write_token_data
from warploom.engine.data.corpus import Corpus
from warploom.engine.data.sources import files
from warploom.tokenizer.sources import unfinished


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"story number {i}. " * (1 + i % 7)}) for i in range(300)))
    return files([path])


def test_splits_hold_documents_once(tmp_path, stories, byte_tokenizer):
    """The splits hold every document once and share none."""
    data = write_token_data(stories, byte_tokenizer, tmp_path / "tokens", (0.6, 0.2, 0.2))
    documents = []
    for name in ("train", "val", "test"):
        split = data.split(name)
        pieces = np.split(np.asarray(split.tokens), split.starts[1:])
        assert all(piece[-1] == 256 and 256 not in piece[:-1] for piece in pieces)
        documents.append([bytes(piece[:-1].astype(np.uint8)).decode() for piece in pieces])
        assert split.bytes == sum(len(piece) - 1 for piece in pieces)
    assert sorted(itertools.chain(*documents)) == sorted("".join(blocks) for blocks in stories.read())
    assert 0.4 < len(documents[0]) / 300 < 0.8
    assert not set(documents[0]) & set(documents[1])


def test_training_text_equals_training_tokens(tmp_path, stories, byte_tokenizer):
    """The training text is what the training tokens hold."""
    data = write_token_data(stories, byte_tokenizer, tmp_path / "tokens")
    tokens = np.asarray(data.split("train").tokens)
    assert "".join(text_of(stories)).encode() == tokens[tokens != 256].astype(np.uint8).tobytes()


def test_a_novel_is_split_near_the_shares_asked_for(tmp_path, byte_tokenizer):
    (tmp_path / "novel.txt").write_text("".join(f"line {i}\n" for i in range(5000)))
    data = write_token_data(files([tmp_path / "novel.txt"]), byte_tokenizer, tmp_path / "tokens", (0.9, 0.1))
    train, val = len(data.split("train")), len(data.split("val"))
    assert abs(train / (train + val) - 0.9) < 0.01
    assert len(data.split("test")) == 0


def test_memory_stays_constant_while_the_corpus_grows(tmp_path, byte_tokenizer):
    def peak(documents):
        corpus = Corpus("generated", lambda: ([f"{i} " * 20_000] for i in range(documents)))
        tracemalloc.start()
        write_token_data(corpus, byte_tokenizer, tmp_path / f"tokens{documents}")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    assert peak(800) < 1.3 * peak(200)


def test_a_failure_leaves_the_old_directory_as_it_was(tmp_path, stories, byte_tokenizer):
    out = tmp_path / "tokens"
    write_token_data(stories, byte_tokenizer, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="binary"):
        (tmp_path / "bad.txt").write_bytes(b"ok\0")
        write_token_data(files([tmp_path / "bad.txt"]), byte_tokenizer, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_token_writer_killed_leaves_no_obstacle(tmp_path, stories, byte_tokenizer):
    """A writer that was killed is not in the way of a process of the same number."""
    out = tmp_path / "tokens"
    write_token_data(stories, byte_tokenizer, out)
    for left in (unfinished(out), unfinished(f"{out}.old")):
        left.mkdir()
        (left / "train.bin").write_text("half of")
    assert write_token_data(stories, byte_tokenizer, out).split("train").bytes > 100
    assert not list(tmp_path.glob(".*"))


def test_token_data_damaged_or_foreign_refused(tmp_path, stories, byte_tokenizer):
    """A damaged or foreign directory is refused in one sentence."""
    with pytest.raises(ValueError, match="no token directory"):
        TokenData(tmp_path)
    with pytest.raises(ValueError, match="no token directory"):
        write_token_data(stories, byte_tokenizer, tmp_path)
    out = tmp_path / "tokens"
    data = write_token_data(stories, byte_tokenizer, out)
    with pytest.raises(ValueError, match="'dev' is not in"):
        data.split("dev")
    (out / "train.bin").write_bytes((out / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="truncated"):
        data.split("train")
    (out / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        TokenData(out)


@pytest.mark.parametrize("splits", [(0.5, 0.1), (1.2, -0.2), (), (0.0, 1.0), (0.25,) * 4])
def test_shares_that_do_not_sum_to_one_are_refused(tmp_path, stories, byte_tokenizer, splits):
    with pytest.raises(ValueError, match="sum to 1"):
        write_token_data(stories, byte_tokenizer, tmp_path / "tokens", splits)
