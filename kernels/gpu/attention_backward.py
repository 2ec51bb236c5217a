"""Attention backward: dq by blocks of queries, dk and dv by blocks of keys, each summed in a fixed order.

With P the probabilities and dP = dO·Vᵀ, the gradient of the scores is dS = P · (dP − delta), where delta, the row sum
of P · dP, equals the row sum of O · dO and costs one pass over two tensors. Then dQ = dS·K, dK = dSᵀ·Q, dV = Pᵀ·dO. One
kernel could compute all three if dQ were added up with atomics, in a different order every run. Two kernels compute P
twice (seven products a block instead of five) and give the same bits every time.

P and dS are rounded to the inputs' dtype for their products. In float16 with a large loss scale dS can exceed 65504 and
become infinite, as in FlashAttention-2: the scale then falls by itself, as for any other overflow.
"""

from ..core.lang import tl, triton
from .attention_tiles import (
    LOG2E,
    UNSPECIALIZED,
    all_visible,
    capped,
    head_numbers_of,
    head_of,
    heads_of,
    hide,
    key_run,
    last_visible,
    load_head_numbers,
    load_head_rows,
    load_numbers,
    load_rows,
    load_tile,
    query_run,
    rows_of,
    store_tile,
    through_cap,
    tile_coordinates,
    tile_of_head,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_delta_kernel(
    o, do, delta_ptr, cu,
    stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """FlashAttention's delta: row sums of o · do."""
    batch, head, row, first, _token, stats, q_len, k_len = tile_coordinates(
        cu, tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences, BLOCK_M, SEARCH_STEPS, False
    )
    if row >= q_len:
        return
    own = tl.arange(0, BLOCK_M)
    o_at = tile_of_head(o, batch, head, first, own, stride_ob, stride_ot, stride_oh, BLOCK_D)
    do_at = tile_of_head(do, batch, head, first, own, stride_db, stride_dt, stride_dh, BLOCK_D)
    o_tile = load_tile(o_at, row + own, q_len, D, BLOCK_D)
    do_tile = load_tile(do_at, row + own, q_len, D, BLOCK_D)
    products = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta_ptr + batch * stride_lb + head * stride_lh + stats + row + own, products, mask=row + own < q_len)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dq_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dq, cu,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_dqb, stride_dqt, stride_dqh, stride_ls, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    Q_PER_KV: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_LSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, in a loop over visible keys."""
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
    keys = rows_of(k_base, k_len, stride_kt, D, BLOCK_N, BLOCK_D, TMA)
    values = rows_of(v_base, k_len, stride_vt, D, BLOCK_N, BLOCK_D, TMA)
    queries = rows_of(q_base, q_len, stride_qt, D, BLOCK_M, BLOCK_D, TMA)
    upstream = rows_of(do_base, q_len, stride_dt, D, BLOCK_M, BLOCK_D, TMA)
    q_tile = load_rows(queries, row, q_len, stride_qt, D, BLOCK_M, BLOCK_D, TMA)
    do_tile = load_rows(upstream, row, q_len, stride_dt, D, BLOCK_M, BLOCK_D, TMA)

    own = tl.arange(0, BLOCK_M)
    rows = row + own
    stats += batch * stride_lb + head * stride_lh
    lse = load_numbers(lse_ptr + stats, row, q_len, BLOCK_M, TMA)
    delta = load_numbers(delta_ptr + stats, row, q_len, BLOCK_M, TMA)
    if SPLIT_LSE:
        log2_l = load_numbers(lse_ptr + stats + stride_ls, row, q_len, BLOCK_M, TMA)
    position = row + k_len - q_len
    begin, end = key_run(position, position + BLOCK_M - 1, k_len, CAUSAL, WINDOW, BLOCK_N)
    end = tl.where(idle, begin, end)
    last = last_visible(rows, q_len, k_len, CAUSAL, WINDOW)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N, warp_specialize=TMA):
        k_block = load_rows(keys, key, k_len, stride_kt, D, BLOCK_N, BLOCK_D, TMA)
        v_block = load_rows(values, key, k_len, stride_vt, D, BLOCK_N, BLOCK_D, TMA)
        scores = tl.dot(q_tile, tl.trans(k_block), input_precision="ieee")
        dp = tl.dot(do_tile, tl.trans(v_block), input_precision="ieee")
        scores = capped(scores, SCALE, SOFTCAP)
        exponents = scores * SCALE_LOG2 - lse[:, None]
        p = tl.exp2(exponents - log2_l[:, None] if SPLIT_LSE else exponents)
        p = hide(p, 0.0, position, rows, last, key, q_len, k_len, CAUSAL, WINDOW, BLOCK_M, BLOCK_N, TMA)
        ds = through_cap(p * (dp - delta[:, None]), scores, SOFTCAP)
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc, input_precision="ieee")
    dq_at = tile_of_head(dq, batch, head, first, own, stride_dqb, stride_dqt, stride_dqh, BLOCK_D)
    store_tile(dq_at, acc * SCALE, rows, q_len, D, BLOCK_D)


@triton.jit
def _hide_keys(
    p, position, key, keys, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Mask (BLOCK_N, BLOCK_M) probabilities: zero where a row does not see a key. `position`: of the first row."""
    if TMA or not all_visible(position, position + BLOCK_M - 1, key, key + BLOCK_N - 1, k_len, CAUSAL, WINDOW):
        there = position + tl.arange(0, BLOCK_M)
        if CAUSAL:
            p = tl.where(keys[:, None] <= there[None, :], p, 0.0)
        if WINDOW > 0:
            p = tl.where(keys[:, None] > (there - WINDOW)[None, :], p, 0.0)
            if not CAUSAL:
                p = tl.where(keys[:, None] < (there + WINDOW)[None, :], p, 0.0)
    return p


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dkdv_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dk, dv, cu,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    stride_ls, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    Q_PER_KV: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_LSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, in one loop over the queries that see it, over all heads of its group:
    a loop in a loop cost 45 registers. Keys are the rows here, so that P and dS feed their products from registers.

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
    k_rows = rows_of(k_base, k_len, stride_kt, D, BLOCK_N, BLOCK_D, TMA)
    v_rows = rows_of(v_base, k_len, stride_vt, D, BLOCK_N, BLOCK_D, TMA)
    k_tile = load_rows(k_rows, key, k_len, stride_kt, D, BLOCK_N, BLOCK_D, TMA)
    v_tile = load_rows(v_rows, key, k_len, stride_vt, D, BLOCK_N, BLOCK_D, TMA)
    q_heads = heads * Q_PER_KV
    q_base = head_of(q, batch, 0, token, stride_qb, stride_qt, stride_qh)
    do_base = head_of(do, batch, 0, token, stride_db, stride_dt, stride_dh)
    queries = heads_of(q_base, q_heads, q_len, stride_qh, stride_qt, D, BLOCK_M, BLOCK_D, TMA)
    upstream = heads_of(do_base, q_heads, q_len, stride_dh, stride_dt, D, BLOCK_M, BLOCK_D, TMA)
    stats += batch * stride_lb
    lse_rows = head_numbers_of(lse_ptr + stats, q_heads, q_len, stride_lh, BLOCK_M, TMA)
    delta_rows = head_numbers_of(delta_ptr + stats, q_heads, q_len, stride_lh, BLOCK_M, TMA)

    begin, end = query_run(key, key + BLOCK_N - 1, q_len, k_len - q_len, CAUSAL, WINDOW, BLOCK_M)
    end = tl.where(idle, begin, end)
    blocks = tl.maximum(tl.cdiv(end - begin, BLOCK_M), 0)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for turn in tl.range(0, blocks * Q_PER_KV, warp_specialize=TMA):
        q_head = (head * Q_PER_KV).to(tl.int32) + turn // blocks
        row = (begin + tl.cast(turn % blocks, tl.int64) * BLOCK_M).to(tl.int32)
        q_block = load_head_rows(queries, q_head, row, q_len, stride_qh, stride_qt, D, BLOCK_M, BLOCK_D, TMA)
        lse = load_head_numbers(lse_rows, q_head, row, q_len, stride_lh, BLOCK_M, TMA)
        scores = capped(tl.dot(k_tile, tl.trans(q_block), input_precision="ieee"), SCALE, SOFTCAP)
        exponents = scores * SCALE_LOG2 - lse
        if SPLIT_LSE:
            exponents -= load_head_numbers(lse_rows + stride_ls, q_head, row, q_len, stride_lh, BLOCK_M, TMA)
        p = tl.exp2(exponents)
        p = _hide_keys(p, row + (k_len - q_len), key, keys, k_len, CAUSAL, WINDOW, BLOCK_M, BLOCK_N, TMA)
        do_block = load_head_rows(upstream, q_head, row, q_len, stride_dh, stride_dt, D, BLOCK_M, BLOCK_D, TMA)
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_block), input_precision="ieee")
        delta = load_head_numbers(delta_rows, q_head, row, q_len, stride_lh, BLOCK_M, TMA)
        ds = through_cap(p * (dp - delta), scores, SOFTCAP)
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc, input_precision="ieee")
    dk_at = tile_of_head(dk, batch, head, first, own, stride_dkb, stride_dkt, stride_dkh, BLOCK_D)
    dv_at = tile_of_head(dv, batch, head, first, own, stride_dvb, stride_dvt, stride_dvh, BLOCK_D)
    store_tile(dk_at, dk_acc * SCALE, keys, k_len, D, BLOCK_D)
    store_tile(dv_at, dv_acc, keys, k_len, D, BLOCK_D)
