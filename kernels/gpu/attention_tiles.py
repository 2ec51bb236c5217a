"""Tile arithmetic that every attention kernel shares: who sees whom, which blocks a block walks, and where a tile lies.

A query at row i of a sequence sits at key position i + shift, where shift = keys - queries: the mask is aligned at the
end, so a chunk of new queries sees the whole past. `causal` hides the future; `window` hides what is W or more away.
For a block of queries that leaves one contiguous run of key blocks, and only those at its ends (the diagonal, the
window's edge, the ragged last one) hold a hidden pair: blocks outside are never touched, blocks inside never masked.

Ragged batches come as cumulative lengths on the device. Sequence s owns the tiles from `cu[s] // BLOCK + s` on: never
fewer than it needs, known without reading a length back to the host, so the grid is static. SEARCH_STEPS, 0 for a
batch that is not ragged, is how many steps the search for a tile's sequence takes. By the same trick the statistics of
sequence s, a number a query, begin at (cu[s] + 4 s) & ~3: at a multiple of 16 bytes, as the copy engine wants it.

Products that reach an address are 64-bit; row numbers, which masks compare, are 32-bit.
"""

from ..core.lang import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
UNSPECIALIZED = ("tiles", "batch_heads", "heads_in_l2", "q_len", "k_len", "sequences")
"""Arguments that change from batch to batch: a kernel that looked at their values would be compiled again and again."""


@triton.jit
def sequence_of_tile(tile, cu, sequences, BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr):
    """The sequence that owns a tile of a ragged batch, by bisection: the last s with cu[s] // BLOCK + s <= tile.

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
    """-> (batch, head, row of the tile, its token, first token of the sequence, where its statistics begin, its
    queries, its keys).

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
    """Offset of the row of a token: where it begins, in one head."""
    return x + batch * stride_b + head * stride_h + token * stride_t


@triton.jit
def tile_of_head(x, batch, head, token, rows, stride_b, stride_t, stride_h, BLOCK_D: tl.constexpr):
    """Pointers to a (rows, BLOCK_D) tile of one head, its rows counted from a token."""
    return head_of(x, batch, head, token, stride_b, stride_t, stride_h) + tile_offsets(rows, stride_t, BLOCK_D)


@triton.jit
def load_tile(pointers, rows, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile with zeros where it overhangs."""
    mask = rows[:, None] < limit
    if BLOCK_D != D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(pointers, tile, rows, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = rows[:, None] < limit
    if BLOCK_D != D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def visible(q_pos, k_pos, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """May the query at key position q_pos see the key at k_pos? Operands broadcast."""
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
    """Does every query at q_first..q_last see every key at k_first..k_last?"""
    seen = k_last < k_len
    if CAUSAL:
        seen = seen & (k_last <= q_first)
    if WINDOW > 0:
        seen = seen & (k_first > q_last - WINDOW)
        if not CAUSAL:
            seen = seen & (k_last < q_first + WINDOW)
    return seen


@triton.jit
def key_run(first, last, k_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Keys seen by any query at positions first..last: (begin, end), begin a multiple of BLOCK."""
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
    """Query rows that see any of the keys first..last: (begin, end), begin a multiple of BLOCK."""
    begin = 0
    end = q_len
    if CAUSAL:
        begin = tl.maximum(first - shift, 0)
    if WINDOW > 0:
        end = tl.minimum(end, last - shift + WINDOW)
        if not CAUSAL:
            begin = tl.maximum(first - shift - WINDOW + 1, 0)
    begin = tl.multiple_of(begin - begin % BLOCK, BLOCK)
    return begin, end


@triton.jit
def first_peak(sinks, heads, ROWS: tl.constexpr):
    """Maximum (ROWS) of an online softmax before its first key: none, or each row's sink, whose weight is 1 then."""
    if sinks is None:
        peak = tl.full([ROWS], float("-inf"), tl.float32)
    else:
        peak = tl.zeros([ROWS], tl.float32) + tl.load(sinks + heads).to(tl.float32) * LOG2E
    return peak


@triton.jit
def capped(scores, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(SCALE * scores / SOFTCAP), by one exponential that cannot overflow into a NaN; no cap is 0."""
    if SOFTCAP > 0:
        grown = tl.exp2(scores * (2.0 * SCALE / SOFTCAP * LOG2E))
        scores = SOFTCAP - 2.0 * SOFTCAP / (1.0 + grown)
    return scores


@triton.jit
def through_cap(ds, scores, SOFTCAP: tl.constexpr):
    """The gradient of capped scores, carried back through the cap."""
    if SOFTCAP > 0:
        ds = ds * (1.0 - scores * scores * (1.0 / SOFTCAP / SOFTCAP))
    return ds
