"""Attention forward: a program a block of queries, with online softmax over blocks of keys (FlashAttention).

Softmax needs a row's largest score before the first exponential and the row's sum before the first result; the online
form needs neither. It keeps, for each query, the largest score so far, the sum of exponentials relative to it and the
weighted values so far. When a block of keys raises the maximum, sum and values are multiplied down and go on. All of it
in base 2, because a GPU's exponential is: the scale of the scores and log2(e) are one constant.

A sink (gpt-oss) is a score without a value: the walk starts from it instead of from nothing, and the backward needs no
word of it, for probabilities come from the log-sum-exp and the row sum of o · do is the softmax's with or without.

Besides o, the log-sum-exp of each row (base 2) is kept: from it the backward recomputes every probability exactly,
block by block. A row that sees nothing gets o = 0 and lse = +inf, and then has probability 0 everywhere. In float32
(`SPLIT_LSE`) its two terms, the row's maximum and the logarithm of its sum, are kept apart: their sum would round at
the maximum's magnitude, which for peaked rows is the largest error of all.
"""

from ..core.lang import tl, triton
from .attention_tiles import (
    LOG2E,
    UNSPECIALIZED,
    capped,
    head_of,
    hide,
    initial_max,
    key_run,
    last_visible,
    load_rows,
    rows_of,
    store_tile,
    tile_coordinates,
    tile_of_head,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    q, k, v, o, lse_ptr, sinks, cu,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_ls, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    Q_PER_KV: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_LSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    SCALE_LOG2: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    batch, head, row, first, token, stats, q_len, k_len = tile_coordinates(
        cu, tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences, BLOCK_M, SEARCH_STEPS, CAUSAL
    )
    idle = row >= q_len
    token = tl.where(idle, 0, token)
    q_base = head_of(q, batch, head, token, stride_qb, stride_qt, stride_qh)
    k_base = head_of(k, batch, head // Q_PER_KV, token, stride_kb, stride_kt, stride_kh)
    v_base = head_of(v, batch, head // Q_PER_KV, token, stride_vb, stride_vt, stride_vh)
    keys = rows_of(k_base, k_len, stride_kt, D, BLOCK_N, BLOCK_D, TMA)
    values = rows_of(v_base, k_len, stride_vt, D, BLOCK_N, BLOCK_D, TMA)
    queries = rows_of(q_base, q_len, stride_qt, D, BLOCK_M, BLOCK_D, TMA)
    q_tile = load_rows(queries, row, q_len, stride_qt, D, BLOCK_M, BLOCK_D, TMA)

    own = tl.arange(0, BLOCK_M)
    rows = row + own
    position = row + k_len - q_len
    begin, end = key_run(position, position + BLOCK_M - 1, k_len, CAUSAL, WINDOW, BLOCK_N)
    end = tl.where(idle, begin, end)
    last = last_visible(rows, q_len, k_len, CAUSAL, WINDOW)
    m_i = initial_max(sinks, head, BLOCK_M)
    l_i = tl.full([BLOCK_M], 0.0 if sinks is None else 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N, warp_specialize=TMA):
        k_block = load_rows(keys, key, k_len, stride_kt, D, BLOCK_N, BLOCK_D, TMA)
        scores = capped(tl.dot(q_tile, tl.trans(k_block), input_precision="ieee"), SCALE, SOFTCAP)
        scores = hide(
            scores, float("-inf"), position, rows, last, key, q_len, k_len, CAUSAL, WINDOW, BLOCK_M, BLOCK_N, TMA
        )
        new_m = tl.maximum(m_i, tl.max(scores, 1) * SCALE_LOG2)
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(scores * SCALE_LOG2 - base[:, None])
        alpha = tl.exp2(m_i - base)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = new_m
        v_block = load_rows(values, key, k_len, stride_vt, D, BLOCK_N, BLOCK_D, TMA)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * alpha[:, None], input_precision="ieee")

    empty = l_i == 0.0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    o_at = tile_of_head(o, batch, head, first, own, stride_ob, stride_ot, stride_oh, BLOCK_D)
    store_tile(o_at, acc, rows, q_len, D, BLOCK_D)
    m_i = tl.where(empty, float("inf"), m_i)
    log2_l = tl.log2(tl.where(empty, 1.0, l_i))
    lse = lse_ptr + batch * stride_lb + head * stride_lh + stats + rows
    tl.store(lse, m_i if SPLIT_LSE else m_i + log2_l, mask=rows < q_len)
    if SPLIT_LSE:
        tl.store(lse + stride_ls, log2_l, mask=rows < q_len)
