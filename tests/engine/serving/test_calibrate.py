"""Calibrated weights: errors that cancel in a text, and directories of packed weights."""

import json

import pytest
import torch

from warploom.engine import Transformer
from warploom.engine.cli import main
from warploom.engine.config import ModelConfig
from warploom.engine.formats.families import to_hf_config
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model
from warploom.engine.formats.packed_weight import Layout, PackedLinear
from warploom.engine.layers import Linear
from warploom.engine.serving import LLM
from warploom.engine.serving.calibrate import Hessian, sampled_rows
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE
from warploom.engine.serving.execution.native_matrix import pack
from warploom.engine.serving.fidelity import log_probabilities, loss_of
from warploom.tokenizer import BPETokenizer

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")
TEXT = "The loom weaves 1234 threads, and more of them; warp and weft cross at right angles.\n"


@pytest.mark.parametrize("layout", [Layout(8), Layout(4, 64, True), Layout(4, 32, False, (), False)], ids=str)
@pytest.mark.parametrize("columns", [192, 150])
def test_fed_back_errors_cancel_in_correlated_columns(layout, columns):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator) @ torch.diag(torch.linspace(1, 0.01, columns))
    x_NC = torch.randn(2000, columns, generator=generator) @ mixed.T
    weight = torch.randn(80, columns, generator=generator)
    layer = torch.nn.Identity()
    seen = Hessian(layout, layer)
    layer(x_NC[:1000]), layer(x_NC[1000:])

    def lost(packed):
        return ((packed.dequantize() - weight) @ x_NC.T).norm().item()

    assert lost(pack(weight, layout, seen.feedback())) < 0.7 * lost(pack(weight, layout))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model's directory, and a text it can read."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=288, d_model=96, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=160, max_seq_len=64)
    save_model(Transformer(config), directory / "float", BPETokenizer.train([TEXT], 280))
    (directory / "text.txt").write_text(TEXT * 20)
    return directory


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantize_writes_what_serves_as_it_is(trained, scheme, capsys):
    there = trained / scheme
    flags = ["--out", str(there), "--bits", scheme[3:], "--calibrate", str(trained / "text.txt")]
    assert main(["quantize", str(trained / "float"), *flags]) == 0
    assert "held out: KL" in capsys.readouterr().out
    assert main(["inspect", "model", str(there)]) == 0
    assert f"{scheme[3:]} bits in groups of 64" in capsys.readouterr().out
    packed, tokenizer = load_model(there, "cpu", packed=True)
    assert isinstance(packed.blocks[1].ffn.down, PackedLinear) and tokenizer is not None
    floats = load_model(there, "cpu")[0]
    floats.head = Linear(96, 288, False)  # the tied embedding stays as it was
    floats.head.weight.data = packed.head.weight
    tokens = [7 * i % 280 for i in range(60)]
    exact, again, served, eight = (
        torch.tensor(LLM(model, quantize=quantize).score(tokens))
        for model, quantize in (
            (trained / "float", None), (floats, None), (there, None), (trained / "float", "int8")
        )
    )  # fmt: skip
    usual = (eight - exact).norm()  # activations, keys and values are rounded in both
    assert 0 < (again - exact).norm() < (1 if scheme == "int8" else 20) * usual
    assert (served - again).norm() < 1.2 * usual
    with pytest.raises(ValueError, match=f"quantize='int8' is for float weights, and .*{scheme} has [48] bits"):
        LLM(there, quantize="int8")


def test_quantize_without_text_is_the_usual_rounding(trained):
    assert main(["quantize", str(trained / "float"), "--out", str(trained / "plain")]) == 0
    float_llm, packed = LLM(trained / "float", quantize="int8"), LLM(trained / "plain")
    torch.testing.assert_close(torch.tensor(packed.score(TEXT)), torch.tensor(float_llm.score(TEXT)), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q.pop("layouts"), "has no field 'layouts'"),
        (lambda q: q["layouts"].pop("ffn.down"), "no layout of 'ffn.down'"),
        (lambda q: q["layouts"]["ffn.down"].update(bits=5), "bits must be 4 or 8, got 5"),
        (lambda q: q["layouts"]["ffn.down"].update(group="64"), "values of other types"),
        (lambda q: q["layouts"]["ffn.down"].update(zero=1), "has the fields bits"),
        (
            lambda q: q["layouts"]["ffn.down"].update(group=32),
            r"scales is float16 \(96, 3\); by its layout",
        ),
    ],
)
def test_packed_directory_that_lies_is_refused(trained, tmp_path, change, says):
    main(["quantize", str(trained / "float"), "--out", str(tmp_path / "packed")])
    path = tmp_path / "packed" / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path / "packed", "cpu", packed=True)


def test_inspect_of_missing_layouts_is_an_error(tmp_path, capsys):
    config = ModelConfig(vocab_size=64, d_model=64, n_layers=1, n_heads=2)
    quantization = {"quantization_config": {"quant_method": "warploom"}}
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config, "warploom") | quantization))
    assert main(["inspect", "model", str(tmp_path)]) == 2
    assert "has no field 'layouts'" in capsys.readouterr().err


def test_quantize_needs_enough_text(trained, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("The loom")
    flags = ["--out", str(tmp_path / "out"), "--calibrate", str(tmp_path / "short.txt")]
    assert main(["quantize", str(trained / "float"), *flags]) == 2
    assert "calibration needs at least 128" in capsys.readouterr().err


def test_quantize_calibrates_on_own_samples(trained, capsys):
    """The same samples every time, so the same files; and less is lost than by rounding to the nearest."""
    files = []
    for there in (trained / "own", trained / "again"):
        flags = ["--bits", "4", "--calibrate", "--tokens", "2048", "--out", str(there)]
        assert main(["quantize", str(trained / "float"), *flags]) == 0
        files.append((there / "model.safetensors").read_bytes())
    assert "tokens of its own held out: KL" in capsys.readouterr().out and files[0] == files[1]
    float_llm = LLM(trained / "float")
    own, nearest = (
        loss_of(llm, rows, log_probabilities(float_llm, rows))["kl"]
        for rows in [[[(7 * i + i * i) % 280 for i in range(60)]]]
        for llm in (LLM(trained / "own"), LLM(trained / "float", quantize="int4"))
    )
    assert own < 0.8 * nearest


def test_sampled_rows_ask_and_answer(trained):
    """Every other one as a conversation, where there is a template; each of the length that was asked for."""
    model, tokenizer = load_model(trained / "float", "cpu")
    tokenizer.chat_template = "{% for m in messages %}User: {{ m.content }}{% endfor %}"
    rows = sampled_rows(LLM(model, tokenizer), 4, 32)
    asked = tokenizer.encode("User: ")
    assert [row[: len(asked)] == asked for row in rows] == [False, True, False, True]
    assert {len(row) for row in rows} == {32} and rows[0] != rows[2]
    assert rows == sampled_rows(LLM(model, tokenizer), 4, 32)
