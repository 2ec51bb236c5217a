"""`warploom tokenizer` on the command line."""

import numpy as np
import pytest

from warploom.engine.cli import main
from warploom.tokenizer import load_tokenizer


@pytest.fixture
def directory(tmp_path, samples):
    (tmp_path / "corpus.txt").write_bytes((samples["english"] * 4).encode())
    arguments = ["--corpus", str(tmp_path / "corpus.txt"), "--vocab-size", "320", "--out", str(tmp_path / "tok")]
    assert main(["tokenizer", "train", *arguments]) == 0
    return tmp_path / "tok"


def test_a_tokenizer_is_trained_shown_and_used(directory, capsys):
    tok = load_tokenizer(directory)
    assert tok.vocab_size == 320 and tok.pattern == "gpt4"
    ids = " ".join(map(str, tok.encode("the worst of times")))
    capsys.readouterr()
    assert main(["tokenizer", "encode", "--tokenizer", str(directory), "the worst of times"]) == 0
    assert capsys.readouterr().out.strip() == ids
    assert main(["tokenizer", "decode", "--tokenizer", str(directory), *ids.split()]) == 0
    assert capsys.readouterr().out == "the worst of times\n"
    assert main(["tokenizer", "show", "--tokenizer", str(directory)]) == 0
    assert "320 tokens" in capsys.readouterr().out
    assert main(["tokenizer", "show", "--tokenizer", str(directory), "the worst"]) == 0
    assert "' worst'" in capsys.readouterr().out


def test_a_file_becomes_a_token_file(directory, capsys):
    corpus, out = directory.parent / "corpus.txt", directory.parent / "corpus.bin"
    assert main(["tokenizer", "encode", "--tokenizer", str(directory), "--file", str(corpus), "--out", str(out)]) == 0
    tok = load_tokenizer(directory)
    assert np.fromfile(out, dtype="<u2").tolist() == tok.encode(corpus.read_bytes().decode())
    capsys.readouterr()
    assert main(["tokenizer", "decode", "--tokenizer", str(directory), "--file", str(out)]) == 0
    assert capsys.readouterr().out[:-1] == corpus.read_bytes().decode()


@pytest.mark.parametrize("kind", ["char", "word"])
def test_other_kinds_are_trained_too(kind, directory):
    corpus, out = directory.parent / "corpus.txt", directory.parent / kind
    assert main(["tokenizer", "train", "--corpus", str(corpus), "--kind", kind, "--out", str(out)]) == 0
    assert load_tokenizer(out).kind == kind


def test_mistakes_are_one_line_and_exit_2(directory, capsys):
    (directory / "odd.bin").write_bytes(b"\1\0\2")
    for arguments in (
        ["tokenizer", "sing"],
        ["tokenizer", "encode", "--tokenizer", "nowhere", "x"],
        ["tokenizer", "train", "--corpus", "nowhere.txt", "--out", str(directory)],
        ["tokenizer", "decode", "--tokenizer", str(directory), "999999"],
        ["tokenizer", "encode", "--tokenizer", str(directory), "--file", "x"],
        ["tokenizer", "decode", "--tokenizer", str(directory), "--file", str(directory / "odd.bin")],
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("warploom tokenizer:") and error.count("\n") == 1
