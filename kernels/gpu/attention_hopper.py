"""Warp-specialized attention for Hopper, forward and backward: TMA copies and arithmetic by different warps.

An H100 multiplies tiles faster than a program can both fetch them and take exponentials. So the work is split by role.
One warp group (the producer) only asks the copy engine (TMA) for tiles of keys and values, described once by base,
shape and strides; two others (consumers) multiply and take exponentials, one half of the queries each, so that while
one waits for the tensor cores the other keeps them busy. mbarriers say which tile is full and which is free. Within a
group, every `wgmma` is waited for at once: softmax and products of one group do not overlap, as they do in
FlashAttention-3, whose ablation puts a price on it: 582 against 661 TFLOP/s.

Triton makes the split by itself (`warp_specialize`) if the loop is plain: one loop, no branch inside, no early return.
Hence two differences from the portable kernels. Every block is masked, by one comparison with each row's last visible
key: cheap, where exponentials are the bottleneck. And a tile without work walks no keys. Overflow checks
(TRITON_DEBUG=1) would put branches into the loop: here they stay off.

The copy engine fills with zeros what lies outside of a sequence or a head: tails and odd head sizes need no care.
"""

import os
import warnings

import torch

from ..core.lang import HAS_TRITON, architecture, tl, triton
from ..core.launch import is_real
from ..core.tuned import tuned
from .attention_tiles import (
    LOG2E,
    UNSPECIALIZED,
    capped,
    first_peak,
    head_of,
    key_run,
    query_run,
    store_tile,
    through_cap,
    tile_coordinates,
    tile_of_head,
)

NAMES = ("forward", "dq", "dkdv")


def _chosen(setting: str) -> set[str]:
    """The kernels that WARPLOOM_HOPPER names."""
    named = {"1": set(NAMES), "0": set()}.get(setting, set(setting.split(",")))
    if named - set(NAMES):
        raise ValueError(f"WARPLOOM_HOPPER is {setting!r}; valid are 0, 1 and names out of {','.join(NAMES)}")
    return named


hopper_kernels = _chosen(os.environ.get("WARPLOOM_HOPPER", "1"))
"""Which kernels to replace by those of this file: WARPLOOM_HOPPER=0 runs the portable ones on Hopper too."""
_proven: set[str] = set()


@triton.jit
def _described(base, length, stride_t, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """TMA descriptor: what the copy engine needs to know of one head of a sequence."""
    return tl.make_tensor_descriptor(base, [tl.maximum(length, 1), D], [stride_t, 1], [BLOCK, BLOCK_D])


@triton.jit
def _numbers(base, row, length, BLOCK: tl.constexpr):
    """A number for each row of a tile, by the copy engine too: the split cannot halve what is loaded otherwise."""
    return tl.make_tensor_descriptor(base, [tl.maximum(length, 1)], [1], [BLOCK]).load([row])


@triton.jit
def _last_visible(rows, q_len, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The last key that each row sees."""
    last = rows * 0 + (k_len - 1)
    if CAUSAL:
        last = tl.minimum(last, rows + (k_len - q_len))
    elif WINDOW > 0:
        last = tl.minimum(last, rows + (k_len - q_len + WINDOW - 1))
    return last


@triton.jit
def _seen(here, rows, last, q_len, k_len, WINDOW: tl.constexpr):
    """The (rows, keys) table of what is seen."""
    seen = here[None, :] <= last[:, None]
    if WINDOW > 0:
        seen = seen & (here[None, :] > (rows + (k_len - q_len - WINDOW))[:, None])
    return seen


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_hopper_kernel(
    q, k, v, o, lse_ptr, sinks, cu,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_ls, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    Q_PER_KV: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """As `attention_forward_kernel`, argument for argument."""
    SCALE_LOG2: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    batch, head, row, first, token, stats, q_len, k_len = tile_coordinates(
        cu, tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences, BLOCK_M, SEARCH_STEPS, CAUSAL
    )
    idle = row >= q_len
    token = tl.where(idle, 0, token)
    q_base = head_of(q, batch, head, token, stride_qb, stride_qt, stride_qh)
    k_base = head_of(k, batch, head // Q_PER_KV, token, stride_kb, stride_kt, stride_kh)
    v_base = head_of(v, batch, head // Q_PER_KV, token, stride_vb, stride_vt, stride_vh)
    keys = _described(k_base, k_len, stride_kt, D, BLOCK_N, BLOCK_D)
    values = _described(v_base, k_len, stride_vt, D, BLOCK_N, BLOCK_D)
    q_tile = _described(q_base, q_len, stride_qt, D, BLOCK_M, BLOCK_D).load([row, 0])

    own = tl.arange(0, BLOCK_M)
    rows = row + own
    position = row + k_len - q_len
    begin, end = key_run(position, position + BLOCK_M - 1, k_len, CAUSAL, WINDOW, BLOCK_N)
    end = tl.where(idle, begin, end)
    last = _last_visible(rows, q_len, k_len, CAUSAL, WINDOW)
    m_i = first_peak(sinks, head, BLOCK_M)
    l_i = tl.full([BLOCK_M], 0.0 if sinks is None else 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N, warp_specialize=True):
        here = key + tl.arange(0, BLOCK_N)
        k_block = keys.load([key, 0])
        scores = capped(tl.dot(q_tile, tl.trans(k_block)), SCALE, SOFTCAP)
        scores = tl.where(_seen(here, rows, last, q_len, k_len, WINDOW), scores, float("-inf"))
        new_m = tl.maximum(m_i, tl.max(scores, 1) * SCALE_LOG2)
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(scores * SCALE_LOG2 - base[:, None])
        alpha = tl.exp2(m_i - base)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = new_m
        v_block = values.load([key, 0])
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * alpha[:, None])

    empty = l_i == 0.0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    o_at = tile_of_head(o, batch, head, first, own, stride_ob, stride_ot, stride_oh, BLOCK_D)
    store_tile(o_at, acc, rows, q_len, D, BLOCK_D)
    lse = tl.where(empty, float("inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
    tl.store(lse_ptr + batch * stride_lb + head * stride_lh + stats + rows, lse, mask=rows < q_len)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_hopper_dq_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dq, cu,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_dqb, stride_dqt, stride_dqh, stride_ls, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    Q_PER_KV: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """As `attention_dq_kernel`, argument for argument."""
    SCALE_LOG2: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    batch, head, row, first, token, stats, q_len, k_len = tile_coordinates(
        cu, tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences, BLOCK_M, SEARCH_STEPS, CAUSAL
    )
    idle = row >= q_len
    token = tl.where(idle, 0, token)
    q_base = head_of(q, batch, head, token, stride_qb, stride_qt, stride_qh)
    do_base = head_of(do, batch, head, token, stride_db, stride_dt, stride_dh)
    k_base = head_of(k, batch, head // Q_PER_KV, token, stride_kb, stride_kt, stride_kh)
    v_base = head_of(v, batch, head // Q_PER_KV, token, stride_vb, stride_vt, stride_vh)
    keys = _described(k_base, k_len, stride_kt, D, BLOCK_N, BLOCK_D)
    values = _described(v_base, k_len, stride_vt, D, BLOCK_N, BLOCK_D)
    q_tile = _described(q_base, q_len, stride_qt, D, BLOCK_M, BLOCK_D).load([row, 0])
    do_tile = _described(do_base, q_len, stride_dt, D, BLOCK_M, BLOCK_D).load([row, 0])

    own = tl.arange(0, BLOCK_M)
    rows = row + own
    stats += batch * stride_lb + head * stride_lh
    lse = _numbers(lse_ptr + stats, row, q_len, BLOCK_M)
    delta = _numbers(delta_ptr + stats, row, q_len, BLOCK_M)
    position = row + k_len - q_len
    begin, end = key_run(position, position + BLOCK_M - 1, k_len, CAUSAL, WINDOW, BLOCK_N)
    end = tl.where(idle, begin, end)
    last = _last_visible(rows, q_len, k_len, CAUSAL, WINDOW)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N, warp_specialize=True):
        here = key + tl.arange(0, BLOCK_N)
        k_block = keys.load([key, 0])
        v_block = values.load([key, 0])
        scores = tl.dot(q_tile, tl.trans(k_block))
        dp = tl.dot(do_tile, tl.trans(v_block))
        scores = capped(scores, SCALE, SOFTCAP)
        p = tl.exp2(scores * SCALE_LOG2 - lse[:, None])
        p = tl.where(_seen(here, rows, last, q_len, k_len, WINDOW), p, 0.0)
        ds = through_cap(p * (dp - delta[:, None]), scores, SOFTCAP)
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc)
    dq_at = tile_of_head(dq, batch, head, first, own, stride_dqb, stride_dqt, stride_dqh, BLOCK_D)
    store_tile(dq_at, acc * SCALE, rows, q_len, D, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_hopper_dkdv_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dk, dv, cu,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    stride_ls, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    Q_PER_KV: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """As `attention_dkdv_kernel`, argument for argument.

    Rows behind the last query arrive as zeros and add nothing, keys behind the last are not stored: neither is masked.
    """
    SCALE_LOG2: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    batch, head, key, first, token, stats, q_len, k_len = tile_coordinates(
        cu, tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences, BLOCK_N, SEARCH_STEPS, False
    )
    idle = key >= k_len
    token = tl.where(idle, 0, token)
    own = tl.arange(0, BLOCK_N)
    keys = key + own
    k_base = head_of(k, batch, head, token, stride_kb, stride_kt, stride_kh)
    v_base = head_of(v, batch, head, token, stride_vb, stride_vt, stride_vh)
    k_tile = _described(k_base, k_len, stride_kt, D, BLOCK_N, BLOCK_D).load([key, 0])
    v_tile = _described(v_base, k_len, stride_vt, D, BLOCK_N, BLOCK_D).load([key, 0])
    q_heads, length = heads * Q_PER_KV, tl.maximum(q_len, 1)
    queries = tl.make_tensor_descriptor(
        head_of(q, batch, 0, token, stride_qb, stride_qt, stride_qh),
        [q_heads, length, D], [stride_qh, stride_qt, 1], [1, BLOCK_M, BLOCK_D],
    )  # fmt: skip
    upstream = tl.make_tensor_descriptor(
        head_of(do, batch, 0, token, stride_db, stride_dt, stride_dh),
        [q_heads, length, D], [stride_dh, stride_dt, 1], [1, BLOCK_M, BLOCK_D],
    )  # fmt: skip
    stats += batch * stride_lb
    lse_rows = tl.make_tensor_descriptor(lse_ptr + stats, [q_heads, length], [stride_lh, 1], [1, BLOCK_M])
    delta_rows = tl.make_tensor_descriptor(delta_ptr + stats, [q_heads, length], [stride_lh, 1], [1, BLOCK_M])

    begin, end = query_run(key, key + BLOCK_N - 1, q_len, k_len - q_len, CAUSAL, WINDOW, BLOCK_M)
    end = tl.where(idle, begin, end)
    blocks = tl.maximum(tl.cdiv(end - begin, BLOCK_M), 0)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for turn in tl.range(0, blocks * Q_PER_KV, warp_specialize=True):
        q_head = (head * Q_PER_KV).to(tl.int32) + turn // blocks
        row = begin + turn % blocks * BLOCK_M
        q_block = queries.load([q_head, row, 0]).reshape(BLOCK_M, BLOCK_D)
        do_block = upstream.load([q_head, row, 0]).reshape(BLOCK_M, BLOCK_D)
        lse = lse_rows.load([q_head, row])
        delta = delta_rows.load([q_head, row])
        scores = capped(tl.dot(k_tile, tl.trans(q_block)), SCALE, SOFTCAP)
        p = tl.exp2(scores * SCALE_LOG2 - lse)
        there = row + (k_len - q_len) + tl.arange(0, BLOCK_M)
        if CAUSAL:
            p = tl.where(keys[:, None] <= there[None, :], p, 0.0)
        if WINDOW > 0:
            p = tl.where(keys[:, None] > (there - WINDOW)[None, :], p, 0.0)
            if not CAUSAL:
                p = tl.where(keys[:, None] < (there + WINDOW)[None, :], p, 0.0)
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc)
        dp = tl.dot(v_tile, tl.trans(do_block))
        ds = through_cap(p * (dp - delta), scores, SOFTCAP)
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc)
    dk_at = tile_of_head(dk, batch, head, first, own, stride_dkb, stride_dkt, stride_dkh, BLOCK_D)
    dv_at = tile_of_head(dv, batch, head, first, own, stride_dvb, stride_dvt, stride_dvh, BLOCK_D)
    store_tile(dk_at, dk_acc * SCALE, keys, k_len, D, BLOCK_D)
    store_tile(dv_at, dv_acc, keys, k_len, D, BLOCK_D)


def tma_can_address(kernel: str, *tensors: torch.Tensor) -> bool:
    """Return whether the copy engine can address these tensors (B, T, H, D), and this device has one that we know."""
    q = tensors[0]
    if kernel not in hopper_kernels or architecture(q.device) != 90:
        return False
    return q.dtype.itemsize == 2 and q.shape[3] <= 128 and all(map(_addressable, tensors))


def _addressable(x: torch.Tensor) -> bool:
    """The copy engine wants neighbors in the last dimension, all else at multiples of 16 bytes, and no stride of 0,
    as that of a gradient expanded over tokens or heads."""
    base = x.data_ptr() if is_real((x,)) and x.device.type != "meta" else x.storage_offset() * x.itemsize
    steps = (*(n * x.itemsize for n in x.stride()[:3]), base)
    return x.numel() > 0 and x.stride(3) == 1 and min(x.stride()[1:3]) > 0 and not any(n % 16 for n in steps)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Room for the descriptors that programs write, on the device of the launch, which is the current one."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def kernel_and_tile(kernel: str, D: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """The kernel to launch, for "forward", "dq" or "dkdv", and its tile. To be called before each launch, in its
    thread: Triton asks this thread's allocator for the descriptors' room, ours where nobody has set one."""
    if HAS_TRITON:
        from triton.runtime import _allocation

        if type(_allocation._allocator.get()) is _allocation.NullAllocator:
            triton.set_allocator(_scratch)
    return KERNELS[kernel], tile_of(kernel, D, dtype, device)


def gives_up(kernel: str, error: Exception) -> bool:
    """Return whether a launch that failed was this kernel's first, as on a compiler that refuses it. It is not tried
    again."""
    if kernel in _proven:
        return False
    hopper_kernels.discard(kernel)
    said = (str(error).splitlines() or [""])[0][:200]
    warnings.warn(
        f"attention: the Hopper kernel {kernel!r} could not be launched ({type(error).__name__}: {said}); the portable "
        f"one takes its place. WARPLOOM_HOPPER=0 does so from the start.",
        stacklevel=2,
    )
    return True


def works(kernel: str) -> None:
    """A launch went well: what fails from now on is an error."""
    _proven.add(kernel)


def tile_of(kernel: str, D: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Four warps, which the compiler multiplies by three; with more it ignores the split."""
    M, N = {"forward": (128, 128), "dq": (128, 64), "dkdv": (64 if D <= 64 else 32, 128)}[kernel]
    default = {"BLOCK_M": M, "BLOCK_N": N, "num_warps": 4, "num_stages": 2}
    chosen = tuned(f"attention_hopper_{kernel}", device, f"{D} {str(dtype)[6:]}", default)
    return {**chosen, "sanitize_overflow": False}


KERNELS = {"forward": attention_hopper_kernel, "dq": attention_hopper_dq_kernel, "dkdv": attention_hopper_dkdv_kernel}
