"""Attention over a paged K/V cache, for prefill chunks and decode rows in one batch.

Keys and values live in pages of a fixed number of tokens; a sequence's row of the page table lists its pages in
order, so memory never has to be contiguous and a prefix can be shared. Sequence b brings its newest `query_lens[b]`
tokens (one when it decodes, a chunk when it prefills); they are the last of its `context_lens[b]` cached tokens,
whose keys and values are already written. Queries of all sequences lie end to end; rows past the last sequence are
padding and get zeros.

Pages may be narrower than what they hold: float8 pages store keys and values divided by one scale a key head (see
`write_pages`), and both are multiplied back where they cost least, scores after the product and values after the sum.

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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of q (T, H, D) over pages (P, page, K, D) found through `page_table` (N, pages per sequence),
    with sinks (H,).

    The cached keys and values are the pages' times `k_scale` and `v_scale` (K,), 1 if they are left out. Two tensors
    that are the same for all layers of a step spare the fused twin their launches: `starts` (N + 1), the sums of
    `query_lens` from zero on, and `arrivals` (at least N·K int32 zeros), which are zeros again afterwards."""
    options = {"window": window, "softcap": softcap, "scale": scale, "sinks": sinks}
    cache = k_pages, v_pages, page_table, context_lens, query_lens, k_scale, v_scale
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
    k_scale=None,
    v_scale=None,
    starts=None,
    arrivals=None,
):
    options = {"window": window, "softcap": softcap, "scale": scale, "sinks": sinks}
    cache = k_pages, v_pages, page_table, context_lens, query_lens, k_scale, v_scale
    return _each_sequence(attention.eager, q, *cache, options)


def _each_sequence(attend, q, k_pages, v_pages, page_table, context_lens, query_lens, k_scale, v_scale, options):
    page = k_pages.shape[1]
    out_THD = torch.zeros_like(q)
    start = 0
    for pages, context, queries in zip(page_table, context_lens.tolist(), query_lens.tolist()):
        if queries == 0:
            continue
        pages = pages[: -(-context // page)].long()
        k, v = (
            scaled_back(cache[pages].flatten(0, 1)[None, :context], scale, q.dtype)
            for cache, scale in ((k_pages, k_scale), (v_pages, v_scale))
        )
        rows = slice(start, start + queries)
        out_THD[rows] = attend(q[None, rows], k, v, **options)[0]
        start += queries
    return out_THD


def scaled_back(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize what pages x (…, K, D) stand for, in a dtype."""
    return x.to(dtype) if scale is None else (x.to(wide(scale)) * scale[:, None]).to(dtype)


def _batch(m, contexts, queries, H, K, D, page, padding=0, dtype=None, scales=None):
    """Sequences with these lengths, in pages handed out back to front."""
    per_sequence = max(-(-c // page) for c in contexts)
    total = per_sequence * len(contexts) + 1
    table = torch.arange(total - 1, 0, -1, dtype=torch.int32).view(len(contexts), per_sequence).to(m.device)
    pages = (m.normal(total, page, K, D, dtype=dtype, grad=False) for _ in range(2))
    lengths = (torch.tensor(x, dtype=torch.int32).to(m.device) for x in (contexts, queries))
    tensors = m.normal(sum(queries) + padding, H, D, grad=False), *pages, table, *lengths
    if scales is None:
        return tensors
    return *tensors, {name: m.tensor(scale) for name, scale in zip(("k_scale", "v_scale"), scales)}


def _flops(q, k_pages, v_pages, page_table, *_, **__):
    """As if all sequences brought equally many tokens and filled their pages."""
    (T, H, D), N = q.shape, len(page_table)
    pairs = T * (page_table.shape[1] * k_pages.shape[1] - (T // max(N, 1) - 1) / 2)
    return 4 * D * H * pairs, 0


paged_attention = Op(
    name="paged_attention",
    reference=_paged_attention,
    eager=_paged_attention_eager,
    native=True,
    fused=paged_attention_fused,
    cases=[
        Case("decode", lambda m: _batch(m, [1, 9, 40], [1, 1, 1], 4, 2, 32, 16)),
        Case("prefill", lambda m: _batch(m, [5, 19], [5, 19], 2, 1, 32, 16)),
        Case("chunks and decode", lambda m: _batch(m, [33, 7, 20], [1, 7, 6], 4, 1, 64, 16, padding=3)),
        Case("three heads a key head", lambda m: _batch(m, [21, 3, 0], [9, 1, 0], 6, 2, 40, 8)),
        Case("segments", lambda m: _batch(m, [600, 257], [1, 1], 2, 1, 16, 64)),
        Case(
            "float8 pages",
            lambda m: _batch(m, [33, 20], [1, 6], 4, 2, 32, 16, 0, torch.float8_e4m3fn, ([0.5, 0.3], [2.0, 0.7])),
        ),
        Case("window, cap", lambda m: _batch(m, [30, 12], [2, 12], 2, 2, 32, 8), {"window": 6, "softcap": 4.0}),
        Case(
            "sinks, segments",
            lambda m: (*_batch(m, [600, 20, 9], [1, 6, 1], 6, 2, 32, 16, 2), {"sinks": m.normal(6, grad=False)}),
        ),
        Case(
            "32 decodes at 4096",
            lambda m: _batch(m, [4096] * 32, [1] * 32, 32, 8, 128, 16),
            bench=True,
        ),
        Case(
            "32 decodes at 4096, float8",
            lambda m: _batch(m, [4096] * 32, [1] * 32, 32, 8, 128, 16, 0, torch.float8_e5m2, ([0.5] * 8, [2.0] * 8)),
            bench=True,
        ),
        Case(
            "32 decodes at 4096, 64 and 8 heads of 64, sinks",
            lambda m: (*_batch(m, [4096] * 32, [1] * 32, 64, 8, 64, 16), {"sinks": m.normal(64, grad=False)}),
            {"window": 128},
            bench=True,
        ),
        Case("prefill of 4096", lambda m: _batch(m, [4096], [4096], 32, 8, 128, 16), bench=True),
    ],
    budget=Budget(wgmma=True),
    traffic=lambda q, k_pages, v_pages, *_, **__: (2 * q.nbytes + k_pages.nbytes + v_pages.nbytes, 0),
    flops=_flops,
)
