
from .lang import tl, triton

from .attention_tiles import (
    LOG2E,
    all_visible,
    capped,
    key_run,
    load_tile,
    place,
    query_run,
    store_tile,
    tile_offsets,
    visible,
)


@triton.jit
def _delta(o, do, delta, cu,
           stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, stride_lb, stride_lh,
           tiles, batch_heads, heads, group, q_len, k_len, sequences,
           RAGGED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    batch, head, row, start, q_len, k_len = place(
        cu, tiles, batch_heads, heads, group, q_len, k_len, sequences, BLOCK_M, RAGGED, False)
    if row >= q_len:
        return
    own = tl.arange(0, BLOCK_M)
    first = tl.cast(start, tl.int64) + row
    o_base = o + batch * stride_ob + head * stride_oh + first * stride_ot
    do_base = do + batch * stride_db + head * stride_dh + first * stride_dt
    o_tile = load_tile(o_base + tile_offsets(own, stride_ot, BLOCK_D), row + own, q_len, D, BLOCK_D, True)
    do_tile = load_tile(do_base + tile_offsets(own, stride_dt, BLOCK_D), row + own, q_len, D, BLOCK_D, True)
    products = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + batch * stride_lb + head * stride_lh + first + own, products, mask=row + own < q_len)


@triton.jit
def _key_gradients(q, k, v, do, lse, delta, dk, dv, cu,
                   stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                   stride_db, stride_dt, stride_dh, stride_dkb, stride_dkt, stride_dkh,
                   stride_dvb, stride_dvt, stride_dvh, stride_lb, stride_lh,
                   tiles, batch_heads, heads, group, q_len, k_len, sequences,
                   SHARE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
                   WINDOW: tl.constexpr, RAGGED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    UNIT: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    """One key block: walk the queries of every head that shares it, in order, so that dk and dv need no atomics."""
    batch, head, key, start, q_len, k_len = place(
        cu, tiles, batch_heads, heads, group, q_len, k_len, sequences, BLOCK_N, RAGGED, False)
    if key >= k_len:
        return
    token = tl.cast(start, tl.int64)
    first = token + key
    own = tl.arange(0, BLOCK_N)
    keys = key + own
    k_base = k + batch * stride_kb + head * stride_kh + first * stride_kt
    v_base = v + batch * stride_vb + head * stride_vh + first * stride_vt
    k_tile = load_tile(k_base + tile_offsets(own, stride_kt, BLOCK_D), keys, k_len, D, BLOCK_D, True)
    v_tile = load_tile(v_base + tile_offsets(own, stride_vt, BLOCK_D), keys, k_len, D, BLOCK_D, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, end = query_run(key, key + BLOCK_N - 1, q_len, k_len - q_len, CAUSAL, WINDOW, BLOCK_M)
    blocks = tl.maximum(tl.cdiv(end - begin, BLOCK_M), 0)
    q_tile = q + batch * stride_qb + token * stride_qt + tile_offsets(tl.arange(0, BLOCK_M), stride_qt, BLOCK_D)
    do_tile = do + batch * stride_db + token * stride_dt + tile_offsets(tl.arange(0, BLOCK_M), stride_dt, BLOCK_D)
    row_stats = batch * stride_lb + token
    for step in tl.range(0, blocks * SHARE):
        q_head = head * SHARE + step // blocks
        row = begin + step % blocks * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        q_block = load_tile(q_tile + (q_head * stride_qh + tl.cast(row, tl.int64) * stride_qt), rows, q_len, D, BLOCK_D, True)
        norm = tl.load(lse + row_stats + q_head * stride_lh + rows, mask=rows < q_len, other=float("inf"))
        scores = tl.dot(k_tile, tl.trans(q_block), input_precision=PRECISION)
        if SOFTCAP > 0:
            scores = capped(scores, SCALE, SOFTCAP)
        p = tl.exp2(scores * UNIT - norm[None, :])
        if CAUSAL or WINDOW > 0:
            position = row + k_len - q_len
            if not all_visible(position, position + BLOCK_M - 1, key, key + BLOCK_N - 1, k_len, CAUSAL, WINDOW):
                seen = visible((rows + (k_len - q_len))[None, :], keys[:, None], k_len, CAUSAL, WINDOW)
                p = tl.where(seen, p, 0.0)
        do_block = load_tile(do_tile + (q_head * stride_dh + tl.cast(row, tl.int64) * stride_dt), rows, q_len, D, BLOCK_D, True)
        dv_acc = tl.dot(p.to(do_block.dtype), do_block, dv_acc, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(do_block), input_precision=PRECISION)
        mean = tl.load(delta + row_stats + q_head * stride_lh + rows, mask=rows < q_len, other=0.0)
        ds = p * (dp - mean[None, :])
        if SOFTCAP > 0:
            ds = ds * (1.0 - scores * scores * (1.0 / SOFTCAP / SOFTCAP))
        dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc, input_precision=PRECISION)
    dk_base = dk + batch * stride_dkb + head * stride_dkh + first * stride_dkt
    dv_base = dv + batch * stride_dvb + head * stride_dvh + first * stride_dvt
    store_tile(dk_base + tile_offsets(own, stride_dkt, BLOCK_D), dk_acc * SCALE, keys, k_len, D, BLOCK_D)
    store_tile(dv_base + tile_offsets(own, stride_dvt, BLOCK_D), dv_acc, keys, k_len, D, BLOCK_D)


@triton.jit
def _query_gradients(q, k, v, do, lse, delta, dq, cu,
                     stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                     stride_db, stride_dt, stride_dh, stride_dqb, stride_dqt, stride_dqh, stride_lb, stride_lh,
                     tiles, batch_heads, heads, group, q_len, k_len, sequences,
                     SHARE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
                     WINDOW: tl.constexpr, RAGGED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    UNIT: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    batch, head, row, start, q_len, k_len = place(
        cu, tiles, batch_heads, heads, group, q_len, k_len, sequences, BLOCK_M, RAGGED, CAUSAL)
    if row >= q_len:
        return
    token = tl.cast(start, tl.int64)
    first = token + row
    own = tl.arange(0, BLOCK_M)
    rows = row + own
    q_base = q + batch * stride_qb + head * stride_qh + first * stride_qt
    do_base = do + batch * stride_db + head * stride_dh + first * stride_dt
    row_stats = batch * stride_lb + head * stride_lh + first + own
    q_tile = load_tile(q_base + tile_offsets(own, stride_qt, BLOCK_D), rows, q_len, D, BLOCK_D, True)
    do_tile = load_tile(do_base + tile_offsets(own, stride_dt, BLOCK_D), rows, q_len, D, BLOCK_D, True)
    norm = tl.load(lse + row_stats, mask=rows < q_len, other=float("inf"))
    mean = tl.load(delta + row_stats, mask=rows < q_len, other=0.0)
    k_tile = k + batch * stride_kb + head // SHARE * stride_kh + token * stride_kt
    v_tile = v + batch * stride_vb + head // SHARE * stride_vh + token * stride_vt
    k_tile += tile_offsets(tl.arange(0, BLOCK_N), stride_kt, BLOCK_D)
    v_tile += tile_offsets(tl.arange(0, BLOCK_N), stride_vt, BLOCK_D)

    position = row + k_len - q_len
    begin, end = key_run(position, position + BLOCK_M - 1, k_len, CAUSAL, WINDOW, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        k_block = load_tile(k_tile + tl.cast(key, tl.int64) * stride_kt, keys, k_len, D, BLOCK_D, True)
        v_block = load_tile(v_tile + tl.cast(key, tl.int64) * stride_vt, keys, k_len, D, BLOCK_D, True)
        scores = tl.dot(q_tile, tl.trans(k_block), input_precision=PRECISION)
        if SOFTCAP > 0:
            scores = capped(scores, SCALE, SOFTCAP)
        p = tl.exp2(scores * UNIT - norm[:, None])
        if not all_visible(position, position + BLOCK_M - 1, key, key + BLOCK_N - 1, k_len, CAUSAL, WINDOW):
            p = tl.where(visible((rows + (k_len - q_len))[:, None], keys[None, :], k_len, CAUSAL, WINDOW), p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_block), input_precision=PRECISION)
        ds = p * (dp - mean[:, None])
        if SOFTCAP > 0:
            ds = ds * (1.0 - scores * scores * (1.0 / SOFTCAP / SOFTCAP))
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc, input_precision=PRECISION)
    dq_base = dq + batch * stride_dqb + head * stride_dqh + first * stride_dqt
    store_tile(dq_base + tile_offsets(own, stride_dqt, BLOCK_D), acc * SCALE, rows, q_len, D, BLOCK_D)
