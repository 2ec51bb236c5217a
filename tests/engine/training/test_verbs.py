"""The verbs train, data and eval, as typed."""

import dataclasses
import json
import os
import re

import pytest

from warploom.engine.cli import main
from warploom.engine.cli.flags import RENAMED
from warploom.engine.cli.train import read
from warploom.engine.data import TokenData
from warploom.engine.training import train
from warploom.tokenizer import CharTokenizer

SHAPE = {"d-model": 16, "n-layers": 1, "n-heads": 2, "n-kv-heads": 1, "max-seq-len": 16}
TINY = [f"--{name}={value}" for name, value in {**SHAPE, "batch-size": 2, "sample-tokens": 0}.items()]


def test_text_file_to_dataset_to_model_to_loss(story, tmp_path, capsys):
    """A text file becomes a dataset a model and a number."""
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    assert main(["data", "--source", "file", "--files", str(story), "--tokenizer", "char", "--out", data]) == 0
    assert set(TokenData(data).meta.splits) == {"train", "val", "test"}
    assert main(["train", data, "--out", out, "--steps", "4", "--device", "cpu", "--dtype", "float32", *TINY]) == 0
    assert main(["eval", out, data, "--split", "test", "--device", "cpu", "--dtype", "float32"]) == 0
    assert main(["eval", out, str(story), "--limit", "2", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("bits per byte") == 3 and "val:" in shown
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["model"]["d_model"] == 16 and run["config"]["steps"] == 4


def test_flags_override_file_overrides_preset(tmp_path):
    """Flags override the file which overrides the preset."""
    (tmp_path / "run.toml").write_text('data = "x"\npreset = "gpt2-124m"\nn_layers = 3\nlr = 0.5\nsteps = 7\n')
    config = read(["--config", str(tmp_path / "run.toml"), "--lr", "0.25", "--from", "base"])
    assert (config.data, config.lr, config.steps, config.init_from) == ("x", 0.25, 7, "base")
    assert config.model["n_layers"] == 3 and config.model["norm"] == "layernorm" and config.model["d_model"] == 768
    scaled = read(["x", "--rope-scaling", '{"rope_type": "linear", "factor": 2.0}'])
    assert scaled.model["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_train_old_names_warn(tmp_path, capsys):
    """Flags and files from before the renaming are read under today's names."""
    old = {new: f"--{old}".replace("_", "-") for old, new in RENAMED.items()}
    (tmp_path / "run.toml").write_text('data = "x"\nclip = 0.5\n')
    flags = [old["activation_checkpointing"], old["max_nonfinite_steps"] + "=3"]
    config = read(["--config", str(tmp_path / "run.toml"), *flags])
    assert (config.max_grad_norm, config.activation_checkpointing, config.max_nonfinite_steps) == (0.5, True, 3)
    assert f"{flags[0]} is now --activation-checkpointing" in capsys.readouterr().err


def test_resume_needs_no_flag_takes_given(story, tmp_path, capsys):
    """Resuming needs no flag again and takes those that are given."""
    out = ["--out", str(tmp_path / "run")]
    first = read([str(story), *out, "--steps", "2", "--tokenizer", "char", "--lr", "0.01", "--device", "cpu", *TINY])
    train(first)
    assert read([*out, "--resume"]) == dataclasses.replace(first, resume=True, device="auto")
    longer = read([*out, "--resume", "--epochs", "3", "--lr", "0.02"])
    assert (longer.steps, longer.epochs, longer.lr, longer.model) == (None, 3, 0.02, first.model)
    assert main(["train", *out, "--resume", "--steps", "3", "--device", "cpu"]) == 0
    assert "resuming from" in capsys.readouterr().err
    for other in (["--preset", "gpt2-124m"], ["--n-layers", "2"]):
        assert main(["train", *out, "--resume", *other, "--device", "cpu"]) == 2
        assert "resume with the same architecture" in capsys.readouterr().err


def test_resume_with_other_text_or_tokenizer_is_refused(story, tmp_path, capsys):
    """A folder, a built-in corpus or a tokenizer that the run was not made of; a text that has changed is told."""
    (tmp_path / "texts").mkdir()
    novel = tmp_path / "novel.txt"
    novel.write_text(story.read_text())
    run = ["train", "--out", str(tmp_path / "run"), "--device", "cpu", *TINY]
    assert main([*run, "--resume", "--steps", "2"]) == 2
    assert "run holds no checkpoint to resume: give the data" in capsys.readouterr().err
    assert main([*run, str(novel), "--resume", "--steps", "2", "--tokenizer", "char"]) == 0
    for other in (str(tmp_path / "texts"), "stdlib"):
        assert main([*run, other, "--resume", "--steps", "3"]) == 2
        assert f"not of {other}: choose another out" in capsys.readouterr().err
    assert main([*run, "--resume", "--steps", "3", "--tokenizer", "bpe"]) == 2
    assert "was trained with tokenizer='char', not 'bpe'" in capsys.readouterr().err
    os.utime(novel, (4e9, 4e9))
    assert main([*run, "--resume", "--steps", "3"]) == 0
    assert "novel.txt has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "x", "--stepz", "3"], "--stepz"),
        (["train", "x", "--lr", "many"], "--lr must be a number, not 'many' (warploom train --help"),
        (["train", "x", "--steps", "many"], "--steps must be a whole number, not 'many' (warploom train --help"),
        (["train", "x", "--optimiser", "muon"], "--optimiser, muon; perhaps --optimizer (warploom train --help"),
        (["train"], "train: DATA is missing (warploom train --help"),
        (["train", "no-such-file.txt"], "no file matches 'no-such-file.txt'"),
        (["train", "x", "--rope-scaling", "linear"], "rope_scaling must be JSON"),
        (["train", "x", "--preset", "llama-9b"], "preset 'llama-9b' is not known"),
        (["data", "--out", "y"], "no files were given"),
        (["eval", "no-model", "x"], "no-model is not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith(f"warploom {argv[0]}: ")


@pytest.mark.parametrize("tokenizer", ["bpe", "own"])
def test_a_download_that_cannot_reach_the_hub_is_one_line(tokenizer, tmp_path, monkeypatch, capsys):
    def unplugged(*_):
        raise ConnectionError("Couldn't reach the hub")

    pytest.importorskip("datasets", reason="the data extra is not installed")
    monkeypatch.chdir(tmp_path)
    CharTokenizer.train(["abc"]).save(tmp_path / "own")
    monkeypatch.setattr("warploom.engine.data.hf_datasets.download", unplugged)
    assert main(["data", "--source", "tinystories", "--tokenizer", tokenizer, "--out", "y"]) == 2
    error = capsys.readouterr().err
    assert "Couldn't reach the hub; the same command goes on" in error and "Traceback" not in error


def test_a_dataset_of_another_tokenizer_is_refused(story, tmp_path, capsys):
    for kind in ("char", "word"):
        data = str(tmp_path / kind)
        assert main(["data", "--files", str(story), "--tokenizer", kind, "--out", data]) == 0
    out = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "char"), "--out", out, "--steps", "1", "--device", "cpu", *TINY]) == 0
    capsys.readouterr()
    assert main(["eval", out, str(tmp_path / "word")]) == 2
    assert main(["train", str(tmp_path / "word"), "--from", out, "--out", str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.count("another tokenizer") == 2


def test_text_unknown_to_the_tokenizer_is_told(story, tmp_path, capsys):
    """A character tokenizer of one script reads nothing of another: the share is on the line of the token counts."""
    novel = tmp_path / "novel.txt"
    novel.write_text("學而時習之，不亦說乎？\n" * 50)
    flags = ["--steps", "1", "--device", "cpu", *TINY]
    assert main(["train", str(novel), "--tokenizer", "char", "--out", str(tmp_path / "a"), *flags]) == 0
    assert "% are unknown" not in capsys.readouterr().err
    assert main(["train", str(story), "--tokenizer", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *flags]) == 0
    assert re.search(r"; (9\d|100)% are unknown to its tokenizer", capsys.readouterr().err)


def test_foreign_tokenizers_read_where_asked(tmp_path):
    """Tokenizers of others are read where a tokenizer is asked for."""
    from warploom.engine.training.inputs import make_tokenizer
    from warploom.tokenizer import BPETokenizer

    text = "low lower lowest newer newest wider " * 20
    ours = BPETokenizer.train([text], 270, pattern="gpt4")
    ours.save(tmp_path / "ours")
    ours.to_tiktoken(tmp_path / "ours.tiktoken")
    for source in (tmp_path / "ours", tmp_path / "ours" / "tokenizer.json", tmp_path / "ours.tiktoken"):
        assert make_tokenizer(str(source), [], 0, print).encode(text) == ours.encode(text)
    with pytest.raises(ValueError, match="not bpe, char or word, and nowhere is not a directory"):
        make_tokenizer("nowhere", [], 0, print)
