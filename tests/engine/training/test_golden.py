"""The losses of a few steps of each kind of architecture, as they were when they were right.

`python tests/engine/training/test_golden.py` writes golden.json anew, after a change that is meant to change them.
"""

import json
import tempfile
from pathlib import Path

import pytest

from warploom.engine.training import TrainConfig, train

GOLDEN = Path(__file__).with_name("golden.json")
TEXT = "".join(f"{a} times {b} is {a * b}, and {a} plus {b} is {a + b}.\n" for a in range(1, 40) for b in range(1, 8))
SMALL = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}
CORNERS = {
    "gpt2": {"norm": "layernorm", "position": "learned", "ffn": "gelu", "bias": True},
    "llama": {"n_kv_heads": 2, "ffn": "swiglu"},
    "qwen3": {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
    "moe": {"n_kv_heads": 2, "n_experts": 4, "d_ff": 32},
    "switch": {"n_experts": 4, "experts_per_token": 1, "d_ff": 32},
}


def curve(corner, folder):
    (Path(folder) / "text.txt").write_text(TEXT)
    result = train(
        TrainConfig(
            str(Path(folder) / "text.txt"), out=f"{folder}/{corner}", tokenizer="char", model=SMALL | CORNERS[corner],
            preset="llama-tiny", steps=12, batch_size=4, lr=3e-3, warmup=4, dtype="float32", device="cpu",
            log_every=1, eval_batches=2, sample_tokens=0,
        )
    )  # fmt: skip
    return [line["loss"] for line in result.history if "loss" in line] + [result.val_loss]


@pytest.mark.parametrize("corner", CORNERS)
def test_the_loss_curve_is_the_recorded_one(corner, tmp_path):
    assert curve(corner, tmp_path) == pytest.approx(json.loads(GOLDEN.read_text())[corner], abs=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        curves = {corner: [round(loss, 7) for loss in curve(corner, folder)] for corner in CORNERS}
    lines = ",\n".join(f'  "{corner}": {json.dumps(losses)}' for corner, losses in curves.items())
    GOLDEN.write_text("{\n" + lines + "\n}\n")
