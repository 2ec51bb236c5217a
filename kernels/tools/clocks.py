"""Roofline of hot loops from PTX: clocks of tensor cores and of shared memory; the larger one bounds a loop.

A multiprocessor of sm_90 multiplies 2048 pairs of 16-bit numbers a clock: a `wgmma` of m64nNk16 takes N / 2 clocks.
Shared memory moves 128 bytes a clock. The product reads its right side, 32 · N bytes, and its left, 2048 bytes unless
that is in registers; and what the loop loads is written there once.
"""

import re

PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.\S+\s*\{[^}]*\}\s*,\s*(\{|%)")
COPY = re.compile(r"cp\.async\.c[ga]\.shared\.global[^;]*0x10")
BULK = re.compile(r"expect_tx[^;]*,\s*(0x[0-9a-f]+|\d+)\s*;")


def hot_loop_clocks(loops: list[str], warps: int, specialized: bool) -> tuple[int, int]:
    """(tensor-core clocks, shared-memory clocks) of one iteration of the innermost loops, over all warp groups.

    In a warp-specialized kernel each group has a loop of its own, and so has who copies."""
    groups = 1 if specialized else max(1, warps // 4)
    tensor = shared = 0.0
    for loop in loops:
        for columns, left in PRODUCT.findall(loop):
            tensor += int(columns) / 2 * groups
            shared += (32 * int(columns) + (0 if left == "{" else 2048)) / 128 * groups
        shared += len(COPY.findall(loop)) * 16 * 32 * warps / 128
        shared += sum(int(size, 0) for size in BULK.findall(loop)) / 128
    return round(tensor), round(shared)


def tensor_share(tensor: int, shared: int) -> float:
    """Upper bound on tensor-core utilization in a loop; 1 without products."""
    return tensor / max(tensor, shared, 1) if tensor else 1.0
