"""Paged KV cache, and the `attend` that writes and reads it.

Two tensors (layers, pages, page size, K heads, D): page p of layer l is a contiguous block, so a copy of a page or a
read of it is one run of memory. With latent attention on a GPU (`gpu_model.py`) the latents of a token lie where keys
would, and the rotated part of its keys where values would. On a CPU with the native extension, writing and attending is
one C++ call a layer that reads each page where it lies; elsewhere the `kernels` do it. Both give the same numbers up to
rounding.

Pages may have 8 bits, which is half of what decoding reads and twice the tokens in the same memory: each token's key
and value of a head has a scale of its own (`kernels/write_pages.py`). The kernels keep scales beside the pages,
(layers, pages, K heads, page size). C++ wants a page of whole numbers as a row of tiles, one for every sixteen tokens
and head, laid out for a dot-product instruction that takes four neighboring bytes a lane. It is the same bytes and
scales, of heads padded to a multiple of sixteen:

    keys    (D / 4, 16 tokens, 4)   + 128, then 16 scales in float32
    values  (4, D, 4 tokens)               then 16 scales
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .... import kernels
from ....kernels.cpu.extension import native as _native
from ....tokenizer.cpus import available_cpus

PAGE_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}  # that C++ knows
HAS_NATIVE = _native is not None
TILE = 16  # tokens


def tile_bytes(head_size: int) -> int:
    """Bytes of a tile: sixteen keys (or values) of a head, and their scales."""
    return TILE * (-(-head_size // 16) * 16 + 4)


class PagedKVCache:
    """Paged KV cache of all layers: `num_pages` pages."""

    def __init__(
        self, config, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device, latent: bool = False
    ):
        native = _in_cpp(dtype, device, latent)
        rows = config.n_layers, num_pages, page_size
        heads = [(1, config.kv_rank), (1, config.rope_dim)] if latent else [(config.kv_heads, config.head_size)] * 2
        self.key_heads = config.n_heads if latent else config.kv_heads
        self.page_size, self.dtype = page_size, dtype
        if native and dtype == torch.int8:
            tiles = config.n_layers, num_pages, page_size // TILE, config.kv_heads, tile_bytes(config.head_size)
            self.keys, self.values = (_zeros(tiles, torch.uint8, device) for _ in range(2))
        else:
            self.keys, self.values = (_zeros((*rows, *head), dtype, device) for head in heads)
        self.scales: tuple[Tensor, ...] = ()
        if dtype.itemsize == 1 and not native:
            shape = config.n_layers, num_pages, heads[0][0], page_size
            self.scales = tuple(_zeros(shape, torch.float32, device) for _ in range(2))
        self.layers = None
        if native:
            sizes = PAGE_FORMATS[dtype], page_size, config.kv_heads, config.head_size
            sides = zip(self.keys, self.values)
            self.layers = [_native.Pages(keys, values, *sizes) for keys, values in sides]

    @staticmethod
    def bytes_per_page(config, page_size: int, dtype: torch.dtype, device: torch.device, latent: bool = False) -> int:
        """Bytes of a page over all layers."""
        if dtype == torch.int8 and _in_cpp(dtype, device, latent):
            return 2 * config.n_layers * config.kv_heads * page_size // TILE * tile_bytes(config.head_size)
        scales = (2 if latent else 2 * config.kv_heads) * 4 * config.n_layers if dtype.itemsize == 1 else 0
        return page_size * (config.kv_bytes_per_token(dtype.itemsize, latent) + scales)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Byte views (layers, pages, …) of keys, values and scales, to copy or save pages."""
        return tuple(x.view(torch.uint8) for x in (self.keys, self.values, *self.scales))

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy pages (copy-on-write); all are read before any is written."""
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.keys.device).T
            for pages in self.parts:
                pages[:, targets] = pages[:, sources]

    def layout(
        self, table: np.ndarray, rows: np.ndarray, positions: np.ndarray, counts: np.ndarray
    ) -> "AttentionMetadata":
        """Build the attention metadata of a step: chunks of `counts` tokens of these rows at these positions, then
        padding."""
        ends = counts.cumsum()
        contexts = (positions[ends - 1] + 1).astype(np.int32)
        T, longest = int(ends[-1]), max(contexts.tolist())
        tables = np.ascontiguousarray(table[rows, : -(-longest // self.page_size)])
        sequences = np.zeros(len(positions), dtype=np.int32)
        sequences[:T] = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        slots = np.full(len(positions), -1, dtype=np.int64)
        where = positions[:T]
        slots[:T] = tables[sequences[:T], where // self.page_size].astype(np.int64) * self.page_size
        slots[:T] += where % self.page_size
        starts = np.concatenate([[0], ends]).astype(np.int32)
        return AttentionMetadata(positions, sequences, slots, tables, contexts, counts, starts)

    def attend(self, layout: "AttentionMetadata", step: list[Tensor]) -> "NativeAttend | KernelAttention":
        """Make the `attend` of one step; `step` is the metadata on the device."""
        return KernelAttention(self, *step) if self.layers is None else NativeAttend(self.layers, layout)


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Attention metadata of a step of T tokens and N sequences; a negative slot is padding."""

    positions: np.ndarray  # (T)
    sequences: np.ndarray  # (T): whose token it is
    slots: np.ndarray  # (T): page · page size + offset
    tables: np.ndarray  # (N, pages of the longest)
    contexts: np.ndarray  # (N): tokens to look at, the new ones included
    counts: np.ndarray  # (N): new ones
    starts: np.ndarray  # (N + 1): where each sequence's new tokens begin, and where the last one's end

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The kernels' arguments, in order."""
        return self.positions, self.slots, self.tables, self.contexts, self.counts, self.starts


class KernelAttention:
    """`attend` by the Triton kernels or their references, on any device."""

    def __init__(self, store: PagedKVCache, positions: Tensor, slots: Tensor, *batch: Tensor):
        """`batch`: page tables, context lengths, token counts and starts. Buffers that layers share are made once."""
        self.store, self.positions, self.slots, self.batch = store, positions, slots, batch[:3]
        arrivals = torch.zeros(len(batch[1]) * store.key_heads, dtype=torch.int32, device=slots.device)
        self.shared = {"starts": batch[3], "arrivals": arrivals}

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, layer) -> Tensor:
        self.write(k_BTKD[0], v_BTKD[0], layer)
        q_THD = kernels.hadamard(q_BTHD[0], back=True) if self.store.scales else q_BTHD[0]
        return self.attend_pages(q_THD, layer)[None]

    def write(self, k_TKD: Tensor, v_TKD: Tensor, layer) -> None:
        """Write keys and values into the cache at the step's slots."""
        kernels.write_pages(k_TKD, v_TKD, *self.pages(layer), self.slots, **self.scales(layer))

    def pages(self, layer) -> tuple[Tensor, Tensor]:
        """The pages of a layer: keys, values."""
        return self.store.keys[layer.index], self.store.values[layer.index]

    def scales(self, layer) -> dict[str, Tensor]:
        """Scales of a layer's 8-bit pages, as keyword arguments; empty for wider pages."""
        return {name: each[layer.index] for name, each in zip(("k_scales", "v_scales"), self.store.scales)}

    def attend_pages(self, q_THD: Tensor, layer) -> Tensor:
        """Paged attention; for 8-bit pages, queries must be Hadamard-rotated as the keys are."""
        options = {
            **self.scales(layer),
            "window": layer.window,
            "softcap": layer.softcap,
            "scale": layer.scale,
            "sinks": layer.sinks,
        }
        return kernels.paged_attention(q_THD, *self.pages(layer), *self.batch, **options, **self.shared)

    def attend_latents(self, q_THL: Tensor, q_THR: Tensor, layer) -> Tensor:
        """Paged attention over latents (MLA); queries come in a latent and a rotary part."""
        options = {**self.scales(layer), "window": layer.window, "softcap": layer.softcap, "scale": layer.scale}
        return kernels.latent_attention(q_THL, q_THR, *self.pages(layer), *self.batch, **options, **self.shared)


def _in_cpp(dtype: torch.dtype, device: torch.device, latent: bool) -> bool:
    """Return whether the C++ extension reads and writes these pages."""
    return HAS_NATIVE and device.type == "cpu" and dtype in PAGE_FORMATS and not latent


class NativeAttend:
    """`attend` by the C++ extension."""

    def __init__(self, layers: list, layout: AttentionMetadata):
        self.layers, self.layout = layers, layout
        self.step = _native.Step(layout.positions, layout.sequences, layout.slots, layout.tables)

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, layer) -> Tensor:
        q, k, v = (_rows(x) for x in (q_BTHD, k_BTKD, v_BTKD))
        o_BTHD = torch.zeros(q_BTHD.shape)
        sinks = None if layer.sinks is None else layer.sinks.detach().float()
        limits = layer.window or 0, layer.softcap or 0.0, layer.scale, sinks
        _native.attend_pages(self.layers[layer.index], self.step, q, k, v, o_BTHD, *limits)
        return o_BTHD.to(q_BTHD.dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, on a CPU allocated lazily by the system: unused pages take no memory.

    They begin with a cache line, so that a row of keys lies in as few of them as it can.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, dtype=np.uint8)
    first = -memory.ctypes.data % 64
    return torch.from_numpy(memory[first : first + size]).view(dtype).view(shape)


def to_device(arrays: Iterable[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy arrays to a device in one asynchronous transfer."""
    tensors = [torch.from_numpy(array) for array in arrays]
    return tensors if device.type == "cpu" else _in_one_copy(tensors, device)


def buffer_bytes(kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of tensors of these dtypes and shapes in one buffer, each aligned to 16 bytes."""
    return sum(-(-math.prod(shape) * dtype.itemsize // 16) * 16 for dtype, shape in kinds)


def buffer_views(buffer: Tensor, kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Views of a buffer as tensors of these dtypes and shapes."""
    found, start = [], 0
    for dtype, shape in kinds:
        found.append(buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
        start += buffer_bytes([(dtype, shape)])
    return found


def _in_one_copy(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Pack tensors into one pinned buffer and copy it; return views on the device."""
    kinds = [(x.dtype, tuple(x.shape)) for x in tensors]
    buffer = torch.empty(buffer_bytes(kinds), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for x, place in zip(tensors, buffer_views(buffer, kinds)):
        place.copy_(x)
    return buffer_views(buffer.to(device, non_blocking=True), kinds)


def to_host(tensor: Tensor) -> Callable[[], list]:
    """Start an asynchronous copy to the host; return a function that waits for it and returns the values. On a GPU it
    waits for no later work."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    landed, event = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), torch.cuda.Event()
    landed.copy_(tensor, non_blocking=True)
    event.record()

    def read() -> list:
        event.synchronize()
        return landed.tolist()

    return read


def set_threads() -> None:
    """Set the C++ kernels' threads to torch's, at most the container's CPU quota."""
    if HAS_NATIVE:
        _native.set_threads(min(torch.get_num_threads(), available_cpus()))


def _rows(x_BTHD: Tensor) -> Tensor:
    """Float32 with heads contiguous within a token; tokens may be strided."""
    x = x_BTHD.float()
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
