"""Attention over a paged KV cache, for prefill chunks and decode rows in one batch.

Keys and values live in pages of a fixed number of tokens; a sequence's row of the page table lists its pages in
order, so memory never has to be contiguous and a prefix can be shared. Sequence b brings its newest `query_lens[b]`
tokens (one when it decodes, a chunk when it prefills); they are the last of its `context_lens[b]` cached tokens,
whose keys and values are already written. Queries of all sequences lie end to end; rows past the last sequence are
padding and get zeros.

Pages may have 8 bits and a scale for each token and key head (see `write_pages`). Their keys are rotated, and so are
the queries that they meet: as `qk_norm_rope_write` returns them, or `hadamard(q, back=True)`.

T tokens of the batch, N sequences, H query heads, K key heads, D head dim, P pages of `page` tokens.
"""

import torch

from .attention import attention
from .core.lang import wide
from .core.op import Budget, Case, Op
from .gpu.paged_attention import paged_attention_fused


def _paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_lens: torch.Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of q (T, H, D) over pages (P, page, K, D) found through `page_table` (N, pages per sequence),
    with sinks (H,).

    The cached keys and values are the pages' times `k_scales` and `v_scales` (P, K, page), if given. Two tensors that
    are the same for all layers of a step spare the fused twin their launches: `starts` (N + 1), the sums of
    `query_lens` from zero on, and `arrivals` (at least N·K int32 zeros), which are zeros again afterwards."""
    options = {"window": window, "softcap": softcap, "scale": scale, "sinks": sinks}
    cache = k_pages, v_pages, page_table, context_lens, query_lens, k_scales, v_scales
    return _each_sequence(attention.reference, q, *cache, options)


def _paged_attention_eager(
    q,
    k_pages,
    v_pages,
    page_table,
    context_lens,
    query_lens,
    *,
    window=None,
    softcap=None,
    scale=None,
    sinks=None,
    k_scales=None,
    v_scales=None,
    starts=None,
    arrivals=None,
):
    options = {"window": window, "softcap": softcap, "scale": scale, "sinks": sinks}
    cache = k_pages, v_pages, page_table, context_lens, query_lens, k_scales, v_scales
    return _each_sequence(attention.eager, q, *cache, options)


def _each_sequence(attend, q, k_pages, v_pages, page_table, context_lens, query_lens, k_scales, v_scales, options):
    page = k_pages.shape[1]
    out_THD = torch.zeros_like(q)
    start = 0
    for pages, context, queries in zip(page_table, context_lens.tolist(), query_lens.tolist()):
        if queries == 0:
            continue
        pages = pages[: -(-context // page)].long()
        k, v = (
            cached(cache[pages], None if scales is None else scales[pages], q.dtype)[None, :context]
            for cache, scales in ((k_pages, k_scales), (v_pages, v_scales))
        )
        rows = slice(start, start + queries)
        out_THD[rows] = attend(q[None, rows], k, v, **options)[0]
        start += queries
    return out_THD


def cached(pages: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize pages (N, page, K, D) with scales (N, K, page) to (N · page, K, D)."""
    if scales is None:
        return pages.to(dtype).flatten(0, 1)
    return (pages.to(wide(scales)) * scales.transpose(1, 2)[..., None]).to(dtype).flatten(0, 1)


def _batch(m, contexts, queries, H, K, D, page, padding=0, dtype=None):
    """Test case: sequences with these lengths, in pages allocated back to front."""
    per_sequence = max(-(-c // page) for c in contexts)
    total = per_sequence * len(contexts) + 1
    table = torch.arange(total - 1, 0, -1, dtype=torch.int32).view(len(contexts), per_sequence).to(m.device)
    lengths = [torch.tensor(x, dtype=torch.int32).to(m.device) for x in (contexts, queries)]
    q = m.normal(sum(queries) + padding, H, D, grad=False)
    pages, scales = filled_pages(m, total, page, K, (D, D), dtype)
    return q, *pages, table, *lengths, scales


def filled_pages(m, total, page, K, widths, dtype=None):
    """Test case: filled pages of keys and values, with scales as options if they have 8 bits."""
    if dtype is None or dtype.itemsize > 1:
        return [m.normal(total, page, K, width, dtype=dtype, grad=False) for width in widths], {}
    most = 127 if dtype == torch.int8 else 16
    pages = [m.integers(-most, most, total, page, K, width, dtype=torch.int8).to(dtype) for width in widths]
    scales = [m.normal(total, K, page, scale=0.3 / most, dtype=torch.float32, grad=False).abs() for _ in widths]
    return pages, dict(zip(("k_scales", "v_scales"), scales))


def _flops(q, k_pages, v_pages, page_table, *_, **__):
    """FLOPs as if all sequences brought equally many tokens and filled their pages."""
    (T, H, D), N = q.shape, len(page_table)
    pairs = T * (page_table.shape[1] * k_pages.shape[1] - (T // max(N, 1) - 1) / 2)
    return 4 * D * H * pairs, 0


paged_attention = Op(
    name="paged_attention",
    reference=_paged_attention,
    eager=_paged_attention_eager,
    native=True,
    fused=paged_attention_fused,
    shapes="q T H D, k_pages P page K D, v_pages P page K D, page_table N width, context_lens N, query_lens N, "
    "sinks H, k_scales P K page, v_scales P K page",
    cases=[
        Case("decode", lambda m: _batch(m, [1, 9, 40], [1, 1, 1], 4, 2, 32, 16)),
        Case("prefill", lambda m: _batch(m, [5, 19], [5, 19], 2, 1, 32, 16)),
        Case("chunks and decode", lambda m: _batch(m, [33, 7, 20], [1, 7, 6], 4, 1, 64, 16, padding=3)),
        Case("three heads a key head", lambda m: _batch(m, [21, 3, 0], [9, 1, 0], 6, 2, 40, 8)),
        Case("segments", lambda m: _batch(m, [600, 257], [1, 1], 2, 1, 16, 64)),
        Case("int8 pages", lambda m: _batch(m, [33, 20], [1, 6], 4, 2, 32, 16, 0, torch.int8)),
        Case("int8 pages, segments", lambda m: _batch(m, [600, 257], [1, 1], 2, 1, 16, 64, 0, torch.int8)),
        Case("float8 pages", lambda m: _batch(m, [33, 20], [1, 6], 4, 2, 32, 16, 0, torch.float8_e4m3fn)),
        Case("window, cap", lambda m: _batch(m, [30, 12], [2, 12], 2, 2, 32, 8), {"window": 6, "softcap": 4.0}),
        Case(
            "sinks, segments",
            lambda m: (*_batch(m, [600, 20, 9], [1, 6, 1], 6, 2, 32, 16, 2)[:-1], {"sinks": m.normal(6, grad=False)}),
        ),
        Case(
            "32 decodes at 4096",
            lambda m: _batch(m, [4096] * 32, [1] * 32, 32, 8, 128, 16),
            bench=True,
        ),
        Case(
            "32 decodes at 4096, int8",
            lambda m: _batch(m, [4096] * 32, [1] * 32, 32, 8, 128, 16, 0, torch.int8),
            bench=True,
        ),
        Case(
            "32 decodes at 4096, float8",
            lambda m: _batch(m, [4096] * 32, [1] * 32, 32, 8, 128, 16, 0, torch.float8_e5m2),
            bench=True,
        ),
        Case(
            "32 decodes at 4096, 64 and 8 heads of 64, sinks",
            lambda m: (*_batch(m, [4096] * 32, [1] * 32, 64, 8, 64, 16)[:-1], {"sinks": m.normal(64, grad=False)}),
            {"window": 128},
            bench=True,
        ),
        Case("prefill of 4096", lambda m: _batch(m, [4096], [4096], 32, 8, 128, 16), bench=True),
    ],
    budget=Budget(wgmma=True),
    traffic=lambda q, k_pages, v_pages, *_, **__: (2 * q.nbytes + k_pages.nbytes + v_pages.nbytes, 0),
    flops=_flops,
)
