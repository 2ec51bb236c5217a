"""Storing new keys and values in the paged cache.

Token t goes to slot `slots[t]` of the cache seen as one long row of slots (page · page size + offset). A negative slot
is padding and writes nothing. Pages may be narrower than the keys: float8 pages saturate instead of overflowing.

T tokens, K key heads, D head dim, P pages.
"""

import torch

from .op import Case, Op


def to_page_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in the dtype of a page; float8 has no infinity, so values beyond its range are clamped to it."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def _write_pages(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """Writes k and v (T, K, D) into the pages (P, page, K, D) at `slots` (T,), in place; negative slots are skipped."""
    kept = (slots >= 0).nonzero().squeeze(-1)
    for x, pages in ((k, k_pages), (v, v_pages)):
        rows = pages.view(-1, *pages.shape[2:])
        values = to_page_dtype(x[kept], pages.dtype)
        if pages.dtype.itemsize == 1:  # float8 has no scatter on every device; its bytes do
            rows, values = rows.view(torch.uint8), values.view(torch.uint8)
        rows[slots[kept].long()] = values


def _batch(m, T, K, D, P, page, page_dtype=None):
    slots = torch.randperm(P * page, generator=m.generator)[:T].to(m.device)
    if m.device.type != "meta":
        slots[T // 2 : T // 2 + 1] = -1
    k, v = m.normal(T, K, D, grad=False), m.normal(T, K, D, grad=False)
    pages = (torch.zeros(P, page, K, D, dtype=page_dtype or m.dtype, device=m.device) for _ in range(2))
    return k, v, *pages, slots


write_pages = Op(
    name="write_pages",
    reference=_write_pages,
    mutates=("k_pages", "v_pages"),
    cases=[
        Case("padding", lambda m: _batch(m, 5, 2, 24, 3, 4)),
        Case("float8 pages", lambda m: _batch(m, 5, 2, 32, 3, 4, torch.float8_e4m3fn)),
        Case("no tokens", lambda m: _batch(m, 0, 2, 8, 2, 4)),
        Case("8192 tokens, 8 heads of 128", lambda m: _batch(m, 8192, 8, 128, 1024, 16), bench=True),
    ],
    traffic=lambda k, v, k_pages, *_: (k.nbytes + v.nbytes + 2 * k.numel() * k_pages.itemsize, 0),
)
