"""The kernels of paged attention: prefill chunks and decode rows of one batch, in one grid that never changes.

A decode row is one query against a long context: nothing to compute and everything to read. So the query heads that
share a key head form one tile (its keys are read once), and the context is cut into segments that are read at the same
time by different programs; a second kernel adds the segments up in order. How a context is cut depends on its length
and on nothing else, so a row's bits do not depend on its neighbors. A chunk of queries has work enough for itself: a
tile is some tokens times the heads that share a key head, and walks the whole context.

The grid has room for the worst case (every sequence decoding with the longest context, or all tokens in chunks) and
programs without work leave at once: lengths stay on the device, and a CUDA graph can hold the launch.

T tokens, N sequences, H query heads, K key heads, G = H / K, D head dim, P pages.
"""

import torch

from .attention_fused import halvings
from .attention_tiles import LOG2E, capped, owner_of, visible
from .fused import launch, launcher
from .lang import architecture, cdiv, next_power_of_2, tl, triton
from .tuned import tuned

SPLITS = 32
"""A context is cut into at most this many segments."""
SEGMENT = 256
"""And into none shorter than this: a smaller one is read before a program has started."""
COUNTS = ("sequences", "splits", "decoding", "stride_table", "stride_sn", "stride_sh")
"""Arguments that change from step to step: no kernel is compiled for their values, in the middle of serving."""


@triton.jit
def _walk(
    q, q_pos, k_pages, v_pages, pages, begin, end,
    stride_kp, stride_ks, stride_vp, stride_vs, k_scale,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries over the keys begin..end of one sequence: (peak, total, weighted values)."""
    UNIT: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    columns = tl.arange(0, BLOCK_D)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        page = tl.load(pages + keys // PAGE, mask=keys < end, other=0).to(tl.int64)
        slot = (keys % PAGE).to(tl.int64)
        inside = (keys[:, None] < end) & (columns[None, :] < D)
        k_offsets = (page * stride_kp + slot * stride_ks)[:, None] + columns[None, :]
        k = tl.load(k_pages + k_offsets, mask=inside, other=0.0).to(q.dtype)
        scores = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * k_scale, SCALE, SOFTCAP)
        seen = visible(q_pos[:, None], keys[None, :], end, True, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * UNIT)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores * UNIT - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        peak = new_peak
        v_offsets = (page * stride_vp + slot * stride_vs)[:, None] + columns[None, :]
        v = tl.load(v_pages + v_offsets, mask=inside, other=0.0).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return peak, total, acc


@triton.jit
def _tile_of_queries(
    q, first, rows_left, head, row_token, row_head, stride_qt, stride_qh,
    SHARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows are tokens times the heads that share key head `head`: their offsets into q or o, and which exist."""
    columns = tl.arange(0, BLOCK_D)
    heads = head * SHARE + row_head
    offsets = ((first + row_token) * stride_qt + heads * stride_qh)[:, None] + columns[None, :]
    inside = ((row_token < rows_left) & (row_head < SHARE))[:, None] & (columns[None, :] < D)
    return tl.load(q + offsets, mask=inside, other=0.0), inside


@triton.jit
def segment_of(length, SPLITS: tl.constexpr, SEGMENT: tl.constexpr):
    """How many keys a segment has, given how many keys there are."""
    return tl.maximum(SEGMENT, tl.cdiv(tl.cdiv(length, SPLITS), 64) * 64)


@triton.jit(do_not_specialize=COUNTS)
def paged_attention_kernel(
    q, k_pages, v_pages, table, contexts, starts, o, partial, stats,
    stride_qt, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_table,
    stride_ot, stride_oh, stride_pn, stride_ph, stride_ps, stride_sn, stride_sh, stride_ss,
    sequences, splits, decoding, k_scales, v_scales,
    SHARE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, SEGMENT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HALVINGS: tl.constexpr, DECODE_M: tl.constexpr, CHUNK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    k_scale = tl.load(k_scales + head).to(tl.float32) if K_SCALED else tl.full([], 1.0, tl.float32)
    v_scale = tl.load(v_scales + head).to(tl.float32) if V_SCALED else tl.full([], 1.0, tl.float32)
    k_pages += head * stride_kh
    v_pages += head * stride_vh
    columns = tl.arange(0, BLOCK_D)
    if pid < decoding:
        sequence = pid // splits
        split = pid % splits
        first = tl.load(starts + sequence).to(tl.int64)
        if tl.load(starts + sequence + 1) - first == 1:
            context = tl.load(contexts + sequence).to(tl.int32)
            begin = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
            segment = segment_of(context - begin, SPLITS, SEGMENT)
            here = begin + split * segment
            if here < context:
                row_head = tl.arange(0, DECODE_M)
                row_token = row_head * 0
                tile, inside = _tile_of_queries(
                    q, first, 1, head, row_token, row_head, stride_qt, stride_qh, SHARE, D, BLOCK_D
                )
                end = tl.minimum(here + segment, context)
                peak, total, acc = _walk(
                    tile, row_token + context - 1, k_pages, v_pages,
                    table + sequence.to(tl.int64) * stride_table, here, end,
                    stride_kp, stride_ks, stride_vp, stride_vs, k_scale,
                    SCALE, SOFTCAP, WINDOW, PAGE, D, BLOCK_D, DECODE_M, BLOCK_N,
                )  # fmt: skip
                heads = head * SHARE + row_head
                slot = sequence.to(tl.int64) * stride_pn + heads * stride_ph + tl.cast(split, tl.int64) * stride_ps
                tl.store(partial + (slot[:, None] + columns[None, :]), acc * v_scale, mask=inside)
                slot = sequence.to(tl.int64) * stride_sn + heads * stride_sh + tl.cast(split, tl.int64) * stride_ss
                tl.store(stats + slot, peak, mask=row_head < SHARE)
                tl.store(stats + slot + 1, total, mask=row_head < SHARE)
    else:
        BLOCK_Q: tl.constexpr = CHUNK_M // SHARE
        tile_number = pid - decoding
        sequence = owner_of(tile_number, starts, sequences, BLOCK_Q, HALVINGS)
        begin_token = tl.load(starts + sequence).to(tl.int32)
        queries = tl.load(starts + sequence + 1).to(tl.int32) - begin_token
        token = (tile_number - (begin_token // BLOCK_Q + sequence)).to(tl.int64) * BLOCK_Q
        if (queries > 1) & (token < queries):
            context = tl.load(contexts + sequence).to(tl.int32)
            own = tl.arange(0, CHUNK_M)
            row_token = own // SHARE
            row_head = tl.where(row_token < BLOCK_Q, own % SHARE, SHARE)
            tile, inside = _tile_of_queries(
                q, begin_token + token, queries - token, head, row_token, row_head, stride_qt, stride_qh,
                SHARE, D, BLOCK_D,
            )  # fmt: skip
            q_pos = context - queries + token.to(tl.int32) + row_token
            lowest = context - queries + token.to(tl.int32)
            here = tl.maximum(lowest - WINDOW + 1, 0) if WINDOW > 0 else 0
            end = tl.minimum(lowest + BLOCK_Q, context)
            peak, total, acc = _walk(
                tile, q_pos, k_pages, v_pages, table + tl.cast(sequence, tl.int64) * stride_table, here, end,
                stride_kp, stride_ks, stride_vp, stride_vs, k_scale,
                SCALE, SOFTCAP, WINDOW, PAGE, D, BLOCK_D, CHUNK_M, BLOCK_N,
            )  # fmt: skip
            acc = acc * v_scale / tl.where(total == 0.0, 1.0, total)[:, None]
            heads = head * SHARE + row_head
            offsets = ((begin_token + token + row_token) * stride_ot + heads * stride_oh)[:, None] + columns[None, :]
            tl.store(o + offsets, acc.to(o.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS[-2:])
def paged_attention_sum_kernel(
    partial, stats, contexts, starts, o,
    stride_ot, stride_oh, stride_pn, stride_ph, stride_ps, stride_sn, stride_sh, stride_ss,
    WINDOW: tl.constexpr, SPLITS: tl.constexpr, SEGMENT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one decode row: add up its segments, first to last."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) - first != 1:
        return
    context = tl.load(contexts + sequence).to(tl.int32)
    length = tl.minimum(context, WINDOW) if WINDOW > 0 else context
    segments = tl.cdiv(length, segment_of(length, SPLITS, SEGMENT))
    columns = tl.arange(0, BLOCK_D)
    here = tl.arange(0, SPLITS)
    stats += sequence * stride_sn + head * stride_sh
    peaks = tl.load(stats + here.to(tl.int64) * stride_ss, mask=here < segments, other=float("-inf"))
    peak = tl.max(peaks, 0)
    partial += sequence * stride_pn + head * stride_ph
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = tl.max(peaks, 0) * 0.0
    for segment in tl.range(0, segments):
        at = tl.cast(segment, tl.int64)
        weight = tl.exp2(tl.load(stats + at * stride_ss) - peak)
        total += weight * tl.load(stats + at * stride_ss + 1)
        acc += weight * tl.load(partial + at * stride_ps + columns, mask=columns < D, other=0.0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(o + first * stride_ot + head * stride_oh + columns, acc.to(o.dtype.element_ty), mask=columns < D)


def _tile(G: int, D: int, dtype: torch.dtype, device: torch.device) -> dict:
    """By the model and the device alone, never by the batch: a row's bits must not depend on its neighbors."""
    rows = max(16, next_power_of_2(G))
    arch = architecture(device)
    if arch == 0 or dtype == torch.float32:
        chunk, block, stages = 16, 32, 1
    else:
        narrow = (128 if arch >= 90 else 64) < D or D % 16  # odd heads: an address a number, in two registers
        chunk, block, stages = 64, 32 if narrow else 64, 3
    default = {"CHUNK_M": max(chunk, rows), "BLOCK_N": block, "num_warps": 4, "num_stages": stages}
    return {"DECODE_M": rows, **tuned("paged_attention", device, f"{G} {D} {str(dtype)[6:]}", default)}


@launcher
def paged_attention_forward(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_lens: torch.Tensor,
    window: int,
    softcap: float,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    q, page_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, page_table))
    T, H, D = q.shape
    N, width = page_table.shape
    page, K = k_pages.shape[1:3]
    G = H // K
    o_THD = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts = torch.zeros(N + 1, dtype=torch.int32, device=q.device)
    starts[1:] = query_lens.cumsum(0)
    tile = _tile(G, D, q.dtype, q.device)
    longest = min(width * page, window or width * page)
    splits = min(SPLITS, cdiv(longest, SEGMENT))
    partial = torch.empty(N, H, splits, D, dtype=torch.float32, device=q.device)
    stats = torch.empty(N, H, splits, 2, dtype=torch.float32, device=q.device)
    shape = {"WINDOW": window, "SPLITS": SPLITS, "SEGMENT": SEGMENT, "D": D, "BLOCK_D": max(16, next_power_of_2(D))}
    launch(
        paged_attention_kernel, (N * splits + T // (tile["CHUNK_M"] // G) + N, K),
        q, k_pages, v_pages, page_table, context_lens, starts, o_THD, partial, stats,
        *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0),
        *o_THD.stride()[:2], *partial.stride()[:3], *stats.stride()[:3],
        N, splits, N * splits, q if k_scale is None else k_scale, q if v_scale is None else v_scale,
        SHARE=G, SCALE=scale, SOFTCAP=softcap, PAGE=page, HALVINGS=halvings(N), **shape, **tile,
        K_SCALED=k_scale is not None, V_SCALED=v_scale is not None,
    )  # fmt: skip
    launch(
        paged_attention_sum_kernel, (N, H),
        partial, stats, context_lens, starts, o_THD,
        *o_THD.stride()[:2], *partial.stride()[:3], *stats.stride()[:3], **shape,
    )  # fmt: skip
    return o_THD


def paged_attention_fused(
    q, k_pages, v_pages, page_table, context_lens, query_lens,
    *, window=None, softcap=None, scale=None, k_scale=None, v_scale=None,
):  # fmt: skip
    """The fused twin of `paged_attention`: same arguments, same meaning."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lengths = page_table, context_lens, query_lens
    return paged_attention_forward(
        q, k_pages, v_pages, *lengths, window or 0, float(softcap or 0.0), scale, k_scale, v_scale
    )
