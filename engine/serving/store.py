"""The pages themselves: keys and values of every layer, and the `attend` that writes and reads them.

Two tensors (layers, pages, page size, K heads, D): page p of layer l is a contiguous block, so a copy of a page or a
read of it is one run of memory. On a CPU with the native extension, writing and attending is one C++ call a layer that
reads each page where it lies; elsewhere the `kernels` do it. Both give the same numbers up to rounding.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ... import kernels

try:
    from ... import _native
except ImportError:  # the extension is optional
    _native = None


class PageStore:
    """Keys and values in `num_pages` pages."""

    def __init__(self, config, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layers, num_pages, page_size, config.kv_heads, config.head_size)
        self.page_size = page_size
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.native = device.type == "cpu" and hasattr(_native, "attend_pages") and dtype in _NATIVE

    @staticmethod
    def bytes_per_page(config, page_size: int, dtype: torch.dtype) -> int:
        """What one page costs, over all layers."""
        return page_size * config.kv_bytes_per_token(dtype.itemsize)

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy pages: all are read before any is written."""
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.keys.device).T
            for pages in (self.keys, self.values):
                pages[:, targets] = pages[:, sources]

    def attend(
        self, table: np.ndarray, rows: np.ndarray, row_T: np.ndarray, positions: np.ndarray, counts: np.ndarray
    ) -> Callable[[Tensor, Tensor, Tensor, object], Tensor]:
        """The attention of one step: chunks of `counts` tokens of these rows, ending at these positions."""
        T, ends = len(row_T), np.cumsum(counts)
        contexts = (positions[ends - 1] + 1).astype(np.int32)
        slots = np.full(len(positions), -1, dtype=np.int64)
        where = positions[:T]
        slots[:T] = table[row_T, where // self.page_size].astype(np.int64) * self.page_size + where % self.page_size
        tables = np.ascontiguousarray(table[rows, : -(-int(contexts.max()) // self.page_size)])
        return self._generic(slots, tables, contexts, counts)

    def _generic(self, slots, tables, contexts, counts) -> Callable:
        device = self.keys.device
        slots, tables, contexts, counts = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in (slots, tables, contexts, counts)
        )

        def attend(q_BTHD, k_BTKD, v_BTKD, layer):
            keys, values = self.keys[layer.index], self.values[layer.index]
            kernels.write_pages(k_BTKD[0], v_BTKD[0], keys, values, slots)
            return kernels.paged_attention(
                q_BTHD[0], keys, values, tables, contexts, counts,
                window=layer.window, softcap=layer.softcap, scale=layer.scale,
            )[None]  # fmt: skip

        return attend


_NATIVE = {torch.float32: 0, torch.bfloat16: 1}
