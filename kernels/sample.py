"""Token sampling by temperature, top-k, top-p and min-p, each row with its own settings and random state.

Greedy is a temperature below 1e-4, whose reciprocal might not be a number. Otherwise, logits / temperature become
probabilities p; `top_k` keeps the k largest, `top_p` the smallest set of largest whose share of what top_k left
reaches top_p, `min_p` those with p ≥ min_p · max p. Each is a threshold on p, so all tokens that tie with the last one
kept are kept.

Logits need not be numbers: a NaN counts as −inf, and a row whose largest logit over the temperature is not finite is
greedy. Greedy takes the first of the largest, and token 0 where no logit is above −inf.

The draw is an exponential race: token i finishes at e_i / p_i, with e_i exponentially distributed, and the first to
finish wins with probability p_i. No sum, no cumulative table, and e_i comes from `philox` at (seed, position, i):
same request, same token, in any batch, on any device.

The fused twin never sorts. It draws a winner among all tokens, then asks whether that winner is kept: how many
tokens, and how much of the probability, lie above it? If it is not kept, nothing as small as it is kept either, so
the race is run again among the tokens above it. That ends after a few rounds with exactly the token that a race among
the kept ones would have given. (Only `top_k` with `top_p` needs the k-th largest value itself, for the share that is
left. The k-th largest of the maxima of some thousand groups of tokens is at most a few steps below it.)

B rows, V tokens.
"""

import math

import torch

from .core.lang import next_power_of_2, tl, triton
from .core.launch import launch, launcher
from .core.op import Budget, Case, Op
from .core.philox import exponential, philox_exponential, random_bits
from .core.tuned import tuned

GREEDY_BELOW = 1e-4
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)


def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample one token (B,) for each row of `logits` (B, V), under that row's settings (all (B,)).

    `temperature` 0 is greedy, `top_k` 0, `top_p` 1 and `min_p` 0 keep everything. A token depends on its own row only.
    With an `index` (B,), settings and seeds are those of a larger batch, and row b's are at `index[b]`.
    """
    if index is not None:
        temperature, top_k, top_p, min_p, seeds = (x[index] for x in (temperature, top_k, top_p, min_p, seeds))
    warm_B = temperature >= GREEDY_BELOW
    x_BV = logits.float() * (1 / temperature.float().where(warm_B, 1.0))[:, None]
    x_BV = x_BV.where(x_BV == x_BV, -math.inf)
    greedy_B = x_BV.argmax(-1)
    kept_BV = _kept(x_BV, top_k, top_p.float(), min_p.float())
    race_BV = x_BV - torch.log(exponential(random_bits(seeds, positions, x_BV.shape[1])))
    drawn_B = race_BV.masked_fill(~kept_BV, -math.inf).argmax(-1)
    return drawn_B.where(warm_B & x_BV.amax(-1).isfinite(), greedy_B)


def _kept(x_BV, top_k, top_p, min_p):
    V = x_BV.shape[1]
    weights_BV = torch.exp(x_BV - x_BV.amax(-1, keepdim=True)).double()
    sorted_BV = weights_BV.sort(-1, descending=True).values
    k_B = top_k.long().where((top_k > 0) & (top_k < V), V)
    kth_B1 = sorted_BV.gather(-1, (k_B - 1)[:, None])
    sorted_BV = sorted_BV.where(sorted_BV >= kth_B1, 0.0)
    mass_B = sorted_BV.sum(-1)
    above_BV = sorted_BV.cumsum(-1) - sorted_BV  # mass before each token in sorted order
    inside_BV = (above_BV < (top_p * mass_B)[:, None]) & (sorted_BV > 0)
    last_B1 = inside_BV.sum(-1, keepdim=True).clamp(min=1) - 1
    threshold_B1 = sorted_BV.gather(-1, last_B1).maximum(min_p.double()[:, None])  # the largest weight is 1
    return weights_BV >= threshold_B1.where((top_p < 1)[:, None], kth_B1.maximum(min_p.double()[:, None]))


# ---- fused ----


@triton.jit
def _ordered(x):
    """Map floats to integers that order alike."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float_of(order):
    """Inverse of `_ordered`."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(row_ptr, col, col_stride, V, scale):
    """Logits divided by the temperature; −inf for NaN and past the end."""
    x = tl.load(row_ptr + col.to(tl.int64) * col_stride, mask=col < V, other=-float("inf")).to(tl.float32) * scale
    return tl.where(x == x, x, -float("inf"))


@triton.jit
def _row_maximum(row_ptr, col_stride, V, scale, BLOCK: tl.constexpr):
    """Largest scaled logit, its first token, and the maxima of BLOCK interleaved groups of tokens."""
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = _scaled(row_ptr, col, col_stride, V, scale)
        where = tl.where(x > best, col, where)
        best = tl.maximum(best, x)
    highest = tl.max(best, 0)
    return highest, tl.min(tl.where(best == highest, where, 2147483647), 0), best


@triton.jit
def _stats_above(row_ptr, col_stride, V, scale, highest, floor, BLOCK: tl.constexpr):
    """Count, minimum and total weight of the scaled logits above `floor`, and the weight of those at or above it."""
    more = tl.zeros([BLOCK], tl.int32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    weight_more = tl.zeros([BLOCK], tl.float32)
    weight_reach = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = _scaled(row_ptr, col, col_stride, V, scale)
        weight = tl.exp(x - highest)
        more += tl.where(x > floor, 1, 0)
        least = tl.minimum(least, tl.where(x > floor, x, float("inf")))
        weight_more += tl.where(x > floor, weight, 0.0)
        weight_reach += tl.where(x >= floor, weight, 0.0)
    return tl.sum(more, 0), tl.min(least, 0), tl.sum(weight_more, 0), tl.sum(weight_reach, 0)


@triton.jit
def _kth_group(best, k):
    """k-th largest of the groups' maxima, by bisection over ordered floats.

    It is no larger than that of all tokens, and as the k largest tokens rarely share a group, nearly always equal.
    """
    order = _ordered(best).to(tl.int64)
    low, high = tl.min(order, 0), tl.max(order, 0)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum(tl.where(order >= middle, 1, 0), 0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return _float_of(low.to(tl.int32))


@triton.jit
def _kth_token(row_ptr, col_stride, V, scale, highest, k, BLOCK: tl.constexpr):
    """k-th largest scaled logit, by bisection over the whole row; for k too large for the groups."""
    low = tl.full([], -2139095041, tl.int64)  # the place of −inf
    high = _ordered(highest).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = _scaled(row_ptr, col, col_stride, V, scale)
            count += tl.where((_ordered(x) >= middle) & (col < V), 1, 0)
        enough = tl.sum(count, 0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return _float_of(low.to(tl.int32))


@triton.jit
def _gumbel_argmax(row_ptr, col_stride, V, scale, seed, position, floor, BLOCK: tl.constexpr):
    """Gumbel-max sample among tokens above `floor`: its index and scaled logit."""
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = _scaled(row_ptr, col, col_stride, V, scale)
        finish = x - tl.log(philox_exponential(seed, position, start, BLOCK))
        finish = tl.where(x > floor, finish, -float("inf"))
        where = tl.where(finish > best, col, where)
        best = tl.maximum(best, finish)
    first = tl.max(best, 0)
    token = tl.min(tl.where(best == first, where, 2147483647), 0)
    return token, tl.load(row_ptr + token.to(tl.int64) * col_stride).to(tl.float32) * scale


@triton.jit
def sample_kernel(
    x_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, index_ptr, token_ptr,
    V, x_row, x_col, INDEXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * x_row
    own = tl.load(index_ptr + row).to(tl.int64) if INDEXED else row
    temperature = tl.load(temperature_ptr + own).to(tl.float32)
    warm = temperature >= _GREEDY_BELOW
    scale = tl.div_rn(tl.full([], 1.0, tl.float32), tl.where(warm, temperature, 1.0))
    highest, token, best = _row_maximum(row_ptr, x_col, V, scale, BLOCK)
    if warm & (tl.abs(highest) < float("inf")):
        top_k = tl.load(top_k_ptr + own).to(tl.int32)
        top_p = tl.load(top_p_ptr + own).to(tl.float32)
        min_p = tl.load(min_p_ptr + own).to(tl.float32)
        seed, position = tl.load(seed_ptr + own).to(tl.int64), tl.load(position_ptr + row).to(tl.int64)
        limit = tl.where((top_k > 0) & (top_k < V), top_k, V)
        least = highest + tl.log(min_p)  # min_p · max p, as a logit; −inf when min_p is 0
        mass = tl.full([], float("inf"), tl.float32)
        if top_p < 1:
            kth = tl.full([], -float("inf"), tl.float32)
            if limit < V:
                if (limit.to(tl.int64) * limit <= 32 * BLOCK) | (V <= BLOCK):
                    kth = _kth_group(best, limit)
                else:
                    kth = _kth_token(row_ptr, x_col, V, scale, highest, limit, BLOCK)
            more, above, _, left = _stats_above(row_ptr, x_col, V, scale, highest, kth, BLOCK)
            while (limit < V) & (more >= limit):
                kth = above
                more, above, _, left = _stats_above(row_ptr, x_col, V, scale, highest, kth, BLOCK)
            mass = top_p * left
        floor = tl.full([], -float("inf"), tl.float32)
        searching = True
        while searching:
            token, x = _gumbel_argmax(row_ptr, x_col, V, scale, seed, position, floor, BLOCK)
            searching = x < least
            if (limit < V) | (top_p < 1):
                more, _, weight, _ = _stats_above(row_ptr, x_col, V, scale, highest, x, BLOCK)
                searching = searching | (more >= limit) | (weight >= mass)
            searching = searching & (x < highest)
            floor = x
    tl.store(token_ptr + row, token.to(tl.int64))


@launcher
def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor | None,
) -> torch.Tensor:
    B, V = logits.shape
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    width = next_power_of_2(V)
    block = min(8192, max(width, 128))
    tile = tuned("sample", logits.device, width, {"BLOCK": block, "num_warps": max(4, block // 512)})
    launch(
        sample_kernel, (B,),
        logits, temperature, top_k, top_p, min_p, seeds, positions, positions if index is None else index, tokens,
        V, *logits.stride(), INDEXED=index is not None, **tile,
    )  # fmt: skip
    return tokens


def _sample_fused(logits, temperature, top_k, top_p, min_p, seeds, positions, index=None):
    if index is None and len(temperature) != len(logits):
        raise ValueError(
            f"sample: {len(logits)} rows and {len(temperature)} settings; without an index they are as many"
        )
    return sample_tokens(logits, temperature, top_k, top_p, min_p, seeds, positions, index)


def _chosen(m, V, index):
    """Test case: rows with the settings of a larger batch."""
    _, *settings, _ = _rows(m, 4, [1.0, 0.0, 0.7, 1.5], [0, 3, 9, 40], [0.9, 0.8, 1.0, 0.5], [0.0, 0.1, 0.05, 0.0])
    positions = m.tensor(list(range(7, 7 + len(index))))
    return m.normal(len(index), V, scale=2.0, grad=False), *settings, positions, {"index": m.tensor(index)}


def _rows(m, V, temperature, top_k, top_p, min_p, scale=2.0, positions=None):
    B = len(temperature)
    fills = (m.tensor(x, dtype=torch.float32) for x in (temperature, top_p, min_p))
    temperature, top_p, min_p = fills
    seeds = m.tensor([1234567890123 + 17 * b for b in range(B)])
    positions = m.tensor(positions or list(range(B)))
    top_k = m.tensor(top_k, dtype=torch.int32)
    return m.normal(B, V, scale=scale, grad=False), temperature, top_k, top_p, min_p, seeds, positions


sample = Op(
    name="sample",
    reference=_sample,
    fused=_sample_fused,
    shapes="logits B V, temperature N, top_k N, top_p N, min_p N, seeds N, positions B, index B",
    rows=("logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions"),
    cases=[
        Case("greedy", lambda m: _rows(m, 100, [0.0] * 3, [0] * 3, [1.0] * 3, [0.0] * 3)),
        Case("plain", lambda m: _rows(m, 1500, [1.0, 0.7, 2.0], [0] * 3, [1.0] * 3, [0.0] * 3)),
        Case("top k", lambda m: _rows(m, 300, [1.0] * 4, [1, 5, 50, 400], [1.0] * 4, [0.0] * 4)),
        Case("top p", lambda m: _rows(m, 300, [1.0, 0.5, 1.5, 1.0], [0] * 4, [0.1, 0.5, 0.9, 1.0], [0.0] * 4)),
        Case("top k and top p", lambda m: _rows(m, 300, [1.0, 0.8, 1.5], [3, 20, 100], [0.5, 0.9, 0.95], [0.0] * 3)),
        Case("large k", lambda m: _rows(m, 9000, [1.0, 1.3], [600, 40], [0.99, 0.9], [0.0] * 2)),
        Case("min p", lambda m: _rows(m, 300, [1.0, 2.0], [0] * 2, [1.0] * 2, [0.1, 0.01])),
        Case("all at once", lambda m: _rows(m, 1100, [1.2, 0.0, 0.9], [40, 7, 0], [0.9, 0.5, 0.8], [0.02, 0.1, 0.05])),
        Case("settings of a larger batch", lambda m: _chosen(m, 300, [3, 0, 2])),
        Case(
            "far",
            lambda m: _rows(m, 64, [1.0] * 2, [0] * 2, [1.0] * 2, [0.0] * 2, positions=[2**40, 2**33 + 5]),
        ),
        Case("64x128256", lambda m: _rows(m, 128256, [0.8] * 64, [50] * 64, [0.9] * 64, [0.0] * 64), bench=True),
    ],
    budget=Budget(registers=128, vector=True),
    traffic=lambda logits, *_, **__: (logits.nbytes, 0),
)
