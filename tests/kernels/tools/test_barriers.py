"""The barriers of Hopper's attention kernels under random schedules, and the checker under mutated kernels."""

import json
import os
import re
import subprocess
import sys

import pytest

from warploom.kernels.core.lang import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs triton's compiler", allow_module_level=True)

from warploom.kernels.tools.barriers import Hazard, check
from warploom.kernels.tools.ttgir import parse

COMPILED = """
import json, torch
from warploom.kernels import attention, backend
from warploom.kernels.gpu.attention_hopper import tile_of
from warploom.kernels.tools.compile_offline import compiling_for

def tensors(D, *batch):
    return (torch.empty(*batch, 512, H, D, device="meta", dtype=torch.bfloat16, requires_grad=True) for H in (4, 2, 2))

found = []
with backend("triton"), compiling_for(90) as kernels:
    for D in (64, 128):
        for options in ({}, {"causal": False, "window": 100, "softcap": 20.0}):
            out = attention(*tensors(D, 1), **options)
            out.backward(torch.empty_like(out))
            for name, kernel in zip(("forward", None, "dq", "dkdv"), kernels):
                if name:
                    tile = tile_of(name, D, torch.bfloat16, out.device)
                    found.append((name, D, tile["BLOCK_N" if name == "dkdv" else "BLOCK_M"], kernel.asm["ttgir"]))
            kernels.clear()
    out = attention(*tensors(64), cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta"), max_seqlen=512)
    out.backward(torch.empty_like(out))
    for name, kernel in zip(("forward", None, "dq", "dkdv"), kernels):
        if name:
            tile = tile_of(name, 64, torch.bfloat16, out.device)
            block = tile["BLOCK_N" if name == "dkdv" else "BLOCK_M"]
            found.append((f"ragged {name}", 64, block, kernel.asm["ttgir"]))
print(json.dumps(found))
"""
SHAPES = (1, 1), (1, 700), (700, 1), (129, 64), (515, 515), (300, 900)
SEQUENCES = 0, 1, 1, 350, 512
"""Offsets of a ragged batch: one query, nobody, more, the rest."""
BARRIER = re.compile(r"ttng\.(wait_barrier|arrive_barrier|barrier_expect) ")
LEAST_FOUND = {"forward": 0.8, "dq": 0.55, "dkdv": 0.6}
"""Share of barriers whose loss must show. The others are the first wait for a tile that nobody had yet, the last
release, which nobody awaits, and waits that another one implies."""


@pytest.fixture(scope="module")
def kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


def programs(name, block, q_len, k_len):
    """Arguments of the first, a middle and the last program of a launch."""
    heads = 2 if name.endswith("dkdv") else 4
    tiles = -(-(k_len if name.endswith("dkdv") else q_len) // block)
    more = {"sequences": 0}
    if "ragged" in name:
        tiles, more = SEQUENCES[-1] // block + 4, {"sequences": 4, "cu": list(SEQUENCES)}
    count = tiles * heads
    known = {"tiles": tiles, "batch_heads": heads, "heads": heads, "heads_in_l2": heads, "q_len": q_len, "k_len": k_len}
    return [{**known, **more, "pid": pid} for pid in sorted({0, count // 2, count - 1})]


def test_hopper_kernels_no_hazard_in_any_schedule(kernels):
    """Nobody waits forever, reads what is not there or overwrites what is being read."""
    assert {name for name, *_ in kernels} == {f"{kind}{name}" for kind in ("", "ragged ") for name in LEAST_FOUND}
    for name, _, block, ttgir in kernels:
        kernel = parse(ttgir)
        for shape in SHAPES if "ragged" not in name else SHAPES[:1]:
            for arguments in programs(name, block, *shape):
                check(kernel, arguments, schedules=12)


def found(ttgir, name, block):
    """A hazard of a kernel in a few programs, if there is one."""
    kernel = parse(ttgir)
    try:
        for arguments in programs(name, block, 515, 515)[::2]:
            check(kernel, arguments, schedules=30)
    except Hazard as hazard:
        return str(hazard)
    return ""


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_deleted_barrier_is_found(kernels, name):
    block, ttgir = next((block, ttgir) for kernel, D, block, ttgir in kernels if (kernel, D) == (name, 128))
    lines = ttgir.split("\n")
    sites = [n for n, line in enumerate(lines) if BARRIER.search(line)]
    dead = [n for n in sites if found("\n".join([*lines[:n], *lines[n + 1 :]]), name, block)]
    assert len(dead) >= LEAST_FOUND[name] * len(sites)


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_tile_released_before_its_product_is_found(kernels, name):
    """But where the producer asks for another tile first, which is released only later: half of them, backward."""
    block, ttgir = next((block, ttgir) for kernel, D, block, ttgir in kernels if (kernel, D) == (name, 128))
    lines = ttgir.split("\n")
    moved = []
    for n, line in enumerate(lines):
        products = [i for i in range(n - 4, n) if "ttng.warp_group_dot" in lines[i]]
        if "ttng.arrive_barrier" in line and products:
            early = [*lines[: products[-1]], *lines[n - 1 : n + 1], *lines[products[-1] : n - 1], *lines[n + 1 :]]
            moved.append(found("\n".join(early), name, block))
    assert len(moved) >= 4 and sum(map(bool, moved)) >= (len(moved) if name == "forward" else len(moved) / 2)
