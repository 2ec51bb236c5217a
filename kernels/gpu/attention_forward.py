"""Attention forward: one block of queries walks over the keys it may see, and the table of scores never exists.

Softmax needs a row's largest score before the first exponential and the row's sum before the first result; the online
form needs neither. It keeps, for each query, the largest score so far, the sum of exponentials relative to it and the
weighted values so far. When a block of keys raises the maximum, sum and values are multiplied down and go on. All of it
in base 2, because a GPU's exponential is: the scale of the scores and log2(e) are one constant.

Besides o, the log-sum-exp of each row (base 2) is kept: from it the backward recomputes every probability exactly,
block by block. A row that sees nothing gets o = 0 and lse = +inf, and then has probability 0 everywhere. In float32
(`WIDE`) its two terms, the row's peak and the logarithm of its sum, are kept apart: their sum would round at the peak's
magnitude, which for peaked rows is the largest error of all.
"""

from ..core.lang import tl, triton
from .attention_tiles import (
    COUNTS,
    LOG2E,
    all_visible,
    capped,
    key_run,
    load_tile,
    place,
    store_tile,
    tile_of_head,
    visible,
)


@triton.jit(do_not_specialize=COUNTS)
def attention_forward_kernel(
    q, k, v, o, lse, cu,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_ls, stride_lb, stride_lh,
    tiles, batch_heads, heads, group, q_len, k_len, sequences,
    SHARE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HALVINGS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    batch, head, row, first, token, q_len, k_len = place(
        cu, tiles, batch_heads, heads, group, q_len, k_len, sequences, BLOCK_M, HALVINGS, CAUSAL
    )
    if row >= q_len:
        return
    own = tl.arange(0, BLOCK_M)
    rows = row + own
    q_at = tile_of_head(q, batch, head, first, own, stride_qb, stride_qt, stride_qh, BLOCK_D)
    q_tile = load_tile(q_at, rows, q_len, D, BLOCK_D)
    step = tl.arange(0, BLOCK_N)
    k_tile = tile_of_head(k, batch, head // SHARE, token, step, stride_kb, stride_kt, stride_kh, BLOCK_D)
    v_tile = tile_of_head(v, batch, head // SHARE, token, step, stride_vb, stride_vt, stride_vh, BLOCK_D)

    position = row + k_len - q_len
    begin, end = key_run(position, position + BLOCK_M - 1, k_len, CAUSAL, WINDOW, BLOCK_N)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        k_block = load_tile(k_tile + tl.cast(key, tl.int64) * stride_kt, keys, k_len, D, BLOCK_D)
        scores = capped(tl.dot(q_tile, tl.trans(k_block), input_precision="ieee"), SCALE, SOFTCAP)
        if not all_visible(position, position + BLOCK_M - 1, key, key + BLOCK_N - 1, k_len, CAUSAL, WINDOW):
            seen = visible((rows + (k_len - q_len))[:, None], keys[None, :], k_len, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * UNIT)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores * UNIT - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        peak = new_peak
        v_block = load_tile(v_tile + tl.cast(key, tl.int64) * stride_vt, keys, k_len, D, BLOCK_D)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision="ieee")

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    o_at = tile_of_head(o, batch, head, first, own, stride_ob, stride_ot, stride_oh, BLOCK_D)
    store_tile(o_at, acc, rows, q_len, D, BLOCK_D)
    peak = tl.where(empty, float("inf"), peak)
    spread = tl.log2(tl.where(empty, 1.0, total))
    stats = lse + batch * stride_lb + head * stride_lh + first + own
    tl.store(stats, peak if WIDE else peak + spread, mask=rows < q_len)
    if WIDE:
        tl.store(stats + stride_ls, spread, mask=rows < q_len)
