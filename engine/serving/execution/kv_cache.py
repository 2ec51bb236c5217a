"""Paged KV cache: keys and values of every layer in pages, and the `attend` that writes and reads them.

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
    """Bytes of a tile: sixteen keys, or values, of a head, and their scales."""
    return TILE * (-(-head_size // 16) * 16 + 4)


class PagedKVCache:
    """Keys and values in `num_pages` pages."""

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
        """Bytes of one page, over all layers."""
        if dtype == torch.int8 and _in_cpp(dtype, device, latent):
            return 2 * config.n_layers * config.kv_heads * page_size // TILE * tile_bytes(config.head_size)
        scales = (2 if latent else 2 * config.kv_heads) * 4 * config.n_layers if dtype.itemsize == 1 else 0
        return page_size * (config.kv_bytes_per_token(dtype.itemsize, latent) + scales)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors (layers, pages, …) of which a page is a block each, as bytes."""
        return tuple(x.view(torch.uint8) for x in (self.keys, self.values, *self.scales))

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy pages: all are read before any is written."""
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.keys.device).T
            for pages in self.parts:
                pages[:, targets] = pages[:, sources]

    def layout(
        self, table: np.ndarray, rows: np.ndarray, positions: np.ndarray, counts: np.ndarray
    ) -> "AttentionMetadata":
        """Attention metadata of a step: where its tokens lie: chunks of `counts` tokens of these rows at these
        positions, then padding."""
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
        """The attention of one step; `step` is the layout on the device."""
        return KernelAttention(self, *step) if self.layers is None else NativeAttend(self.layers, layout)


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """A step's tokens (T) and sequences (N) as arrays; a negative slot is padding."""

    positions: np.ndarray  # (T)
    sequences: np.ndarray  # (T): whose token it is
    slots: np.ndarray  # (T): page · page size + offset
    tables: np.ndarray  # (N, pages of the longest)
    contexts: np.ndarray  # (N): tokens to look at, the new ones included
    counts: np.ndarray  # (N): new ones
    starts: np.ndarray  # (N + 1): where each sequence's new tokens begin, and where the last one's end

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Arguments of the kernels."""
        return self.positions, self.slots, self.tables, self.contexts, self.counts, self.starts


class KernelAttention:
    """`attend` by the kernels, on any device."""

    def __init__(self, store: PagedKVCache, positions: Tensor, slots: Tensor, *batch: Tensor):
        """`batch` is the tables, contexts, counts and starts of the sequences. What all layers share is made once."""
        self.store, self.positions, self.slots, self.batch = store, positions, slots, batch[:3]
        arrivals = torch.zeros(len(batch[1]) * store.key_heads, dtype=torch.int32, device=slots.device)
        self.shared = {"starts": batch[3], "arrivals": arrivals}

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, layer) -> Tensor:
        self.write(k_BTKD[0], v_BTKD[0], layer)
        q_THD = kernels.hadamard(q_BTHD[0], back=True) if self.store.scales else q_BTHD[0]
        return self.attend_pages(q_THD, layer)[None]

    def write(self, k_TKD: Tensor, v_TKD: Tensor, layer) -> None:
        """Put keys and values at the slots of the step's tokens."""
        kernels.write_pages(k_TKD, v_TKD, *self.pages(layer), self.slots, **self.scales(layer))

    def pages(self, layer) -> tuple[Tensor, Tensor]:
        """A layer's keys and values."""
        return self.store.keys[layer.index], self.store.values[layer.index]

    def scales(self, layer) -> dict[str, Tensor]:
        """Those of its pages, as arguments, if they have 8 bits."""
        return {name: each[layer.index] for name, each in zip(("k_scales", "v_scales"), self.store.scales)}

    def attend_pages(self, q_THD: Tensor, layer) -> Tensor:
        """Attention over the pages written so far; 8-bit pages take queries rotated as their keys are."""
        options = {
            **self.scales(layer),
            "window": layer.window,
            "softcap": layer.softcap,
            "scale": layer.scale,
            "sinks": layer.sinks,
        }
        return kernels.paged_attention(q_THD, *self.pages(layer), *self.batch, **options, **self.shared)

    def attend_latents(self, q_THL: Tensor, q_THR: Tensor, layer) -> Tensor:
        """The same of latents, by queries in two parts."""
        options = {**self.scales(layer), "window": layer.window, "softcap": layer.softcap, "scale": layer.scale}
        return kernels.latent_attention(q_THL, q_THR, *self.pages(layer), *self.batch, **options, **self.shared)


def _in_cpp(dtype: torch.dtype, device: torch.device, latent: bool) -> bool:
    """Return whether pages are written and read by the C++ extension."""
    return HAS_NATIVE and device.type == "cpu" and dtype in PAGE_FORMATS and not latent


class NativeAttend:
    """`attend` in C++."""

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
    """Zeros; on a CPU by NumPy, which asks the system for them: memory that no page uses yet is never touched.

    They begin with a cache line, so that a row of keys lies in as few of them as it can.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, dtype=np.uint8)
    first = -memory.ctypes.data % 64
    return torch.from_numpy(memory[first : first + size]).view(dtype).view(shape)


def to_device(arrays: Iterable[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on a device, all in one asynchronous copy instead of one each."""
    tensors = [torch.from_numpy(array) for array in arrays]
    return tensors if device.type == "cpu" else _in_one_copy(tensors, device)


def buffer_bytes(kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes in which tensors of these dtypes and shapes lie side by side, each at a multiple of 16."""
    return sum(-(-math.prod(shape) * dtype.itemsize // 16) * 16 for dtype, shape in kinds)


def buffer_views(buffer: Tensor, kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Views of a buffer as tensors of these dtypes and shapes."""
    found, start = [], 0
    for dtype, shape in kinds:
        found.append(buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
        start += buffer_bytes([(dtype, shape)])
    return found


def _in_one_copy(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Side by side in pinned memory, which the device reads by itself; views of one buffer there."""
    kinds = [(x.dtype, tuple(x.shape)) for x in tensors]
    buffer = torch.empty(buffer_bytes(kinds), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for x, place in zip(tensors, buffer_views(buffer, kinds)):
        place.copy_(x)
    return buffer_views(buffer.to(device, non_blocking=True), kinds)


def to_host(tensor: Tensor) -> Callable[[], list]:
    """Begin a copy to the host; return what waits for it and gives the values. A GPU copies at once, so that this
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
    """Let the C++ kernels use as many threads as torch does, and no more than a container's quota allows."""
    if HAS_NATIVE:
        _native.set_threads(min(torch.get_num_threads(), available_cpus()))


def _rows(x_BTHD: Tensor) -> Tensor:
    """Float rows whose heads lie side by side; the rows themselves may lie apart."""
    x = x_BTHD.float()
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
