"""Counter-based random numbers: Philox-4x32-10, a pure function of (seed, position, index).

A counter-based generator scrambles a counter under a key: ten rounds of multiplying, xoring and swapping make 128 bits
that pass every known test. There is no state to advance, so the noise of token 17 of request A does not depend on the
rest of the batch, and any device computes the same bits. Salmon et al., SC 2011.

The key is the 64-bit seed, the counter is (index / 4, position low, position high, 0), and index i takes output word
i mod 4: four neighbors share a scramble.
"""

import torch

from .lang import tl, triton

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, n: int) -> torch.Tensor:
    """32 random bits, as int64, for every row's (seed, position) and every index below n: (rows, n)."""
    counter = torch.arange(-(-n // 4), device=seeds.device)
    seeds, positions = seeds.long().unsqueeze(-1), positions.long().unsqueeze(-1)
    words = _scramble(counter, positions & LOW, (positions >> 32) & LOW, seeds & LOW, (seeds >> 32) & LOW)
    return torch.stack(words, -1).flatten(-2)[:, :n]


def _scramble(c0, c1, c2, k0, k1):
    c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wraps past 2⁶³: the bits are still those of the product
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + INCREMENTS[0]) & LOW, (k1 + INCREMENTS[1]) & LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)


def exponential(bits: torch.Tensor) -> torch.Tensor:
    """Exponentially distributed float32 noise: −log(1 − v) of a uniform v.

    Of many such numbers the smallest counts, so v keeps all 32 bits near zero, and there a series replaces the
    logarithm of 1 − v, which would round them away.
    """
    v = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return torch.where(v < 1 / 64, v * (1 + v * (0.5 + v * (1 / 3 + v * 0.25))), -torch.log(1 - v))


# ---- fused ----


@triton.jit
def philox_bits(seed, position, first, COUNT: tl.constexpr):
    """Triton version of `random_bits` for indices first … first + COUNT − 1; both must be multiples of four."""
    c0 = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = c0 ^ c0
    c1 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    m0 = tl.full([1], 0xD2511F53, tl.uint32)
    m1 = tl.full([1], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape([COUNT])


@triton.jit
def philox_exponential(seed, position, first, COUNT: tl.constexpr):
    """Triton version of `exponential`."""
    bits = philox_bits(seed, position, first, COUNT)
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    return tl.where(v < 0.015625, v * (1 + v * (0.5 + v * (0.3333333333333333 + v * 0.25))), -tl.log(1 - v))
