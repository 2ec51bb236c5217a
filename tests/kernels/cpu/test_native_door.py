"""Tensors that do not fit: every index and every size is checked where C++ reads or writes by it."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from warploom import kernels
from warploom.engine.config import ModelConfig
from warploom.engine.model import Transformer
from warploom.kernels.cpu import pointwise

pytestmark = pytest.mark.skipif(not pointwise.HAS_NATIVE, reason="needs the C++ extension")
native = pointwise._native


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("target", [1000, 3 * 10**8, -1, -5 * 10**7, 2**62])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_wrong_target_raises(rows, target, dtype):
    hidden, weight = torch.randn(rows, 32, dtype=dtype, requires_grad=True), torch.randn(1000, 32, dtype=dtype)
    targets = torch.randint(0, 1000, (rows,))
    targets[-1] = target
    with pytest.raises(IndexError, match=f"target {target} is out of range: there are 1000"):
        kernels.linear_cross_entropy(hidden, weight, targets)
    targets[-1] = -100
    assert kernels.linear_cross_entropy(hidden, weight, targets, reduction="sum").isfinite()


def test_loss_int32_targets_raise():
    with pytest.raises(TypeError, match="targets must hold int64, got int32"):
        kernels.linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 8), torch.zeros(4, dtype=torch.int32))


def test_model_loss_wrong_target_raises():
    model = Transformer(ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2, max_seq_len=16))
    tokens = torch.randint(0, 64, (2, 16))
    with pytest.raises(IndexError, match="target 64"):
        model.loss(tokens, tokens.index_fill(1, torch.tensor([3]), 64))


@pytest.mark.parametrize("position", [32, 10**8, -1, -3 * 10**7])
@pytest.mark.parametrize("time", [1, 700])
def test_rope_wrong_position_raises(position, time):
    q, k, tables = torch.randn(1, time, 2, 16), torch.randn(1, time, 2, 16), kernels.rope_tables(16, 32)
    positions = torch.zeros(1, time, dtype=torch.int64)
    positions[0, -1] = position
    with pytest.raises(IndexError, match=f"position {position} is out of range: there are 32"):
        kernels.rope(q, k, *tables, positions)


def test_rope_too_short_tables_raise():
    with pytest.raises(IndexError, match="position 32"):
        kernels.rope(*torch.randn(2, 1, 33, 2, 16), *kernels.rope_tables(16, 32))


def test_rope_int32_positions_are_positions():
    q, k, tables = torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16), kernels.rope_tables(16, 32)
    positions = torch.arange(8)[None].flip(1)
    pairs = zip(kernels.rope(q, k, *tables, positions.int()), kernels.rope(q, k, *tables, positions))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_fused_rows_wrong_position_raises():
    from warploom.kernels.cpu import fused_block

    if not fused_block.HAS_FUSED_BLOCK:
        pytest.skip("needs a CPU with AVX-512")
    stream, positions = torch.randn(1, 4, 32), torch.tensor([[0, 1, 2, 99]])
    weights = torch.ones(32), 1e-6, torch.randn(96, 32), (2, 2), *kernels.rope_tables(16, 8)
    with pytest.raises(IndexError, match="position 99"):
        fused_block.norm_qkv_rope(stream, stream, *weights, positions)


def norm(**changes):
    x = torch.randn(4, 32)
    given = {"x": x, "residual": None, "weight": torch.ones(32), "y": torch.empty(4, 32), "sum": None}
    given = {**given, "inverse": torch.empty(4), **changes}
    native.norm_forward(1e-6, *given.values())


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": torch.randn(4, 32, dtype=torch.float64)}, TypeError, "x must hold float32, got float64"),
        ({"weight": torch.ones(31)}, ValueError, "weight must have 32 numbers without gaps, got shape .31."),
        ({"y": torch.empty(3, 32)}, ValueError, "y must have 128 numbers"),
        ({"y": torch.empty(4, 64)[:, ::2]}, ValueError, "got shape .4, 32. with gaps"),
        ({"inverse": None}, TypeError, "inverse is None"),
        ({"residual": torch.ones(4, 32)}, TypeError, "sum is None"),
        ({"residual": torch.ones(5, 32)}, ValueError, "residual must have 128 numbers"),
        ({"weight": torch.ones(32, device="meta")}, TypeError, "in the CPU's memory"),
        ({"x": 17}, TypeError, "incompatible function arguments"),
    ],
)
def test_native_unfit_tensor_raises(changes, error, says):
    norm()
    with pytest.raises(error, match=says):
        norm(**changes)


def test_native_gradients_unfit_tensor_raises():
    x = torch.randn(2, 8, 2, 16)
    stats, o = torch.empty(2, 2, 2, 8), torch.empty_like(x)
    native.attention(0.25, stats, x, x, x, o)
    with pytest.raises(ValueError, match="dk must have shape"):
        native.attention(0.25, stats, x, x, x, o, o, o[:, :4], o)
    with pytest.raises(ValueError, match="multiple of 16"):
        native.attention(0.25, stats, *[x[..., :8]] * 4)


def test_packed_unfit_tensor_raises():
    layout = native.Layout(8, 64, False, True, [])
    codes, scales, units = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1).half(), torch.ones(4)
    native.PackedMatrix([(layout, codes, scales, None, units)], 64, None, False)
    with pytest.raises(ValueError, match="codes must have 512 numbers"):
        native.PackedMatrix([(layout, codes, scales, None, torch.ones(8))], 64, None, False)
    with pytest.raises(TypeError, match="scales must hold float16, got float32"):
        native.PackedMatrix([(layout, codes, scales.float(), None, units)], 64, None, False)
    with pytest.raises(ValueError, match="minima are None"):
        native.PackedMatrix([(native.Layout(8, 64, True, True, []), codes, scales, None, units)], 64, None, False)
    with pytest.raises(ValueError, match="units must have 4 numbers"):
        native.quantize_rows(torch.ones(4, 64), layout, codes, scales, None, torch.ones(3), None)


def test_team_is_found_whatever_its_name(tmp_path):
    """Torch's OpenMP is found through the libraries that torch has loaded, not by a file's name."""
    if sys.platform != "linux" or not pointwise.mapped_libraries("libtorch_cpu"):
        pytest.skip("needs Linux, where /proc/self/maps names what is loaded")
    assert pointwise.HAS_OPENMP
    openmp = tuple(pointwise.mapped_libraries("libgomp", "libiomp5", "libomp"))  # others may have brought their own
    assert openmp, "torch has loaded an OpenMP library"
    with open("/proc/self/maps") as lines:
        spans = [line.split()[0].split("-") for line in lines if line.rstrip().endswith(openmp)]
    parallel = pointwise.find_openmp()[0]
    assert any(int(first, 16) <= parallel < int(end, 16) for first, end in spans)


def test_team_on_a_mac_is_asked_of_its_linker(monkeypatch):
    """Simulated: macOS has no list of mappings, but its dynamic linker counts the images and names each."""
    images = b"/usr/lib/libSystem.B.dylib", b"/torch/lib/libomp.dylib", None, b"/torch/lib/libtorch_cpu.dylib"
    dyld = SimpleNamespace(_dyld_image_count=lambda: len(images), _dyld_get_image_name=lambda i: images[i])
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: dyld)
    assert pointwise.mapped_libraries("libtorch_cpu", "libomp") == [
        "/torch/lib/libtorch_cpu.dylib",
        "/torch/lib/libomp.dylib",
    ]


def test_passes_without_openmp_leave_threads_to_torch(monkeypatch):
    monkeypatch.setattr(pointwise, "HAS_OPENMP", False)
    x = torch.randn(4, 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not pointwise.is_supported(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert pointwise.is_supported(x)


FORK = """
import os, signal, threading, time, torch
from warploom.kernels.cpu.extension import native as _native
from warploom.kernels import rms_norm
torch.set_num_threads(2)
_native.set_threads(3)
matrix = _native.Matrix("float32", torch.randn(2048, 512), None)
x, y, rows = torch.randn(4, 512), torch.empty(4, 2048), torch.randn(512, 256)
def work():
    z = torch.empty(4, 2048)
    while True:
        matrix.multiply(x, z)
matrix.multiply(x, y)
for i in range(60):
    if i == 30:  # from here on a fork may come in the middle of a call
        threading.Thread(target=work, daemon=True).start()
    matrix.multiply(x, torch.empty(4, 2048)), rms_norm(rows, rows[0])
    time.sleep(0.002 * (i % 3 == 0))
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        if i % 2:
            _native.set_threads(2)
        z = torch.empty(4, 2048)
        matrix.multiply(x, z), rms_norm(rows, rows[0])
        os._exit(0 if torch.equal(y, z) else 1)
    assert os.waitpid(child, 0)[1] == 0, f"child {i} hung or was wrong"
os._exit(0)
"""


def test_forked_child_computes():
    """A child has none of its parent's threads: the pool begins anew, and the passes run on the child's own thread."""
    if not hasattr(os, "fork"):
        pytest.skip("nothing forks here")
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
