"""Storing new keys and values in the paged cache.

Token t goes to slot `slots[t]` of the cache seen as one long row of slots (page · page size + offset). A negative slot
is padding and writes nothing.

Pages may be narrower than the keys: float8 halves what decoding reads. Its numbers reach from 2⁻⁹ to 448 (e4m3), so
keys and values are divided by a scale first, one a key head, and saturate instead of overflowing. The scale is fixed
for the life of the cache: one a page would follow its contents more closely, but the first token of a page does not
know the last, and rounding what is written once more whenever a page's scale grows would let a result depend on how
its prompt was cut into chunks. `page_scale` finds one from a sample. (sm_80 knows float8_e5m2 only.)

T tokens, K key heads, D head dim, P pages.
"""

import torch

from .core.lang import next_power_of_2, tl, triton, wide
from .core.launch import launch, launcher
from .core.op import Budget, Case, Op


def to_page_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in the dtype of a page; float8 has no infinity, so values beyond its range are clamped to it."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def page_scale(x: torch.Tensor, dtype: torch.dtype, room: float = 2.0) -> torch.Tensor:
    """A scale a head (K,) with which x (T, K, D), and what is `room` times as large, fits pages of a dtype."""
    return (x.float().abs().amax((0, 2)) * (room / torch.finfo(dtype).max)).clamp(min=1e-12)


def _write_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes k and v (T, K, D) into the pages (P, page, K, D) at `slots` (T,), in place; negative slots are skipped.
    v and its pages may have another D.

    Pages hold k / `k_scale` and v / `v_scale` (K,), if these are given."""
    kept = (slots >= 0).nonzero().squeeze(-1)
    for x, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        rows = pages.view(-1, *pages.shape[2:])
        values = x[kept] if scale is None else x[kept].to(wide(x)) / scale[:, None]
        values = to_page_dtype(values, pages.dtype)
        if pages.dtype.itemsize == 1:  # float8 has no scatter on every device; its bytes do
            rows, values = rows.view(torch.uint8), values.view(torch.uint8)
        rows[slots[kept].long()] = values


# ---- fused ----


@triton.jit
def saturate(x, LIMIT: tl.constexpr):
    """x within ±LIMIT; no limit is 0."""
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT) if LIMIT > 0 else x


@triton.jit
def scaled(x, scale_ptr, head, mask, SCALED: tl.constexpr):
    """x divided by the scale of its head."""
    return tl.div_rn(x, tl.load(scale_ptr + head, mask=mask, other=1.0).to(tl.float32)) if SCALED else x


@triton.jit
def kv_write_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, k_scale_ptr, v_scale_ptr,
    heads, k_token, k_head, k_dim, v_token, v_head, v_dim,
    D: tl.constexpr, V_D: tl.constexpr, LIMIT: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
):  # fmt: skip
    """One token: all its heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        head, col = tl.arange(0, HEADS).to(tl.int64)[:, None], tl.arange(0, BLOCK).to(tl.int64)[None, :]
        mask, v_mask = (head < heads) & (col < D), (head < heads) & (col < V_D)
        place, v_place = slot * heads * D + head * D + col, slot * heads * V_D + head * V_D + col
        k = tl.load(k_ptr + token * k_token + head * k_head + col * k_dim, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + token * v_token + head * v_head + col * v_dim, mask=v_mask, other=0.0).to(tl.float32)
        k = scaled(k, k_scale_ptr, head, head < heads, K_SCALED)
        v = scaled(v, v_scale_ptr, head, head < heads, V_SCALED)
        tl.store(k_pages_ptr + place, saturate(k, LIMIT).to(k_pages_ptr.dtype.element_ty), mask=mask)
        tl.store(v_pages_ptr + v_place, saturate(v, LIMIT).to(v_pages_ptr.dtype.element_ty), mask=v_mask)


def page_limit(pages: torch.Tensor) -> float:
    """The largest number a float8 page can hold; 0 for wider pages, which need no clamping."""
    return torch.finfo(pages.dtype).max if pages.dtype.itemsize == 1 else 0.0


@launcher(mutates=("k_pages", "v_pages"))
def write_pages_launch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    T, K, D = k.shape
    heads, block = next_power_of_2(K), next_power_of_2(max(D, v.shape[2]))
    launch(
        kv_write_kernel, (T,),
        k, v, k_pages, v_pages, slots, k if k_scale is None else k_scale, v if v_scale is None else v_scale,
        K, *k.stride(), *v.stride(), K_SCALED=k_scale is not None, V_SCALED=v_scale is not None,
        D=D, V_D=v.shape[2], LIMIT=page_limit(k_pages), HEADS=heads, BLOCK=block,
        num_warps=max(1, min(8, heads * block // 512)),
    )  # fmt: skip


def _write_pages_fused(k, v, k_pages, v_pages, slots, k_scale=None, v_scale=None):
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("write_pages: the pages must be contiguous")
    write_pages_launch(k, v, k_pages, v_pages, slots, k_scale, v_scale)


def _batch(m, T, K, D, P, page, page_dtype=None, v_dim=None):
    slots = torch.randperm(P * page, generator=m.generator)[:T].to(m.device)
    if m.device.type != "meta":
        slots[T // 2 : T // 2 + 1] = -1
    widths = D, v_dim or D
    k, v = (m.normal(T, K, width, grad=False) for width in widths)
    if page_dtype is not None:  # representable numbers: the interpreter's own rounding to float8 drops a carry
        k, v = k.to(page_dtype).to(m.dtype), v.to(page_dtype).to(m.dtype)
    pages = (torch.zeros(P, page, K, width, dtype=page_dtype or m.dtype, device=m.device) for width in widths)
    return k, v, *pages, slots


write_pages = Op(
    name="write_pages",
    reference=_write_pages,
    fused=_write_pages_fused,
    mutates=("k_pages", "v_pages"),
    cases=[
        Case("padding", lambda m: _batch(m, 5, 2, 24, 3, 4)),
        Case("float8 pages", lambda m: _batch(m, 5, 2, 32, 3, 4, torch.float8_e4m3fn)),
        Case(
            "float8 pages, a scale a head",
            lambda m: (*_batch(m, 5, 2, 32, 3, 4, torch.float8_e5m2), m.tensor([0.5, 4.0]), m.tensor([2.0, 0.25])),
        ),
        Case("narrow values", lambda m: _batch(m, 5, 1, 40, 3, 4, v_dim=8)),
        Case("no tokens", lambda m: _batch(m, 0, 2, 8, 2, 4)),
        Case("8192 tokens, 8 heads of 128", lambda m: _batch(m, 8192, 8, 128, 1024, 16), bench=True),
    ],
    budget=Budget(registers=64, vector=True),
    traffic=lambda k, v, k_pages, *_, **__: (k.nbytes + v.nbytes + 2 * k.numel() * k_pages.itemsize, 0),
)
