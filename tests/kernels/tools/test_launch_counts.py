"""Launches of a serving step and of a training step: each costs microseconds, however little it does."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from warploom.engine.config import ModelConfig
from warploom.kernels.core.lang import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton's compiler")

PROGRAM = Path(__file__).parents[1] / "count_launches.py"
A_LAYER = 6
"""Four products, of which two begin and two end with half of a norm; the preparation of q, k and v; attention."""


@pytest.fixture(scope="module")
def steps():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_step_launches_six_kernels_a_layer(steps, step):
    """And the first and the last norm: 173 with PyTorch's three, where 200 was the goal."""
    kernels, others = steps[step]
    assert kernels <= A_LAYER * ModelConfig.preset("qwen3-0.6b").n_layers + 2
    assert kernels + len(others) < 200


@pytest.mark.parametrize(("layout", "rotations"), [("8 bits", 0), ("4 bits rotated", 4)])
def test_packed_layers_launch_as_many(steps, layout, rotations):
    """Norms, gate and residuals are parts of products with codes too; rotated weights rotate what they multiply."""
    kernels, _ = steps[layout]
    assert kernels <= 2 * (A_LAYER + rotations) + 2


def test_graph_holds_head_draw_and_tokens(steps):
    """A decoding step is one copy to the device, one graph of fewer than 200 launches, and one copy back."""
    kernels, others = steps["graph"]
    assert kernels == steps["decode"][0] + 2, "the head's product, and the draw, which looks its settings up"
    assert len(others) - len(steps["decode"][1]) <= 10, "tokens looked up and written down"
    assert kernels + len(others) < 200


def test_experts_launch_thirteen_kernels_a_layer(steps):
    """A dense layer has six; here are two norms, the router, and six of the experts, none of which is PyTorch's."""
    kernels, others = steps["experts"]
    assert kernels <= 13 * 2 + 1 and len(others) == 3


@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_step_metadata_made_once_not_a_layer(steps, step):
    """The counters of attention, the embedding and the first residual: nothing else is PyTorch's."""
    _, others = steps[step]
    assert others == ["aten::zeros", "aten::embedding", "aten::zeros_like"]


def test_training_layer_launches_twelve_kernels(steps):
    """Forward and backward of two norms, a rotation, attention (three kernels back) and a gate; PyTorch's products are
    the twelve of four linear layers, and five others cast, add up and join gradients."""
    (one, others_of_one), (two, others_of_two) = steps["train 1"], steps["train 2"]
    assert two - one <= 12 and one <= 12 + 4
    a_layer = Counter(others_of_two) - Counter(others_of_one)
    assert a_layer["aten::mm"] == 12 and a_layer.total() <= 12 + 5
