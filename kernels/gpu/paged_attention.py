"""Paged attention with split-KV (flash decoding): prefill chunks and decode rows in one launch.

Split-KV (flash decoding): a decode row is one query against a long context, nothing to compute and everything to read.
So the query heads that share a key head form one tile (its keys are read once), and segments of the context are read at
the same time by different programs. The last of them to arrive adds the segments up, in order. A chunk of queries has
work enough for itself: its tile of tokens times heads walks the whole context.

Batch invariance. A row's bits must not tell whether it came as a decode, in a chunk, as a draft or after a preemption.
So both paths are the same instructions on the same tile, which for a decode is mostly empty: on Hopper, m64 `wgmma`
with one token costs less than half of the time in which its keys arrive. Blocks of keys begin at multiples of BLOCK_N
and segments at multiples of SEGMENT, wherever a chunk is cut and a window begins; every segment starts afresh and is
merged in order; blocks that a row does not see change no bit of it; and what a compiler might contract is an explicit
`fma`. Only the rows of `o` are written, padding included: nothing is cleared beforehand.

Latent attention (DeepSeek-V2) is the same walk with one key head of two parts: a latent vector, also the value, and
a few rotated columns (R), which lie in the pages that hold values elsewhere. Its many query heads are cut into
groups of a tile, each of which reads the one key head.

Pages of 8 bits have a scale a token and head. Scales of keys are multiplied into the products and scales of values into
the weights before these are rounded for the second product: a number a key instead of a number a column.

Lengths stay on the device and programs without work leave at once, so a CUDA graph can hold the launch; the grid has
room for as many segments as the page table has columns for, which is how a caller bounds it.

T tokens, N sequences, H query heads, K key heads, G = H / K, D head dim, P pages.
"""

import math

import torch

from ..core.lang import cdiv, generation, next_power_of_2, tl, triton
from ..core.launch import last_dim_contiguous, launch, launcher
from ..core.tuned import tuned
from .attention_launch import check_scale, search_steps
from .attention_tiles import LOG2E, capped, initial_max, sequence_of_tile, visible

SEGMENT = 256
"""Keys of a segment: a smaller one is read before a program has started. A multiple of every BLOCK_N."""
UNROLL, FETCHED = 16, 64
"""Segments that are fetched at once when they are added up, and registers of a thread they may take: one after the
other, each would wait 0.4 µs for L2."""
LATENT_HEADS = 16
"""Query heads of latent attention that read a latent vector together, if they are a multiple: one tile of few rows."""
UNSPECIALIZED = ("tokens", "sequences", "grid_splits", "split_programs", "stride_table", "stride_sn", "stride_sh")
"""Arguments that change from step to step: no kernel is compiled for their values, in the middle of serving."""


@triton.jit
def _rescale(m_i, new_m):
    """Online-softmax rescaling factor from maximum `m_i` to `new_m`; 0 for a row without keys."""
    return tl.exp2(m_i - tl.where(new_m == float("-inf"), 0.0, new_m))


@triton.jit
def _add_segment(m_i, l_i, acc, m_s, l_s, acc_s):
    """Merge one more segment into an online softmax: maxima, sums and weighted values.

    Adding the first segment to nothing gives that segment, to the bit."""
    new_m = tl.maximum(m_i, m_s)
    alpha = _rescale(m_i, new_m)
    beta = _rescale(m_s, new_m)
    return new_m, tl.fma(l_i, alpha, l_s * beta), tl.fma(acc, alpha[:, None], acc_s * beta[:, None])


@triton.jit
def _normalized(l_i, acc):
    """Divide by the sum; a row without keys is zero."""
    return acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]


@triton.jit
def _add_stored_segments(
    partial, stats, sinks, first_head, count, stride_ps, stride_ph, stride_ss, stride_sh,
    Q_PER_KV: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Merge a decode row's stored segments, in order: (Q_PER_KV, D)."""
    head = tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    m_i = initial_max(sinks, first_head + head % Q_PER_KV, ROWS)
    l_i = tl.full([ROWS], 0.0 if sinks is None else 1.0, tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    row_stats = stats + head * stride_sh
    row_partial = partial + (head * stride_ph)[:, None] + column[None, :]
    for first in tl.range(0, count, UNROLL):
        for i in tl.static_range(UNROLL):
            segment = tl.cast(first + i, tl.int64)
            there = (head < Q_PER_KV) & (first + i < count)
            m_s = tl.load(row_stats + segment * stride_ss, mask=there, other=float("-inf"))
            l_s = tl.load(row_stats + segment * stride_ss + 1, mask=there, other=0.0)
            mask = there[:, None] & (column[None, :] < D)
            acc_s = tl.load(row_partial + segment * stride_ps, mask=mask, other=0.0)
            m_i, l_i, acc = _add_segment(m_i, l_i, acc, m_s, l_s, acc_s)
    return _normalized(l_i, acc)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def paged_attention_kernel(
    q, q_turned, k_pages, v_pages, sinks, table, contexts, starts, o, partial, stats, arrivals,
    stride_qt, stride_qh, stride_rt, stride_rh,
    stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_table,
    stride_ot, stride_oh, stride_pn, stride_ph, stride_ps, stride_sn, stride_sh, stride_ss,
    tokens, sequences, grid_splits, split_programs, k_scales, v_scales, stride_scales,
    Q_PER_KV: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr,
    SEGMENT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, G_ROWS: tl.constexpr, UNROLL: tl.constexpr,
    SCALED: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Programs below `split_programs`: a segment of a decoding sequence; the others: a query tile of a chunk."""
    BLOCK_Q: tl.constexpr = BLOCK_M // Q_PER_KV
    SCALE_LOG2: tl.constexpr = LOG2E if SOFTCAP > 0 else SCALE * LOG2E
    pid = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    splits = pid < split_programs
    if splits:
        sequence = pid // grid_splits
        token = pid * 0
    else:
        # Tokens behind the last sequence are one more, without keys: its tiles write zeros.
        tile = pid - split_programs
        sequence = sequence_of_tile(tile, starts, sequences + 1, BLOCK_Q, SEARCH_STEPS)
        token = (tile - (tl.load(starts + sequence).to(tl.int32) // BLOCK_Q + sequence)) * BLOCK_Q
    padding = sequence == sequences
    first = tl.load(starts + sequence).to(tl.int32)
    queries = (tokens if padding else tl.load(starts + sequence + 1).to(tl.int32)) - first
    context = 0 if padding else tl.load(contexts + sequence).to(tl.int32)
    lowest = context - queries + token  # the position of the tile's first query
    begin = tl.maximum(lowest - WINDOW + 1, 0) if WINDOW > 0 else lowest * 0
    begin -= begin % BLOCK_N
    end = tl.minimum(lowest + BLOCK_Q, context)
    segments = 1
    split = 0
    if splits:
        split = pid % grid_splits
        segments = tl.cdiv(end, SEGMENT) - begin // SEGMENT
        here = (tl.cast(begin // SEGMENT + split, tl.int64) * SEGMENT).to(tl.int32)
        begin = tl.maximum(begin, here)
        end = tl.minimum(end, here + SEGMENT)
        working = (queries == 1) & (split < segments)
    else:
        working = ((queries > 1) | padding) & (token < queries)
    if not working:
        return

    own = tl.arange(0, BLOCK_M)
    row_token = own // Q_PER_KV
    row_head = head * Q_PER_KV + own % Q_PER_KV
    column = tl.arange(0, BLOCK_D)
    real = (row_token < BLOCK_Q) & (token + row_token < queries)
    inside = real[:, None] & (column[None, :] < D)
    here_T = (first + token).to(tl.int64) + row_token
    q_offsets = (here_T * stride_qt + row_head * stride_qh)[:, None] + column[None, :]
    q_tile = tl.load(q + q_offsets, mask=inside, other=0.0)
    turned = tl.arange(0, BLOCK_R)
    if R > 0:
        turned_offsets = (here_T * stride_rt + row_head * stride_rh)[:, None] + turned[None, :]
        q_turned_tile = tl.load(q_turned + turned_offsets, mask=real[:, None] & (turned[None, :] < R), other=0.0)
    q_pos = lowest + row_token
    pages = table + sequence.to(tl.int64) * stride_table
    k_pages += head * stride_kh
    v_pages += head * stride_vh
    if SCALED:
        k_scales += (0 if R > 0 else head) * PAGE  # latents are one head, which every group reads
        v_scales += (0 if R > 0 else head) * PAGE

    m_i = initial_max(sinks, row_head, BLOCK_M)
    l_i = tl.full([BLOCK_M], 0.0 if sinks is None else 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_s = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_s = tl.zeros([BLOCK_M], tl.float32)
    acc_s = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in tl.range(begin, end, BLOCK_N):
        if (key % SEGMENT == 0) & (key > begin):
            m_i, l_i, acc = _add_segment(m_i, l_i, acc, m_s, l_s, acc_s)
            m_s = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l_s = tl.zeros([BLOCK_M], tl.float32)
            acc_s = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        keys = key + tl.arange(0, BLOCK_N)
        page = tl.load(pages + keys // PAGE, mask=keys < end, other=0).to(tl.int64)
        slot = (keys % PAGE).to(tl.int64)
        there = (keys[:, None] < end) & (column[None, :] < D)
        k_offsets = (page * stride_kp + slot * stride_ks)[:, None] + column[None, :]
        k = tl.load(k_pages + k_offsets, mask=there, other=0.0).to(q_tile.dtype)
        products = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
        if SCALED:
            k_scale = tl.load(k_scales + page * stride_scales + slot, mask=keys < end, other=0.0)
            v_scale = tl.load(v_scales + page * stride_scales + slot, mask=keys < end, other=0.0)
            products *= k_scale[None, :]
        v_offsets = (page * stride_vp + slot * stride_vs)[:, None]
        if R > 0:
            seen = (keys[:, None] < end) & (turned[None, :] < R)
            k_turned = tl.load(v_pages + v_offsets + turned[None, :], mask=seen, other=0.0).to(q_tile.dtype)
            if SCALED:
                products += tl.dot(q_turned_tile, tl.trans(k_turned), input_precision="ieee") * v_scale[None, :]
            else:
                products = tl.dot(q_turned_tile, tl.trans(k_turned), products, input_precision="ieee")
        scores = capped(products, SCALE, SOFTCAP)
        scores = tl.where(visible(q_pos[:, None], keys[None, :], end, True, WINDOW), scores, float("-inf"))
        new_m = tl.maximum(m_s, tl.max(scores, 1) * SCALE_LOG2)
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(tl.fma(scores, SCALE_LOG2, -base[:, None]))
        alpha = tl.exp2(m_s - base)
        l_s = tl.fma(l_s, alpha, tl.sum(p, 1))
        m_s = new_m
        v = k if R > 0 else tl.load(v_pages + v_offsets + column[None, :], mask=there, other=0.0).to(q_tile.dtype)
        if SCALED:
            p *= (k_scale if R > 0 else v_scale)[None, :]
        acc_s = tl.dot(p.to(q_tile.dtype), v, acc_s * alpha[:, None], input_precision="ieee")

    if splits & (segments > 1):
        partial += sequence.to(tl.int64) * stride_pn
        stats += sequence.to(tl.int64) * stride_sn
        at = tl.cast(split, tl.int64)
        row_stats = stats + row_head * stride_sh + at * stride_ss
        offsets = (row_head * stride_ph + at * stride_ps)[:, None] + column[None, :]
        tl.store(partial + offsets, acc_s, mask=inside)
        tl.store(row_stats, m_s, mask=real)
        tl.store(row_stats + 1, l_s, mask=real)
        tl.debug_barrier()  # all threads of this program have stored before one of them says so
        counter = arrivals + sequence.to(tl.int64) * tl.num_programs(1) + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == segments - 1:
            tl.store(counter, 0)  # for the next layer
            group = head * Q_PER_KV
            result = _add_stored_segments(
                partial + group * stride_ph, stats + group * stride_sh, sinks, group, segments, stride_ps, stride_ph,
                stride_ss, stride_sh, Q_PER_KV, G_ROWS, D, BLOCK_D, UNROLL,
            )  # fmt: skip
            g = tl.arange(0, G_ROWS)
            o_offsets = (first.to(tl.int64) * stride_ot + (group + g) * stride_oh)[:, None] + column[None, :]
            mask = (g < Q_PER_KV)[:, None] & (column[None, :] < D)
            tl.store(o + o_offsets, result.to(o.dtype.element_ty), mask=mask)
    else:
        m_i, l_i, acc = _add_segment(m_i, l_i, acc, m_s, l_s, acc_s)
        o_offsets = (here_T * stride_ot + row_head * stride_oh)[:, None] + column[None, :]
        tl.store(o + o_offsets, _normalized(l_i, acc).to(o.dtype.element_ty), mask=inside)


def _tile(G: int, D: int, R: int, eight: bool, dtype: torch.dtype, device: torch.device) -> dict:
    """Tile by the model and device alone, never by the batch, for batch invariance."""
    rows = next_power_of_2(G)
    arch = generation(device)
    if arch == 0 or dtype == torch.float32:
        tile, block, warps, stages = 16, 32, 4, 2
    elif R:  # two accumulators as wide as a latent
        tile, block, warps, stages = 16, 32, 8, 2
    else:
        narrow = (128 if arch >= 90 else 64) < D or D % 16  # odd heads: an address a number, in two registers
        tile, block, warps = 64, 32 if narrow else 64, 4 if arch == 90 else 8
        tile = 32 if eight and arch == 80 else tile  # sm_120 would spill what 8 bits are widened to
        block, stages = (32, 3) if eight and arch == 90 else (block, 2)  # so would Triton 3.6 there
    default = {"BLOCK_M": max(tile, rows), "BLOCK_N": block, "num_warps": warps, "num_stages": stages}
    a_segment = cdiv(rows * next_power_of_2(D), 32 * warps)
    default["UNROLL"] = max(1, min(UNROLL, FETCHED // a_segment))
    name = "latent_attention" if R else "paged_attention"
    return {"G_ROWS": rows, **tuned(name, device, f"{G} {D} {str(dtype)[6:]}{' 8 bits' if eight else ''}", default)}


def query_starts(query_lens: torch.Tensor) -> torch.Tensor:
    """Cumulative query lengths (N + 1), like cu_seqlens."""
    return torch.nn.functional.pad(query_lens.cumsum(0, dtype=torch.int32), (1, 0))


def arrival_counters(sequences: int, key_heads: int, device: torch.device) -> torch.Tensor:
    """Counters of finished segments; each call leaves them zero for the next."""
    return torch.zeros(sequences * key_heads, dtype=torch.int32, device=device)


@launcher(mutates=("arrivals",))
def paged_attention_forward(
    q: torch.Tensor,
    q_turned: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    starts: torch.Tensor,
    arrivals: torch.Tensor,
    window: int,
    softcap: float,
    scale: float,
    sinks: torch.Tensor | None,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> torch.Tensor:
    q, page_table = last_dim_contiguous(q), last_dim_contiguous(page_table)
    if not k_pages.stride(-1) == v_pages.stride(-1) == 1:
        raise ValueError("paged_attention: the last dimension of the pages must be contiguous")
    if k_scales is not None and v_scales is not None and not (k_scales.is_contiguous() and v_scales.is_contiguous()):
        raise ValueError("paged_attention: k_scales and v_scales must be contiguous")
    T, H, D = q.shape
    N, width = page_table.shape
    page, K = k_pages.shape[1:3]
    if len(starts) <= N or len(arrivals) < N * K:
        raise ValueError(
            f"paged_attention: {len(starts)} starts and {len(arrivals)} arrivals for {N} sequences and {K} key heads; "
            f"they must be at least {N + 1} and {N * K}"
        )
    G = H // K
    o_THD = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    R = 0 if q_turned is None else q_turned.shape[-1]
    tile = _tile(G, D, R, k_scales is not None, q.dtype, q.device)
    turned = q if q_turned is None else last_dim_contiguous(q_turned)
    splits = cdiv(width * page, SEGMENT)
    if window:
        splits = min(splits, cdiv(window, SEGMENT) + 1)
    partial = torch.empty(N, H, splits, D, dtype=torch.float32, device=q.device)
    stats = torch.empty(N, H, splits, 2, dtype=torch.float32, device=q.device)
    launch(
        paged_attention_kernel, (N * splits + T // (tile["BLOCK_M"] // G) + N + 1 if T else 0, K),
        q, turned, k_pages, v_pages, sinks, page_table, context_lens, starts, o_THD, partial, stats, arrivals,
        *q.stride()[:2], *turned.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0),
        *o_THD.stride()[:2], *partial.stride()[:3], *stats.stride()[:3],
        T, N, splits, N * splits, *((q, q, 0) if k_scales is None else (k_scales, v_scales, k_scales.stride(0))),
        Q_PER_KV=G, SCALE=scale, SOFTCAP=softcap, WINDOW=window, PAGE=page, SEGMENT=SEGMENT,
        D=D, BLOCK_D=max(16, next_power_of_2(D)), SEARCH_STEPS=max(8, search_steps(N + 1)), **tile,
        SCALED=k_scales is not None, R=R, BLOCK_R=max(16, next_power_of_2(R)),
    )  # fmt: skip
    return o_THD


def paged_attention_fused(
    q, k_pages, v_pages, page_table, context_lens, query_lens,
    *, window=None, softcap=None, scale=None, sinks=None, k_scales=None, v_scales=None, starts=None, arrivals=None,
):  # fmt: skip
    """Fused implementation of `paged_attention`."""
    check_scale("paged_attention", scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if starts is None:
        starts = query_starts(query_lens)
    if arrivals is None:
        arrivals = arrival_counters(len(query_lens), k_pages.shape[2], q.device)
    meaning = window or 0, float(softcap or 0.0), scale
    return paged_attention_forward(
        q, None, k_pages, v_pages, page_table, context_lens, starts, arrivals, *meaning, sinks, k_scales, v_scales
    )


def latent_attention_fused(
    q_latent, q_turned, latents, turned, page_table, context_lens, query_lens,
    *, window=None, softcap=None, scale, k_scales=None, v_scales=None, starts=None, arrivals=None,
):  # fmt: skip
    """Fused implementation of `latent_attention`."""
    check_scale("latent_attention", scale)
    groups = q_latent.shape[1] // math.gcd(q_latent.shape[1], LATENT_HEADS)
    latents, turned = (pages.expand(-1, -1, groups, -1) for pages in (latents, turned))
    if starts is None:
        starts = query_starts(query_lens)
    if arrivals is None:
        arrivals = arrival_counters(len(query_lens), groups, q_latent.device)
    meaning = window or 0, float(softcap or 0.0), float(scale)
    return paged_attention_forward(
        q_latent,
        q_turned,
        latents,
        turned,
        page_table,
        context_lens,
        starts,
        arrivals,
        *meaning,
        None,
        k_scales,
        v_scales,
    )
