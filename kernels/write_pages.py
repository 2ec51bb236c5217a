"""Write of new keys and values into the paged KV cache, quantizing to 8-bit pages.

Token t goes to slot `slots[t]` of the cache seen as one long row of slots (page · page size + offset). A negative slot
is padding and writes nothing.

Pages may have 8 bits, whole numbers or float8, which halves what decoding reads and what a token takes. A key or value
of a head is divided by a scale of its own, its largest number over the largest of the format, and keys are rotated
before (`hadamard`); so queries must be too. A scale a page would have to change as the page fills, and then a result
would depend on how its prompt was cut into chunks. On SmolLM2, KL against float32: int8 0.0002, float8 (e4m3) 0.0039;
float8 without scales 0.0093. (sm_80 knows float8_e5m2 only.)

T tokens, K key heads, D head dim, P pages.
"""

import torch

from .core.lang import architecture, next_power_of_2, tl, triton, wide
from .core.launch import launch, launcher
from .core.op import Budget, Case, Op
from .hadamard import hadamard, transformed


def page_limit(dtype: torch.dtype) -> float:
    """Largest value of an 8-bit page dtype; 0 for wider ones, which need no scales."""
    if dtype.itemsize > 1:
        return 0.0
    return torch.finfo(dtype).max if dtype.is_floating_point else 127.0


def rounded(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x (…, D) to an 8-bit dtype: (codes, scale of each row)."""
    limit, peak = page_limit(dtype), x.abs().amax(-1)
    x = x * torch.where(peak > 0, limit / peak, 0)[..., None]
    return (x if dtype.is_floating_point else x.round()).to(dtype), peak / limit


def _write_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> None:
    """Write k and v (T, K, D) into the pages (P, page, K, D) at `slots` (T,), in place; negative slots are skipped.
    v and its pages may have another D.

    Pages of 8 bits have scales (P, K, page) in float32, and hold keys rotated."""
    kept = (slots >= 0).nonzero().squeeze(-1)
    places = slots[kept].long()
    for x, pages, scales in ((k[kept], k_pages, k_scales), (v[kept], v_pages, v_scales)):
        rows = pages.view(-1, *pages.shape[2:])
        if scales is not None:
            x = x.to(wide(x))
            x, scale = rounded(hadamard.reference(x) if pages is k_pages else x, pages.dtype)
            scales[places // pages.shape[1], :, places % pages.shape[1]] = scale.to(scales.dtype)
            x, rows = x.view(torch.uint8), rows.view(torch.uint8)  # float8 has no scatter on every device
        rows[places] = x.to(rows.dtype)


# ---- fused ----


@triton.jit
def store_heads(
    x, pages_ptr, scales_ptr, slot, heads, write,
    D: tl.constexpr, LIMIT: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store heads x (HEADS, BLOCK) of a token, in float32, into its slot; with LIMIT, scaled to 8 bits."""
    head, col = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, BLOCK).to(tl.int64)[None, :]
    mask = (head < heads)[:, None] & (col < D) & write
    if LIMIT > 0:
        peak, limit = tl.max(tl.abs(x), 1), tl.full([HEADS], LIMIT, tl.float32)
        x *= tl.div_rn(limit, tl.where(peak > 0, peak, 1.0))[:, None]
        if pages_ptr.dtype.element_ty == tl.int8:
            # 1.5 · 2²³: adding it rounds to an integer. Compiled it is one `fma` with the product above, which rounds
            # once where PyTorch does twice: of some 10⁵ codes one is the other neighbor of a half.
            x = (x + 12582912.0) - 12582912.0
        place = (slot // PAGE * heads + head) * PAGE + slot % PAGE
        tl.store(scales_ptr + place, tl.div_rn(peak, limit), mask=(head < heads) & write)
    place = (slot * heads + head[:, None]) * D + col
    tl.store(pages_ptr + place, x.to(pages_ptr.dtype.element_ty), mask=mask)


@triton.jit
def kv_write_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, k_scales_ptr, v_scales_ptr,
    heads, k_token, k_head, k_dim, v_token, v_head, v_dim,
    D: tl.constexpr, V_D: tl.constexpr, LIMIT: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token, all its heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        head, col = tl.arange(0, HEADS).to(tl.int64)[:, None], tl.arange(0, BLOCK).to(tl.int64)[None, :]
        mask, v_mask = (head < heads) & (col < D), (head < heads) & (col < V_D)
        k = tl.load(k_ptr + token * k_token + head * k_head + col * k_dim, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + token * v_token + head * v_head + col * v_dim, mask=v_mask, other=0.0).to(tl.float32)
        k = transformed(k, D, 0, HEADS, BLOCK) if LIMIT > 0 else k
        store_heads(k, k_pages_ptr, k_scales_ptr, slot, heads, True, D, LIMIT, PAGE, HEADS, BLOCK)
        store_heads(v, v_pages_ptr, v_scales_ptr, slot, heads, True, V_D, LIMIT, PAGE, HEADS, BLOCK)


def check_pages(op: str, k_pages: torch.Tensor, v_pages: torch.Tensor, *scales: torch.Tensor | None) -> None:
    """Refuse pages and scales that are not contiguous, and 8-bit pages without scales."""
    if not all(x.is_contiguous() for x in (k_pages, v_pages, *scales) if x is not None):
        raise ValueError(f"{op}: the pages and their scales must be contiguous")
    if k_pages.dtype == torch.float8_e4m3fn and 80 <= architecture(k_pages.device) < 89:
        raise ValueError(
            f"{op}: this GPU converts no float8_e4m3fn; make the pages int8, which is closer, or float8_e5m2"
        )
    for each in scales:
        if (each is None) != (k_pages.dtype.itemsize > 1):
            raise ValueError(f"{op}: pages of {k_pages.dtype} and k_scales, v_scales: 8 bits have them, others not")


@launcher(mutates=("k_pages", "v_pages", "k_scales", "v_scales"))
def write_pages_launch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> None:
    T, K, D = k.shape
    heads, block = next_power_of_2(K), next_power_of_2(max(D, v.shape[2]))
    launch(
        kv_write_kernel, (T,),
        k, v, k_pages, v_pages, slots, k if k_scales is None else k_scales, v if v_scales is None else v_scales,
        K, *k.stride(), *v.stride(),
        D=D, V_D=v.shape[2], LIMIT=page_limit(k_pages.dtype), PAGE=k_pages.shape[1], HEADS=heads, BLOCK=block,
        num_warps=max(1, min(8, heads * block // 512)),
    )  # fmt: skip


def _write_pages_fused(k, v, k_pages, v_pages, slots, k_scales=None, v_scales=None):
    check_pages("write_pages", k_pages, v_pages, k_scales, v_scales)
    write_pages_launch(k, v, k_pages, v_pages, slots, k_scales, v_scales)


def page_scales(m, *pages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Test case: scale tensors of keys and values, as options."""
    shapes = [(len(each), each.shape[2], each.shape[1]) for each in pages]
    return {name: torch.zeros(shape, device=m.device) for name, shape in zip(("k_scales", "v_scales"), shapes)}


def _batch(m, T, K, D, P, page, page_dtype=None, v_dim=None):
    slots = torch.randperm(P * page, generator=m.generator)[:T].to(m.device)
    if m.device.type != "meta":
        slots[T // 2 : T // 2 + 1] = -1
    widths = D, v_dim or D
    k, v = (m.normal(T, K, width, grad=False) for width in widths)
    pages = [torch.zeros(P, page, K, width, dtype=page_dtype or m.dtype, device=m.device) for width in widths]
    return k, v, *pages, slots, page_scales(m, *pages) if page_dtype else {}


write_pages = Op(
    name="write_pages",
    reference=_write_pages,
    fused=_write_pages_fused,
    shapes="k T K D, v T K E, k_pages P page K D, v_pages P page K E, slots T, k_scales P K page, v_scales P K page",
    mutates=("k_pages", "v_pages", "k_scales", "v_scales"),
    cases=[
        Case("padding", lambda m: _batch(m, 5, 2, 24, 3, 4)),
        Case("int8 pages", lambda m: _batch(m, 5, 2, 32, 3, 4, torch.int8)),
        Case("int8 pages, two sizes", lambda m: _batch(m, 5, 3, 24, 3, 4, torch.int8)),
        Case("float8 pages", lambda m: _batch(m, 5, 2, 32, 3, 4, torch.float8_e4m3fn)),
        Case("float8 pages of sm_80", lambda m: _batch(m, 5, 2, 16, 3, 4, torch.float8_e5m2)),
        Case("narrow values", lambda m: _batch(m, 5, 1, 40, 3, 4, v_dim=8)),
        Case("narrow values in int8", lambda m: _batch(m, 5, 1, 40, 3, 4, torch.int8, v_dim=8)),
        Case("no tokens", lambda m: _batch(m, 0, 2, 8, 2, 4)),
        Case("8192 tokens, 8 heads of 128", lambda m: _batch(m, 8192, 8, 128, 1024, 16), bench=True),
        Case("8192 tokens, int8 pages", lambda m: _batch(m, 8192, 8, 128, 1024, 16, torch.int8), bench=True),
    ],
    budget=Budget(registers=96, vector=True),
    traffic=lambda k, v, k_pages, *_, **__: (k.nbytes + v.nbytes + 2 * k.numel() * k_pages.itemsize, 0),
)
