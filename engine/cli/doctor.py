"""`warploom doctor`: report of device, backend of each op (Triton, C++, PyTorch), and missing packages."""

from __future__ import annotations

import os
import platform
import shutil
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .flag_errors import Parser

PACKAGES = {  # what it is for, and how to get it
    "torch": ("everything", "pip install torch"),
    "numpy": ("everything", "pip install numpy"),
    "triton": ("fused GPU kernels", 'pip install "warploom[kernels]" (Linux)'),
    "safetensors": ("model directories", "pip install safetensors"),
    "regex": ("custom tokenizer patterns", "pip install regex"),
    "matplotlib": ("plots", "pip install matplotlib"),
    "transformers": ("benchmarks and parity tests", 'pip install "warploom[bench]"'),
    "tiktoken": ("tokenizer benchmarks", 'pip install "warploom[bench]"'),
    "datasets": ("downloading datasets", 'pip install "warploom[data]"'),
    "llguidance": ("JSON and regex constrained output", 'pip install "warploom[serve]"'),
    "fastapi": ("the HTTP server", 'pip install "warploom[serve]"'),
    "gradio": ("the playground page", 'pip install "warploom[ui]"'),
}


def run(argv: list[str]) -> int:
    parser = Parser(prog="warploom doctor", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="also measure matmul and memory rates (seconds)")
    options = parser.parse_args(argv)

    import torch

    from ..device import device_name, memory_bytes, pick_device, pick_dtype

    device = pick_device()
    _section("machine")
    _row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    _row("device", f"{device}: {device_name(device)}, {memory_bytes(device) / 2**30:.0f} GiB")
    _row("threads", str(torch.get_num_threads()))
    _row("matrix format", str(pick_dtype(None, device)).removeprefix("torch."))
    if options.measure:
        _measure(device)
    _extensions()
    _ops(device)
    _section("packages")
    for name, (purpose, how) in PACKAGES.items():
        _row(name, _installed(name) or f"missing: {purpose}; {how}")
    return 0


def _measure(device) -> None:
    import torch

    from ..device import measured_copy_bytes, measured_matmul_flops

    for dtype in (torch.float32, torch.bfloat16):
        rate = measured_matmul_flops(device, dtype) / 1e12
        _row(f"matmul {str(dtype).removeprefix('torch.')}", f"{rate:.2f} TFLOP/s")
    _row("copy", f"{measured_copy_bytes(device) / 1e9:.1f} GB/s read plus written")


def _extensions() -> None:
    from ...kernels.cpu.extension import import_native

    compiler = shutil.which("c++") or shutil.which("g++")
    how = "reinstall warploom" if compiler else "install a C++ compiler (Debian: apt install g++), then reinstall"
    for name, find, instead in (
        (
            "C++ tokenizer",
            partial(import_module, "..._tokenizer", __package__),
            "its Python twin runs, some hundred times slower",
        ),
        ("C++ engine", import_native, "PyTorch runs alone"),
    ):
        try:
            extension = find()
            _row(name, f"{extension.instruction_set()}, {extension.__file__}")
        except ImportError as error:
            _row(name, f"missing ({error}): {instead}; {how}")


def _ops(device) -> None:
    from ... import kernels
    from ..serving.execution.kv_cache import HAS_NATIVE

    _section("ops")
    for op in kernels.ops():
        _row(op.name, _backend(op, device))
    if device.type == "cpu":
        _row("serving", "C++" if HAS_NATIVE else "PyTorch")


def _backend(op, device) -> str:
    """Backend that runs an op here (Triton, C++ or PyTorch), with the dtypes it supports."""
    import torch

    from ...kernels.core.lang import HAS_TRITON
    from ...kernels.cpu import pointwise

    chosen = os.environ.get("WARPLOOM_BACKEND", "auto")
    if op.fused and HAS_TRITON and (chosen == "triton" or (chosen == "auto" and device.type == "cuda")):
        return "Triton"
    return "C++" if op.native and pointwise.is_supported(torch.zeros(1, device=device)) else "PyTorch"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _section(title: str) -> None:
    print(f"\n{title}")


def _row(name: str, value: str) -> None:
    print(f"  {name:22} {value}")
