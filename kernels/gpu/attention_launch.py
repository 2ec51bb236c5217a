"""Launch of the attention kernels: tiles, grid, autograd.

The tiles below are reasoned, not searched: the largest whose accumulators stay in registers, by head size and
architecture, each compiled ahead of time and found free of spills.

B batch, T queries, S keys, H query heads, K key heads, D head dim; a ragged batch is one sequence of all its tokens.
"""

import math
from collections.abc import Callable

import torch

from ..core.lang import AMD, architecture, cdiv, generation, next_power_of_2, shared_memory
from ..core.launch import AutogradOp, last_dim_contiguous, launch, launcher
from ..core.tuned import tuned
from . import attention_hopper
from .attention_backward import attention_delta_kernel, attention_dkdv_kernel, attention_dq_kernel
from .attention_forward import attention_forward_kernel

CACHED_BYTES = 24 << 20
"""Keys and values of the heads that are worked on at the same time should fit in the L2 cache."""


_TILES = {  # (BLOCK_M, BLOCK_N, warps, stages) by kernel, architecture and the power of two that holds a head
    ("forward", 80): {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
    ("forward", 90): {64: (128, 128, 8, 3), 128: (128, 128, 8, 3), 256: (128, 32, 8, 2)},
    ("forward", 100): {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
    ("dq", 80): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("dq", 90): {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    ("dq", 100): {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("dkdv", 80): {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    ("dkdv", 90): {64: (64, 128, 8, 3), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
    ("dkdv", 100): {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
    # instead, where a cap, a ragged batch, an odd head size or the lack of a causal mask takes the last registers
    ("dq", 80, "other"): {64: (128, 32, 8, 2)},
    ("dkdv", 90, "other"): {128: (32, 128, 8, 2), 256: (16, 64, 8, 1)},
    # instead, with the 99 KiB of shared memory of GPUs for desks, or AMD's 64
    ("forward", 80, "small"): {256: (64, 32, 8, 2)},
    ("dq", 80, "small"): {256: (32, 32, 8, 2)},
    # instead, where `mma.sync` of sm_120 leaves two registers less: 64 keys would spill them in the loop
    ("forward", 120): {64: (128, 32, 4, 3)},
}


def tile_of(kernel: str, D: int, dtype: torch.dtype, device: torch.device, plain: bool = True) -> dict:
    """Block sizes, warps and pipeline stages of a kernel: "forward", "dq" or "dkdv".

    `plain` is a causal batch that is neither ragged nor capped: what is more takes registers, as does a head size that
    is no power of two."""
    plain = plain and next_power_of_2(D) == D
    arch = generation(device)
    if arch == 0 or dtype == torch.float32:  # no tensor cores: small tiles, many warps
        side = 32 if D <= 64 else 16
        M, N, warps, stages = side, side, 8, 1 if D > 128 else 2
    else:
        family = 80 if arch == AMD else arch
        tiles = _TILES[kernel, family] | _TILES.get((kernel, architecture(device) // 10 * 10), {})
        tiles |= {} if plain else _TILES.get((kernel, family, "other"), {})
        if shared_memory(architecture(device)) < 100 * 1024:
            tiles |= _TILES.get((kernel, family, "small"), {})
        M, N, warps, stages = tiles[min(256, max(64, next_power_of_2(D)))]
    default = {"BLOCK_M": M, "BLOCK_N": N, "num_warps": warps, "num_stages": stages}
    chosen = tuned(f"attention_{kernel}", device, f"{D} {str(dtype)[6:]}{'' if plain else ' other'}", default)
    return {**chosen, "TMA": False}


def _launch_either(name: str, hopper: bool, q: torch.Tensor, plain: bool, run: Callable) -> None:
    """Launch with Hopper's tile of this kernel, or with the portable one if there is none or its first launch fails."""
    D, dtype, device = q.shape[3], q.dtype, q.device
    if hopper:
        try:
            run(attention_hopper.tile_of(name, D, dtype, device))
            return attention_hopper.mark_working(name)
        except Exception as error:  # a compiler's refusal has many types
            if not attention_hopper.disable_after_first_failure(name, error):
                raise
    run(tile_of(name, D, dtype, device, plain))


class _Grid:
    """Launch grid over tiles and heads, with the constants by which a program finds its tile."""

    def __init__(self, q, k, cu, block, heads, length, kv_len):
        B, D = q.shape[0], q.shape[3]
        sequences = 0 if cu is None else cu.shape[0] - 1
        tiles = cdiv(length, block) if cu is None else length // block + sequences if sequences else 0
        shared = heads // k.shape[2]
        heads_in_l2 = shared * max(1, CACHED_BYTES // max(1, 2 * kv_len * D * q.itemsize))
        self.grid = (tiles * B * heads,)
        self.scalar_args = (tiles, B * heads, heads, min(heads_in_l2, B * heads), q.shape[1], k.shape[1], sequences)


def _meaning(q, k, cu, causal, window, softcap, scale):
    D = q.shape[3]
    return {
        "Q_PER_KV": q.shape[2] // k.shape[2],
        "SCALE": scale,
        "SOFTCAP": softcap,
        "CAUSAL": causal,
        "WINDOW": window,
        "SEARCH_STEPS": 0 if cu is None else search_steps(cu.shape[0] - 1),
        "D": D,
        "BLOCK_D": max(16, next_power_of_2(D)),
        "SPLIT_LSE": q.dtype == torch.float32,
    }


def search_steps(sequences: int) -> int:
    """Bisection steps to find a sequence among so many, rounded up to fours: fewer kernel variants to compile."""
    return max(4, 4 * cdiv((sequences - 1).bit_length(), 4))


def _blank(x: torch.Tensor, cu: torch.Tensor | None) -> torch.Tensor:
    """Allocate a result shaped like x; padding behind the last sequence of a ragged batch is zero."""
    make = torch.empty if cu is None else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def _statistics(*shape: int, cu: torch.Tensor | None, device: torch.device, zero: bool) -> torch.Tensor:
    """Allocate a number a query. Rows (and sequences of a ragged batch) start at multiples of 16 bytes; padding is
    zero, as kernels read whole tiles and multiply what they must not use by zero. `zero` clears all of it."""
    *outer, T = shape
    whole = 4 * cdiv(T, 4) if cu is None else 4 * cdiv(T, 4) + 4 * len(cu)
    make = torch.zeros if zero or (cu is None and whole > T) else torch.empty
    return make(*outer, whole, dtype=torch.float32, device=device)


@launcher
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu: torch.Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    B, T, H = q.shape[:3]
    o = _blank(q, cu)
    meaning = _meaning(q, k, cu, causal, window, softcap, scale)
    padded = cu is not None and sinks is not None
    lse_2BHT = _statistics(2 if meaning["SPLIT_LSE"] else 1, B, H, T, cu=cu, device=q.device, zero=padded)
    plain = causal and cu is None and softcap == 0
    strides = [n for x in (q, k, v, o, lse_2BHT) for n in x.stride()[:3]]

    def run(tile):
        grid = _Grid(q, k, cu, tile["BLOCK_M"], H, T, k.shape[1])
        launch(
            attention_forward_kernel, grid.grid,
            q, k, v, o, lse_2BHT, sinks, cu, *strides, *grid.scalar_args, **meaning, **tile,
        )  # fmt: skip

    hopper = attention_hopper.tma_can_address("forward", q, k, v)
    _launch_either("forward", hopper, q, plain, run)
    return o, lse_2BHT


@launcher
def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse_2BHT: torch.Tensor,
    sinks: torch.Tensor | None,
    cu: torch.Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    want_q: bool,
    want_kv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    do, q, k, v = last_dim_contiguous(do), last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    H, D = q.shape[2:]
    meaning = _meaning(q, k, cu, causal, window, softcap, scale)
    dq, dk, dv = _blank(q, cu), _blank(k, cu), _blank(v, cu)
    padded = cu is not None and sinks is not None
    delta_BHT = _statistics(*lse_2BHT.shape[1:3], q.shape[1], cu=cu, device=q.device, zero=padded)
    plain = causal and cu is None and softcap == 0
    strides = [n for x in (q, k, v, do) for n in x.stride()[:3]]
    stats = lse_2BHT.stride()[:3]

    grid = _Grid(q, k, cu, 32, H, q.shape[1], k.shape[1])
    launch(
        attention_delta_kernel, grid.grid,
        o, do, delta_BHT, cu, *o.stride()[:3], *do.stride()[:3], *stats[1:], *grid.scalar_args,
        SEARCH_STEPS=meaning["SEARCH_STEPS"], D=D, BLOCK_D=meaning["BLOCK_D"], BLOCK_M=32, num_warps=8,
    )  # fmt: skip
    inputs = q, k, v, do, lse_2BHT, delta_BHT

    def run_dq(tile):
        grid = _Grid(q, k, cu, tile["BLOCK_M"], H, q.shape[1], k.shape[1])
        launch(
            attention_dq_kernel, grid.grid,
            *inputs, dq, cu, *strides, *dq.stride()[:3], *stats, *grid.scalar_args, **meaning, **tile,
        )  # fmt: skip

    def run_dkdv(tile):
        grid = _Grid(q, k, cu, tile["BLOCK_N"], k.shape[2], k.shape[1], q.shape[1])
        own = *dk.stride()[:3], *dv.stride()[:3]
        launch(
            attention_dkdv_kernel, grid.grid,
            *inputs, dk, dv, cu, *strides, *own, *stats, *grid.scalar_args, **meaning, **tile,
        )  # fmt: skip

    if want_q:
        _launch_either("dq", attention_hopper.tma_can_address("dq", q, k, v, do), q, plain, run_dq)
    if want_kv:
        _launch_either("dkdv", attention_hopper.tma_can_address("dkdv", q, k, v, do), q, plain, run_dkdv)
    return dq, dk, dv, _sinks_gradient(sinks, lse_2BHT, delta_BHT)


def _sinks_gradient(sinks: torch.Tensor | None, lse_2BHT: torch.Tensor, delta_BHT: torch.Tensor) -> torch.Tensor:
    """Gradient of sinks: minus probability times delta, summed over queries (a sink has no value)."""
    if sinks is None:
        return lse_2BHT.new_empty(0)
    p_BHT = torch.exp2((sinks.float() * math.log2(math.e))[:, None] - lse_2BHT[0])
    if len(lse_2BHT) > 1:
        p_BHT *= torch.exp2(-lse_2BHT[1])
    return -(p_BHT * delta_BHT).sum((0, 2)).to(sinks.dtype)


def _save(ctx, inputs, output):
    q, k, v, sinks, cu, *ctx.meaning = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, cu, *output)


def _gradient(ctx, do, _):
    if do is None:
        return (None,) * 9
    q, k, v, sinks, cu, o, lse = ctx.saved_tensors
    wants = ctx.needs_input_grad
    found = attention_backward(do, q, k, v, o, lse, sinks, cu, *ctx.meaning, wants[0], wants[1] or wants[2])
    return *(dx if want else None for dx, want in zip(found, wants)), *(None,) * 5


_attend = AutogradOp(attention_forward, _save, _gradient)


def check_scale(op: str, scale: float | None) -> None:
    """Refuse a scale that is not positive: the row maximum is taken before scaling."""
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale is {scale}; it must be greater than 0, or None for 1 / sqrt(head dim)")


def check(q, k, v, window, cu_seqlens, scale, sinks):
    """Check shapes and options: a kernel would read out of bounds."""
    H, K = q.shape[-2], k.shape[-2]
    if H % K:
        raise ValueError(f"attention: {H} query heads over {K} key heads; the former must be a multiple of the latter")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or (q.shape[0] != k.shape[0] or q.dim() != k.dim()):
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; it must be at least 1, or None for no limit")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"attention: sinks have shape {tuple(sinks.shape)}; they must be one a query head, ({H},)")
    check_scale("attention", scale)
    if q.dim() != (4 if cu_seqlens is None else 3):
        raise ValueError(f"attention: q has {q.dim()} dimensions; it must be (B, T, H, D), or ragged with cu_seqlens")


def attention_fused(
    q, k, v, *, causal=True, window=None, softcap=None, scale=None, sinks=None, cu_seqlens=None, max_seqlen=None
):
    """Fused implementation of `attention`."""
    check(q, k, v, window, cu_seqlens, scale, sinks)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; they must be of one dtype")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    meaning = (sinks, cu_seqlens, causal, window or 0, float(softcap or 0.0), scale)
    if q.dim() == 4:
        return _attend(q, k, v, *meaning)[0]
    return _attend(q[None], k[None], v[None], *meaning)[0][0]
