"""Top-k expert routing with a counting sort: each assignment's expert and its place in the grouped order.

The grouped product wants the assignments (token, choice) of each expert side by side. Sorting them would do; counting
is enough. Every block of tokens counts its assignments to each expert while it routes; one program turns the counts
into the place where each block's assignments begin, by prefix sums over experts and blocks; and a second pass over the
same blocks puts each assignment at its block's beginning plus its rank within the block. No atomics, so the order is
always the same, and no length ever travels to the host.

The same passes sum what the balance losses need.

T tokens, E experts, K = top_k choices, A = T · K assignments.
"""

from ..core.lang import tl, triton


@triton.jit
def _scores(logits, inside, SOFTMAX: tl.constexpr):
    """Scores of all experts, the probabilities for the balance loss, and each row's logsumexp."""
    peak = tl.max(logits, 1)
    exps = tl.where(inside, tl.exp(logits - peak[:, None]), 0.0)
    total = tl.sum(exps, 1)
    lse = peak + tl.log(total)
    softmax = exps / total[:, None]
    if SOFTMAX:
        return softmax, softmax, lse
    scores = tl.where(inside, tl.sigmoid(logits), 0.0)
    return scores, scores / tl.sum(scores, 1)[:, None], lse


@triton.jit(do_not_specialize=["T"])
def moe_route_kernel(
    logits, weights, experts, counts, probabilities, squares,
    T, E, stride_t, stride_e,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Route ROWS tokens: choose top-k, compute weights, count assignments."""
    block = tl.program_id(0).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    real = row < T
    inside = real[:, None] & (expert[None, :] < E)
    at = row[:, None] * stride_t + expert[None, :].to(tl.int64) * stride_e
    values = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    values = tl.where(real[:, None], values, tl.where(expert[None, :] < E, 0.0, float("-inf")))
    scores, shares, lse = _scores(values, (expert < E)[None, :] & (row >= 0)[:, None], SOFTMAX)

    choice = tl.arange(0, BLOCK_K)[None, :]
    picks = tl.zeros([ROWS, BLOCK_K], tl.float32)
    indices = tl.zeros([ROWS, BLOCK_K], tl.int32)
    count = tl.zeros([BLOCK_E], tl.int32)
    left = values
    for k in tl.static_range(TOP_K):
        best = tl.max(left, 1)
        index = tl.min(tl.where(left == best[:, None], expert[None, :], E - 1), 1)
        here = expert[None, :] == index[:, None]
        weight = tl.sum(tl.where(here, scores, 0.0), 1)
        picks = tl.where(choice == k, weight[:, None], picks)
        indices = tl.where(choice == k, index[:, None], indices)
        count += tl.sum((here & real[:, None]).to(tl.int32), 0)
        left = tl.where(here, float("-inf"), left)
    if NORMALIZE:
        picks = picks / tl.sum(picks, 1)[:, None]
    at = row[:, None] * TOP_K + choice
    tl.store(weights + at, picks, mask=real[:, None] & (choice < TOP_K))
    tl.store(experts + at, indices, mask=real[:, None] & (choice < TOP_K))
    tl.store(counts + block * E + expert, count, mask=expert < E)
    tl.store(probabilities + block * E + expert, tl.sum(tl.where(real[:, None], shares, 0.0), 0), mask=expert < E)
    tl.store(squares + block, tl.sum(tl.where(real, lse * lse, 0.0), 0))


@triton.jit(do_not_specialize=["blocks"])
def moe_offsets_kernel(
    counts, probabilities, squares, begins, offsets, totals, balance, z,
    blocks, E, balance_scale, z_scale, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Prefix sums of the counts: offsets of experts and of each block's assignments; one program, in order."""
    expert = tl.arange(0, BLOCK_E)
    own = tl.arange(0, BLOCK_B)
    at = own[:, None].to(tl.int64) * E + expert[None, :]
    total = tl.zeros([BLOCK_E], tl.int32)
    share = tl.zeros([BLOCK_E], tl.float32)
    square = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, blocks, BLOCK_B):
        here = tl.cast(start, tl.int64) * E + at
        mask = (start + own < blocks)[:, None] & (expert < E)[None, :]
        total += tl.sum(tl.load(counts + here, mask=mask, other=0), 0)
        share += tl.sum(tl.load(probabilities + here, mask=mask, other=0.0), 0)
        square += tl.load(squares + start + own, mask=start + own < blocks, other=0.0)
    begin = tl.cumsum(total, 0) - total
    tl.store(offsets + expert, begin, mask=expert < E)
    tl.store(offsets + E, tl.sum(total, 0))
    tl.store(totals + expert, total.to(tl.int64), mask=expert < E)
    tl.store(balance, tl.sum(total.to(tl.float32) * share, 0) * balance_scale)
    tl.store(z, tl.sum(square, 0) * z_scale)
    for start in range(0, blocks, BLOCK_B):
        here = tl.cast(start, tl.int64) * E + at
        mask = (start + own < blocks)[:, None] & (expert < E)[None, :]
        count = tl.load(counts + here, mask=mask, other=0)
        tl.store(begins + here, begin[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        begin += tl.sum(count, 0)


@triton.jit(do_not_specialize=["T"])
def moe_scatter_kernel(
    experts, begins, order,
    T, E, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write each assignment of ROWS tokens to its place in the grouped order."""
    block = tl.program_id(0).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    begin = tl.load(begins + block * E + expert, mask=expert < E, other=0).to(tl.int32)
    for k in tl.static_range(TOP_K):
        index = tl.load(experts + row * TOP_K + k, mask=row < T, other=-1)
        here = index[:, None] == expert[None, :]
        count = here.to(tl.int32)
        place = tl.sum(tl.where(here, begin[None, :] + tl.cumsum(count, 0) - 1, 0), 1)
        begin += tl.sum(count, 0)
        tl.store(order + place.to(tl.int64), (row * TOP_K + k).to(tl.int32), mask=row < T)


@triton.jit(do_not_specialize=["T"])
def moe_route_backward_kernel(
    logits, weights, experts, dweights, counts, dbalance, dz, dlogits,
    T, E, stride_t, stride_e,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the router logits, from those of the weights and of both router losses."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    real = row < T
    inside = (expert < E)[None, :] & (row >= 0)[:, None]
    at = row[:, None] * stride_t + expert[None, :].to(tl.int64) * stride_e
    values = tl.load(logits + at, mask=inside & real[:, None], other=0.0).to(tl.float32)
    values = tl.where(inside, values, float("-inf"))
    scores, shares, lse = _scores(values, inside, SOFTMAX)

    chosen = tl.zeros([ROWS], tl.float32)
    drift = tl.zeros([ROWS], tl.float32)
    for k in tl.static_range(TOP_K):
        index = tl.load(experts + row * TOP_K + k, mask=real, other=0)
        chosen += tl.sum(tl.where(expert[None, :] == index[:, None], scores, 0.0), 1)
        weight = tl.load(weights + row * TOP_K + k, mask=real, other=0.0)
        drift += weight * tl.load(dweights + row * TOP_K + k, mask=real, other=0.0)
    dscores = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for k in tl.static_range(TOP_K):
        index = tl.load(experts + row * TOP_K + k, mask=real, other=0)
        dweight = tl.load(dweights + row * TOP_K + k, mask=real, other=0.0)
        if NORMALIZE:
            dweight = (dweight - drift) / chosen
        dscores += tl.where(expert[None, :] == index[:, None], dweight[:, None], 0.0)

    count = tl.load(counts + expert, mask=expert < E, other=0).to(tl.float32)
    dshares = (tl.load(dbalance) * E / (T * TOP_K) / T) * count
    if SOFTMAX:
        dscores += dshares[None, :]
        dvalues = scores * (dscores - tl.sum(dscores * scores, 1)[:, None])
        softmax = scores
    else:
        mean = tl.sum(dshares[None, :] * shares, 1)
        dscores += (dshares[None, :] - mean[:, None]) / tl.sum(scores, 1)[:, None]
        dvalues = dscores * scores * (1.0 - scores)
        softmax = tl.exp(values - lse[:, None])
    dvalues += softmax * (lse * (2.0 * tl.load(dz) / T))[:, None]
    at = row[:, None] * E + expert[None, :]
    tl.store(dlogits + at, dvalues.to(dlogits.dtype.element_ty), mask=inside & real[:, None])
