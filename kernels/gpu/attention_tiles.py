"""Shared tile arithmetic of the attention kernels: masks, ranges of visible blocks, tile addresses.

A query at row i of a sequence sits at key position i + shift, where shift = keys - queries: the mask is aligned at the
end, so a chunk of new queries sees the whole past. `causal` hides the future; `window` hides what is W or more away.
For a block of queries that leaves one contiguous run of key blocks, and only those at its ends (the diagonal, the
window's edge, the ragged last one) hold a hidden pair: blocks outside are never touched, blocks inside never masked.

Ragged batches come as cumulative lengths on the device. Sequence s owns the tiles from `cu[s] // BLOCK + s` on: never
fewer than it needs, known without reading a length back to the host, so the grid is static. SEARCH_STEPS, 0 for a
batch that is not ragged, is how many steps the search for a tile's sequence takes. By the same trick the statistics of
sequence s, a number a query, begin at (cu[s] + 4 s) & ~3: at a multiple of 16 bytes, as the copy engine wants it.

Products that reach an address are 64-bit; row numbers, which masks compare, are 32-bit.

The same kernels load tiles in two ways. By pointers (`TMA` false): any tensor, any GPU. Or by descriptors: base, shape
and strides of a matrix, from which Hopper's copy engine (TMA) loads a tile, zero-padded where it overhangs. Loads by
descriptor let Triton specialize warps (`warp_specialize`): one warp group, the producer, only issues TMA loads; two
others, the consumers, multiply and take exponentials, one half of the rows each, so that while one waits for the tensor
cores the other keeps them busy. mbarriers say which tile is full and which is free. Within a group, every `wgmma` is
waited for at once: softmax and products of one group do not overlap, as they do in FlashAttention-3, whose ablation
puts a price on it: 582 against 661 TFLOP/s.

Warp specialization wants one loop, no branch inside, no early return. Hence a tile without work runs an empty loop, and
with descriptors every block is masked, where a branch otherwise skips the mask for fully visible blocks.
"""

from ..core.lang import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
UNSPECIALIZED = ("tiles", "batch_heads", "heads_in_l2", "q_len", "k_len", "sequences")
"""Arguments that change from batch to batch: a kernel that looked at their values would be compiled again and again."""


@triton.jit
def sequence_of_tile(tile, cu, sequences, BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr):
    """Sequence that owns a tile of a ragged batch, by bisection: the last s with cu[s] // BLOCK + s <= tile.

    A fixed number of halvings without a branch: a loop that ends when it is done defeats warp specialization."""
    low = tl.cast(0, tl.int32)
    high = tl.cast(sequences, tl.int32)
    for _ in tl.static_range(SEARCH_STEPS):
        middle = (low + high) // 2
        here = tl.load(cu + middle) // BLOCK + middle <= tile
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return low


@triton.jit
def tile_coordinates(
    cu, tiles, batch_heads, heads, heads_in_l2, q_len, k_len, sequences,
    BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr, REVERSE_TILES: tl.constexpr,
):  # fmt: skip
    """Decode a program id: (batch, head, row of the tile, its token, first token of the sequence, offset of its
    statistics, number of queries, number of keys).

    Programs start in order, so heads go in groups of `heads_in_l2`, whose keys and values fit the L2 cache, and in a
    group the tiles with the most work go first: the short ones then fill the gaps at the end, which balances a causal
    triangle."""
    # Divided in 32 bits: a 64-bit division is a call, and what lives across it was spilled on sm_100.
    pid = tl.program_id(0)
    per_group = (tl.cast(tiles, tl.int64) * heads_in_l2).to(tl.int32)
    first_head = (tl.cast(pid // per_group, tl.int64) * heads_in_l2).to(tl.int32)
    width = tl.minimum(batch_heads - first_head, heads_in_l2)
    inside = pid % per_group
    tile = inside // width
    if REVERSE_TILES:
        tile = tiles - 1 - tile
    flat = first_head + inside % width
    start = tl.cast(0, tl.int32)
    stats = start.to(tl.int64)
    if SEARCH_STEPS > 0:
        sequence = sequence_of_tile(tile, cu, sequences, BLOCK, SEARCH_STEPS)
        start = tl.load(cu + sequence).to(tl.int32)
        q_len = tl.load(cu + sequence + 1).to(tl.int32) - start
        k_len = q_len
        tile = tile - (start // BLOCK + sequence)
        stats = (start.to(tl.int64) + 4 * sequence) // 4 * 4
    first = start.to(tl.int64)
    row = tile.to(tl.int64) * BLOCK
    batch, head = (flat // heads).to(tl.int64), (flat % heads).to(tl.int64)
    return batch, head, row.to(tl.int32), first + row, first, stats, q_len, k_len


@triton.jit
def tile_offsets(rows, stride, BLOCK_D: tl.constexpr):
    """Element offsets of a (rows, BLOCK_D) tile whose last dimension is contiguous."""
    return rows.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :].to(tl.int64)


@triton.jit
def head_of(x, batch, head, token, stride_b, stride_t, stride_h):
    """Offset of a token's row in one head."""
    return x + batch * stride_b + head * stride_h + token * stride_t


@triton.jit
def tile_of_head(x, batch, head, token, rows, stride_b, stride_t, stride_h, BLOCK_D: tl.constexpr):
    """Pointers to a (rows, BLOCK_D) tile of one head, rows counted from a token."""
    return head_of(x, batch, head, token, stride_b, stride_t, stride_h) + tile_offsets(rows, stride_t, BLOCK_D)


@triton.jit
def load_tile(pointers, rows, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a tile, zero-padded where it overhangs."""
    mask = rows[:, None] < limit
    if BLOCK_D != D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def rows_of(base, length, stride_t, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Address of a head's rows (length, D): a TMA descriptor, or pointers to the first tile of BLOCK rows."""
    if TMA:
        rows = tl.make_tensor_descriptor(base, [tl.maximum(length, 1), D], [stride_t, 1], [BLOCK, BLOCK_D])
    else:
        rows = base + tile_offsets(tl.arange(0, BLOCK), stride_t, BLOCK_D)
    return rows


@triton.jit
def load_rows(
    rows, first, length, stride_t, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """Load (BLOCK, BLOCK_D) of `rows_of` from row `first` on, zero-padded."""
    if TMA:
        tile = rows.load([first, 0])
    else:
        tile = load_tile(rows + tl.cast(first, tl.int64) * stride_t, first + tl.arange(0, BLOCK), length, D, BLOCK_D)
    return tile


@triton.jit
def heads_of(
    base, heads, length, stride_h, stride_t,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Address of the rows of several heads, for `load_head_rows`."""
    if TMA:
        shape = [heads, tl.maximum(length, 1), D]
        rows = tl.make_tensor_descriptor(base, shape, [stride_h, stride_t, 1], [1, BLOCK, BLOCK_D])
    else:
        rows = rows_of(base, length, stride_t, D, BLOCK, BLOCK_D, False)
    return rows


@triton.jit
def load_head_rows(
    rows, head, first, length, stride_h, stride_t,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load (BLOCK, BLOCK_D) of one of the heads from row `first` on."""
    if TMA:
        tile = rows.load([head, first, 0]).reshape(BLOCK, BLOCK_D)
    else:
        tile = load_rows(rows + tl.cast(head, tl.int64) * stride_h, first, length, stride_t, D, BLOCK, BLOCK_D, False)
    return tile


@triton.jit
def load_numbers(base, first, length, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Load (BLOCK) per-row numbers from row `first` on, zero behind the last. By TMA if the tiles are: warp
    specialization cannot halve other loads."""
    if TMA:
        numbers = tl.make_tensor_descriptor(base, [tl.maximum(length, 1)], [1], [BLOCK]).load([first])
    else:
        rows = first + tl.arange(0, BLOCK)
        numbers = tl.load(base + rows, mask=rows < length, other=0.0)
    return numbers


@triton.jit
def head_numbers_of(base, heads, length, stride_h, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Address of the per-row numbers of several heads, for `load_head_numbers`."""
    if TMA:
        numbers = tl.make_tensor_descriptor(base, [heads, tl.maximum(length, 1)], [stride_h, 1], [1, BLOCK])
    else:
        numbers = base
    return numbers


@triton.jit
def load_head_numbers(numbers, head, first, length, stride_h, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Load (1, BLOCK) numbers of one of the heads from row `first` on."""
    if TMA:
        found = numbers.load([head, first])
    else:
        found = load_numbers(numbers + tl.cast(head, tl.int64) * stride_h, first, length, BLOCK, False)[None, :]
    return found


@triton.jit
def store_tile(pointers, tile, rows, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = rows[:, None] < limit
    if BLOCK_D != D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def visible(q_pos, k_pos, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Attention mask of positions: True where the query at q_pos sees the key at k_pos. Operands broadcast."""
    seen = k_pos < k_len
    if CAUSAL:
        seen = seen & (k_pos <= q_pos)
    if WINDOW > 0:
        seen = seen & (k_pos > q_pos - WINDOW)
        if not CAUSAL:
            seen = seen & (k_pos < q_pos + WINDOW)
    return seen


@triton.jit
def all_visible(q_first, q_last, k_first, k_last, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return whether every query at q_first..q_last sees every key at k_first..k_last (no mask needed)."""
    seen = k_last < k_len
    if CAUSAL:
        seen = seen & (k_last <= q_first)
    if WINDOW > 0:
        seen = seen & (k_first > q_last - WINDOW)
        if not CAUSAL:
            seen = seen & (k_last < q_first + WINDOW)
    return seen


@triton.jit
def last_visible(rows, q_len, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Last key that each query row sees, computed once to be compared with blocks of keys."""
    last = rows * 0 + (k_len - 1)
    if CAUSAL:
        last = tl.minimum(last, rows + (k_len - q_len))
    elif WINDOW > 0:
        last = tl.minimum(last, rows + (k_len - q_len + WINDOW - 1))
    return last


@triton.jit
def hide(
    x, fill, position, rows, last, key, q_len, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Mask (BLOCK_M, BLOCK_N): x, or `fill` where a row does not see a key. `position`: of the first row."""
    if TMA or not all_visible(position, position + BLOCK_M - 1, key, key + BLOCK_N - 1, k_len, CAUSAL, WINDOW):
        keys = key + tl.arange(0, BLOCK_N)
        seen = keys[None, :] <= last[:, None]
        if WINDOW > 0:
            seen = seen & (keys[None, :] > (rows + (k_len - q_len - WINDOW))[:, None])
        x = tl.where(seen, x, fill)
    return x


@triton.jit
def key_run(first, last, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Range of keys seen by any query at positions first..last: (begin, end), begin a multiple of BLOCK."""
    begin = 0
    end = k_len
    if CAUSAL:
        end = tl.minimum(end, last + 1)
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0)
        begin = tl.multiple_of(begin - begin % BLOCK, BLOCK)
        if not CAUSAL:
            end = tl.minimum(end, last + WINDOW)
    return begin, end


@triton.jit
def query_run(first, last, q_len, shift, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Range of query rows that see any of the keys first..last: (begin, end), begin a multiple of BLOCK."""
    begin = 0
    end = q_len
    if CAUSAL:
        begin = tl.maximum(first - shift, 0)
    if WINDOW > 0:
        end = tl.minimum(end, last - shift + WINDOW)
        if not CAUSAL:
            begin = tl.maximum(first - shift - WINDOW + 1, 0)
    begin = tl.multiple_of(begin - begin % BLOCK, BLOCK)  # pyright: ignore[reportOperatorIssue]
    return begin, end


@triton.jit
def initial_max(sinks, heads, ROWS: tl.constexpr):
    """Initial maximum (ROWS) of an online softmax: −inf, or each row's sink, whose weight is then 1."""
    if sinks is None:
        peak = tl.full([ROWS], float("-inf"), tl.float32)
    else:
        peak = tl.zeros([ROWS], tl.float32) + tl.load(sinks + heads).to(tl.float32) * LOG2E
    return peak


@triton.jit
def capped(scores, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Soft cap SOFTCAP · tanh(SCALE · scores / SOFTCAP), by one exponential without NaN by overflow; 0 is no cap."""
    if SOFTCAP > 0:
        grown = tl.exp2(scores * (2.0 * SCALE / SOFTCAP * LOG2E))
        scores = SOFTCAP - 2.0 * SOFTCAP / (1.0 + grown)
    return scores


@triton.jit
def through_cap(ds, scores, SOFTCAP: tl.constexpr):
    """Gradient through the soft cap."""
    if SOFTCAP > 0:
        ds = ds * (1.0 - scores * scores * (1.0 / SOFTCAP / SOFTCAP))
    return ds
