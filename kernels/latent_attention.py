"""Latent attention over a paged cache (MLA, DeepSeek-V2), with absorbed projections.

A token's keys and values of all heads come from one latent vector c, k = W_k c and v = W_v c, and one small rotated key
that all heads share. Attention needs neither k nor v: q · (W_k c) = (W_kᵀ q) · c, and the mean of W_v c is W_v times
the mean of c. So a query head is carried into the latent space, attention there has one key head as wide as the latent
and the rotated part, and values that are the latent again: for DeepSeek-V3 576 numbers a token and layer are kept,
where full keys and values are 49,152. `head_linear` is the way there and back.

It costs a prompt 3.4 times the products of full keys and values, which decoding, bound by reading, does not notice.

T tokens, N sequences, H query heads, L latent width, R rotated columns, P pages of `page` tokens.
"""

import torch
from torch.nn.functional import pad

from .core.lang import wide
from .core.op import Budget, Case, Op
from .gpu.paged_attention import latent_attention_fused
from .paged_attention import filled_pages, paged_attention


def _latent_attention(
    q_latent: torch.Tensor,
    q_turned: torch.Tensor,
    latents: torch.Tensor,
    turned: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_lens: torch.Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of q_latent (T, H, L) and rotary q_turned (T, H, R) over pages of `latents` (P, page, 1, L) and
    rotary keys `turned` (P, page, 1, R): the attention-weighted means of latents (T, H, L).

    The rest is as in `paged_attention`; `arrivals` are at least N·H zeros. With `k_scales` of latents and `v_scales` of
    turned keys the means are of latents as the pages hold them: rotated."""
    if k_scales is not None and v_scales is not None:
        latents, turned = (
            (pages.to(wide(scales)) * scales.transpose(1, 2)[..., None]).to(wide(q_latent))
            for pages, scales in ((latents, k_scales), (turned, v_scales))
        )
    q, k_pages = torch.cat([q_latent, q_turned], -1), torch.cat([latents, turned], -1)
    v_pages = pad(latents, (0, turned.shape[-1]))
    options = {"window": window, "softcap": softcap, "scale": scale}
    o = paged_attention.reference(q, k_pages, v_pages, page_table, context_lens, query_lens, **options)
    return o[..., : latents.shape[-1]]


def _batch(m, contexts, queries, H, L, R, page, padding=0, dtype=None):
    """Test case: sequences with these lengths, in pages allocated back to front."""
    per_sequence = max(-(-c // page) for c in contexts)
    total = per_sequence * len(contexts) + 1
    table = torch.arange(total - 1, 0, -1, dtype=torch.int32).view(len(contexts), per_sequence).to(m.device)
    lengths = (torch.tensor(x, dtype=torch.int32).to(m.device) for x in (contexts, queries))
    q = (m.normal(sum(queries) + padding, H, D, grad=False) for D in (L, R))
    pages, scales = filled_pages(m, total, page, 1, (L, R), dtype)
    return *q, *pages, table, *lengths, {"scale": (L + R) ** -0.5, **scales}


latent_attention = Op(
    name="latent_attention",
    reference=_latent_attention,
    fused=latent_attention_fused,
    shapes="q_latent T H L, q_turned T H R, latents P page K L, turned P page K R, page_table N width, "
    "context_lens N, query_lens N, k_scales P K page, v_scales P K page",
    cases=[
        Case("decode", lambda m: _batch(m, [1, 9, 40], [1, 1, 1], 16, 32, 16, 16)),
        Case("prefill", lambda m: _batch(m, [5, 19], [5, 19], 4, 32, 8, 16)),
        Case("chunks and decode", lambda m: _batch(m, [33, 7, 20], [1, 7, 6], 20, 40, 8, 16, 3)),
        Case("segments", lambda m: _batch(m, [600, 257], [1, 1], 2, 16, 16, 64)),
        Case("int8 pages", lambda m: _batch(m, [600, 20], [1, 6], 20, 32, 8, 16, 2, torch.int8)),
        Case("window, cap", lambda m: _batch(m, [30, 12], [2, 12], 32, 16, 4, 8), {"window": 6, "softcap": 4.0}),
        Case("32 decodes at 4096, 128 heads", lambda m: _batch(m, [4096] * 32, [1] * 32, 128, 512, 64, 16), bench=True),
        Case(
            "32 decodes at 4096, 128 heads, int8",
            lambda m: _batch(m, [4096] * 32, [1] * 32, 128, 512, 64, 16, 0, torch.int8),
            bench=True,
        ),
    ],
    budget=Budget(),
    traffic=lambda q_latent, q_turned, latents, turned, *_, **__: (
        2 * q_latent.nbytes + q_turned.nbytes + latents.nbytes + turned.nbytes,
        0,
    ),
)
