"""The command line: quick to answer, clear when it cannot."""

import errno
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from warploom.engine.cli import available, main
from warploom.engine.config import PRESETS, ModelConfig
from warploom.engine.formats.gguf import save_gguf
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model
from warploom.engine.model import Transformer

SMALL = ModelConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)


@pytest.fixture
def directory(tmp_path):
    return save_model(Transformer(SMALL), tmp_path / "model")


def test_help_answers_without_importing_anything_heavy():
    code = (
        "import sys; from warploom.engine.cli import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'numpy', 'transformers', 'tyro', 'rich', 'gradio', 'warploom._native'};"
        "heavy = (heavy | {'warploom._tokenizer'}) & set(sys.modules);"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert all(verb in shown.stdout for verb in available())


def test_the_module_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "warploom.engine.cli", "inspect", "model", "gpt2-124m"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "124,439,808" in shown.stdout


@pytest.mark.parametrize("verb", sorted(available()))
def test_every_verb_explains_its_flags(verb, capsys):
    try:
        code = main([verb, "--help"])
    except SystemExit as left:  # how argparse ends a help text
        code = left.code
    assert code == 0
    assert "usage" in capsys.readouterr().out.lower()


MISTAKES = {
    "generate": "MODEL is missing: ",
    "eval": "MODEL and DATA are missing",
    "generate m --seed a": "--seed must be a whole number, not 'a'",
    "generate m --top-p a": "--top-p must be a number, not 'a'",
    "generate m --quantize int3": "--quantize must be fp8, int4 or int8, not 'int3'",
    "generate m --prompt": "--prompt needs a value",
    "generate m --promt x": "--promt, x; perhaps --prompt",
    "train x --steps": "argument --steps: expected one argument",
    "quantize": "the following arguments are required: model, --out",
    "inspect nothing": "invalid choice: 'nothing'",
    "bench kernels --nothing": "unrecognized arguments: --nothing",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_in_the_flags_is_one_sentence(line, capsys):
    assert main(line.split()) == 2
    told = capsys.readouterr().err
    assert MISTAKES[line] in told and told.count("\n") == 1 and f"(warploom {line.split()[0]}" in told, told


WRONG_FILES = {
    "generate MODEL --prompts-file FOLDER": "FOLDER is a directory: a file is needed there",
    "generate MODEL --prompts-file NONE": "NONE does not exist",
    "generate MODEL --prompts-file EMPTY": "EMPTY holds no prompt",
    "data --files TEXT --tokenizer char --out EMPTY": "EMPTY is a file; token files are written to a directory",
    "tokenizer train --corpus TEXT --out EMPTY": "EMPTY exists already and is a file: a directory is needed there",
    "tokenizer train --corpus EMPTY --out new": "EMPTY is empty: there is no text to train on",
    "tokenizer decode --tokenizer MODEL x": "the arguments cannot be 'x'",
    "train FOLDER --out new": "FOLDER is a folder without files",
    "bench chart --results FOLDER": "train.json has no 'llama-24m float32 compiled'",
}


@pytest.mark.parametrize("line", WRONG_FILES)
def test_a_wrong_file_is_one_sentence(line, directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "TEXT").write_text("the loom weaves\n" * 9)
    assert main([str(directory) if word == "MODEL" else word for word in line.split()]) == 2
    told = capsys.readouterr().err
    assert WRONG_FILES[line] in told and told.count("\n") == 1


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    """Named as the user named it, not by the name that an unfinished file has."""
    from warploom.engine.cli import doctor

    def fill(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/.model.77.partial/model.safetensors")

    monkeypatch.setattr(doctor, "run", fill)
    assert main(["doctor"]) == 2
    assert "doctor: runs/model/model.safetensors does not fit on the disk: make room" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("verb", ["generate", "eval", "train", "rl", "ladder", "data", "serve", "tokenizer train"])
def test_help_breaks_lines_where_the_terminal_ends(verb, columns, capsys, monkeypatch):
    """No line is wider, and none ends where the next word would still fit: a source's breaks are not a terminal's."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    shown = capsys.readouterr().out
    assert "{None" not in shown
    assert max(map(len, shown.splitlines())) <= columns
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    edge = next(line.index("show this help") for line in rows if "--help" in line)
    for row, following in itertools.pairwise(rows):
        text, goes_on = row[edge:-1].rstrip(), not following[1:edge].strip() and following[edge:-1].split()
        if text and goes_on and row[edge - 2 : edge] == "  ":
            assert edge + len(text) + 1 + len(goes_on[0]) > columns - 2, row


def test_train_help_names_every_preset(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(preset in shown for preset in PRESETS)
    assert "[OPTIONS] DATA" in shown


def test_an_unknown_verb_names_the_known_ones(capsys):
    assert main(["trian"]) == 2
    assert "'trian' is not a verb; choose one of:" in capsys.readouterr().err


def test_a_user_error_is_one_line_and_exit_2(capsys, tmp_path):
    assert main(["inspect", "model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("warploom inspect: ") and "no config.json" in error and error.count("\n") == 1


def test_inspect_model_reads_a_directory(directory, capsys):
    assert main(["inspect", "model", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert f"{SMALL.parameter_count():,}" in shown
    assert not re.search(r"^  \w+ *$", shown, flags=re.MULTILINE)
    assert re.search(
        r"family +llama\n.*as stored +float32\n.*in one C\+\+ call +yes\n.*GPU, fused +yes\n.*blocks +yes", shown
    )


NAMING = {
    "generate": ["generate", "MODEL", "--prompts-file", "none.txt"],
    "chat": ["chat", "MODEL", "--prompt", "hi"],
    "serve": ["serve", "MODEL", "--port", "0"],
    "eval": ["eval", "MODEL", "text.txt"],
    "inspect model": ["inspect", "model", "MODEL"],
    "inspect attention": ["inspect", "attention", "MODEL", "--prompt", "hi"],
    "export": ["export", "MODEL", "out"],
    "quantize": ["quantize", "MODEL", "--out", "out"],
}


@pytest.mark.parametrize("verb", NAMING)
def test_a_model_is_named_by_position_or_by_its_flag(verb, capsys, tmp_path, monkeypatch):
    """Every verb that opens a model hears of the same one, wherever the flag stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.txt").write_text("hi\n")
    argv, broken = NAMING[verb], tmp_path / "broken" / "model"
    broken.mkdir(parents=True)
    words = [word for word in argv if word != "MODEL"]
    ways = [[str(broken) if word == "MODEL" else word for word in argv]]
    ways += [[*words, "--model", "none", "--model", str(broken)], [*words, f"--model={broken}"]]
    for way in ways:
        assert main(way) == 2
        assert f"{broken}" in capsys.readouterr().err, way
    assert main([*words, "--model"]) == 2
    assert "--model needs a value" in capsys.readouterr().err


def test_inspect_model_names_unknown_fields(tmp_path, capsys):
    save_model(Transformer(replace(SMALL, attention_sinks=True, n_experts=4)), tmp_path / "sinks")
    assert main(["inspect", "model", str(tmp_path / "sinks")]) == 0
    shown = capsys.readouterr().out
    assert "family" in shown and "serve in one C++ call  layer by layer: n_experts=4" in shown


def test_inspect_tokens_shows_how_a_text_splits(tmp_path, capsys):
    from warploom.tokenizer import BPETokenizer

    tokenizer = BPETokenizer.train(["the loom weaves the thread"] * 9, vocab_size=270)
    tokenizer.save(tmp_path)
    save_gguf(Transformer(SMALL), tmp_path / "model.gguf", tokenizer)
    for source in (tmp_path, tmp_path / "model.gguf"):
        assert main(["inspect", "tokens", "the loom 织", "--tokenizer", str(source)]) == 0
        shown = capsys.readouterr().out
        assert "the" in shown and "10 characters, 12 bytes" in shown


def test_inspect_attention_draws_a_picture_a_layer(tmp_path, capsys):
    from warploom.tokenizer import BPETokenizer

    tokenizer = BPETokenizer.train(["the loom weaves the thread"] * 9, vocab_size=270)
    model = str(save_model(Transformer(SMALL), tmp_path / "model", tokenizer))
    show = ["inspect", "attention", model, "--out", str(tmp_path / "maps"), "--prompt"]
    assert main([*show, "the $loom$ 织"]) == 0
    assert sorted(os.listdir(tmp_path / "maps")) == ["layer-01.png", "layer-02.png"]
    assert capsys.readouterr().out.count("layer-") == 2
    assert main([*show, ""]) == 2 and "between 1 and 64" in capsys.readouterr().err
    assert main([*show, "the", "--layer", "3"]) == 2 and "between 1 and 2" in capsys.readouterr().err


def test_doctor_tells_what_runs_every_op(capsys):
    from warploom import kernels
    from warploom.kernels.cpu import pointwise

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("  "))
    assert str(torch.__version__) in shown
    for op in kernels.ops() if not torch.cuda.is_available() else ():
        assert rows[op.name] == ("C++" if op.native and pointwise.HAS_NATIVE else "PyTorch"), op.name


def test_export_bin_opens_in_transformers(directory, tmp_path, capsys):
    """Export to bin is a model transformers and we open."""
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(directory), str(tmp_path / "bin"), "--to", "bin"]) == 0
    assert "pytorch_model.bin" in os.listdir(tmp_path / "bin")
    tokens = torch.arange(20)[None]
    ours = load_model(directory, device="cpu")[0](tokens)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bin")(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(load_model(tmp_path / "bin", device="cpu")[0](tokens), ours)


def test_export_to_tiktoken_splits_as_the_tokenizer_does(tmp_path, capsys):
    from warploom.tokenizer import BPETokenizer, CharTokenizer

    tokenizer = BPETokenizer.train(["the loom weaves the thread"] * 9, vocab_size=270)
    tokenizer.save(tmp_path / "bpe")
    file = tmp_path / "loom.tiktoken"
    assert main(["export", str(tmp_path / "bpe"), str(file), "--to", "tiktoken"]) == 0
    again = BPETokenizer.from_tiktoken(file, pattern=tokenizer.pattern, special_tokens={})
    assert again.encode("weaves the loom 织") == tokenizer.encode("weaves the loom 织")
    CharTokenizer.train(["abc"]).save(tmp_path / "char")
    assert main(["export", str(tmp_path / "char"), str(file), "--to", "tiktoken"]) == 2
    assert "CharTokenizer has no rank file" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "warploom.engine.cli", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_cli_bug_of_ours_is_a_traceback(monkeypatch):
    """Only what users cause is a sentence and exit 2: any other ValueError came from deep inside."""
    from warploom.engine.cli import doctor

    def fail(argv):
        raise ValueError("invalid literal for int()")

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["doctor"])


def test_cli_unknown_backend_is_a_sentence():
    command = [sys.executable, "-m", "warploom.engine.cli", "doctor"]
    environment = {**os.environ, "WARPLOOM_BACKEND": "cuda"}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 2 and shown.stderr.startswith("warploom doctor: WARPLOOM_BACKEND is 'cuda'")


def test_cli_undecodable_prompts_file_is_a_sentence(directory, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n")
    assert main(["generate", "--model", str(directory), "--prompts-file", str(tmp_path / "prompts.txt")]) == 2
    assert "prompts.txt is not valid UTF-8 at byte 3" in capsys.readouterr().err
