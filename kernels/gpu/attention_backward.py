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
    key_run,
    load_tile,
    query_run,
    store_tile,
    through_cap,
    tile_coordinates,
    tile_of_head,
    visible,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_delta_kernel(
    o, do, delta_ptr, cu,
    stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta: the row sums of o · do."""
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
    SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """One block of queries walks over the keys it sees."""
    SCALE_LOG2: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    batch, head, row, first, token, stats, q_len, k_len = tile_coordinates(
        cu, tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences, BLOCK_M, SEARCH_STEPS, CAUSAL
    )
    if row >= q_len:
        return
    own = tl.arange(0, BLOCK_M)
    rows = row + own
    q_at = tile_of_head(q, batch, head, first, own, stride_qb, stride_qt, stride_qh, BLOCK_D)
    do_at = tile_of_head(do, batch, head, first, own, stride_db, stride_dt, stride_dh, BLOCK_D)
    q_tile = load_tile(q_at, rows, q_len, D, BLOCK_D)
    do_tile = load_tile(do_at, rows, q_len, D, BLOCK_D)
    row_stats = batch * stride_lb + head * stride_lh + stats + rows
    lse = tl.load(lse_ptr + row_stats, mask=rows < q_len, other=float("inf"))
    delta = tl.load(delta_ptr + row_stats, mask=rows < q_len, other=0.0)
    if SPLIT_LSE:
        log2_l = tl.load(lse_ptr + row_stats + stride_ls, mask=rows < q_len, other=0.0)
    step = tl.arange(0, BLOCK_N)
    k_tile = tile_of_head(k, batch, head // Q_PER_KV, token, step, stride_kb, stride_kt, stride_kh, BLOCK_D)
    v_tile = tile_of_head(v, batch, head // Q_PER_KV, token, step, stride_vb, stride_vt, stride_vh, BLOCK_D)

    position = row + k_len - q_len
    begin, end = key_run(position, position + BLOCK_M - 1, k_len, CAUSAL, WINDOW, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        k_block = load_tile(k_tile + tl.cast(key, tl.int64) * stride_kt, keys, k_len, D, BLOCK_D)
        v_block = load_tile(v_tile + tl.cast(key, tl.int64) * stride_vt, keys, k_len, D, BLOCK_D)
        scores = capped(tl.dot(q_tile, tl.trans(k_block), input_precision="ieee"), SCALE, SOFTCAP)
        exponents = scores * SCALE_LOG2 - lse[:, None]
        p = tl.exp2(exponents - log2_l[:, None] if SPLIT_LSE else exponents)
        if not all_visible(position, position + BLOCK_M - 1, key, key + BLOCK_N - 1, k_len, CAUSAL, WINDOW):
            p = tl.where(visible((rows + (k_len - q_len))[:, None], keys[None, :], k_len, CAUSAL, WINDOW), p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_block), input_precision="ieee")
        ds = through_cap(p * (dp - delta[:, None]), scores, SOFTCAP)
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc, input_precision="ieee")
    dq_at = tile_of_head(dq, batch, head, first, own, stride_dqb, stride_dqt, stride_dqh, BLOCK_D)
    store_tile(dq_at, acc * SCALE, rows, q_len, D, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dkdv_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dk, dv, cu,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    stride_ls, stride_lb, stride_lh,
    tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    Q_PER_KV: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """One block of keys walks over the queries that see it, head after head of those that share it, in one loop:
    a loop in a loop cost 45 registers. Keys are the rows here, so that P and dS feed their products from registers."""
    SCALE_LOG2: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    batch, head, key, first, token, stats, q_len, k_len = tile_coordinates(
        cu, tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences, BLOCK_N, SEARCH_STEPS, False
    )
    if key >= k_len:
        return
    own = tl.arange(0, BLOCK_N)
    keys = key + own
    k_at = tile_of_head(k, batch, head, first, own, stride_kb, stride_kt, stride_kh, BLOCK_D)
    v_at = tile_of_head(v, batch, head, first, own, stride_vb, stride_vt, stride_vh, BLOCK_D)
    k_tile = load_tile(k_at, keys, k_len, D, BLOCK_D)
    v_tile = load_tile(v_at, keys, k_len, D, BLOCK_D)
    step = tl.arange(0, BLOCK_M)
    q_tile = tile_of_head(q, batch, 0, token, step, stride_qb, stride_qt, stride_qh, BLOCK_D)
    do_tile = tile_of_head(do, batch, 0, token, step, stride_db, stride_dt, stride_dh, BLOCK_D)
    row_stats = batch * stride_lb + stats

    begin, end = query_run(key, key + BLOCK_N - 1, q_len, k_len - q_len, CAUSAL, WINDOW, BLOCK_M)
    blocks = tl.maximum(tl.cdiv(end - begin, BLOCK_M), 0)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for turn in tl.range(0, blocks * Q_PER_KV):
        q_head = head * Q_PER_KV + turn // blocks
        here = begin + tl.cast(turn % blocks, tl.int64) * BLOCK_M
        row = here.to(tl.int32)
        rows = row + tl.arange(0, BLOCK_M)
        places = row_stats + q_head * stride_lh + here + tl.arange(0, BLOCK_M)
        q_block = load_tile(q_tile + (q_head * stride_qh + here * stride_qt), rows, q_len, D, BLOCK_D)
        lse = tl.load(lse_ptr + places, mask=rows < q_len, other=float("inf"))
        scores = capped(tl.dot(k_tile, tl.trans(q_block), input_precision="ieee"), SCALE, SOFTCAP)
        exponents = scores * SCALE_LOG2 - lse[None, :]
        if SPLIT_LSE:
            exponents -= tl.load(lse_ptr + places + stride_ls, mask=rows < q_len, other=0.0)[None, :]
        p = tl.exp2(exponents)
        if CAUSAL or WINDOW > 0:
            position = row + k_len - q_len
            if not all_visible(position, position + BLOCK_M - 1, key, key + BLOCK_N - 1, k_len, CAUSAL, WINDOW):
                seen = visible((rows + (k_len - q_len))[None, :], keys[:, None], k_len, CAUSAL, WINDOW)
                p = tl.where(seen, p, 0.0)
        do_block = load_tile(do_tile + (q_head * stride_dh + here * stride_dt), rows, q_len, D, BLOCK_D)
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_block), input_precision="ieee")
        delta = tl.load(delta_ptr + places, mask=rows < q_len, other=0.0)
        ds = through_cap(p * (dp - delta[None, :]), scores, SOFTCAP)
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc, input_precision="ieee")
    dk_at = tile_of_head(dk, batch, head, first, own, stride_dkb, stride_dkt, stride_dkh, BLOCK_D)
    dv_at = tile_of_head(dv, batch, head, first, own, stride_dvb, stride_dvt, stride_dvh, BLOCK_D)
    store_tile(dk_at, dk_acc * SCALE, keys, k_len, D, BLOCK_D)
    store_tile(dv_at, dv_acc, keys, k_len, D, BLOCK_D)
