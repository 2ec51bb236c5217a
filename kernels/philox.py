"""Random numbers without state: Philox-4x32-10, a function of (seed, position, index) and nothing else.

A counter-based generator scrambles a counter under a key: ten rounds of multiplying, xoring and swapping make 128
bits that pass every known test. There is no stream to advance, so the number that token 17 of request A sees does not
depend on who else is in the batch, and any device computes the same bits. Salmon et al., SC 2011.

The key is the 64-bit seed. The counter is (block, position low, position high, 0), and each block of 1024 indices
shares 256 counters: index i takes output word (i mod 1024) / 256 of counter 256 · (i / 1024) + i mod 256, so that a
kernel reads four contiguous runs of columns from one scramble.
"""

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, n: int) -> torch.Tensor:
    """32 random bits, as int64, for every row's (seed, position) and every index below n: (rows, n)."""
    index = torch.arange(n, device=seeds.device)
    block = index // 1024 * 256 + index % 256
    seeds, positions = seeds.long().unsqueeze(-1), positions.long().unsqueeze(-1)
    words = _philox(block, positions & LOW, (positions >> 32) & LOW, seeds & LOW, (seeds >> 32) & LOW)
    return torch.stack(words, -1).gather(-1, (index % 1024 // 256).expand(len(seeds), n).unsqueeze(-1)).squeeze(-1)


def _philox(c0, c1, c2, k0, k1):
    c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wraps past 2⁶³: the bits are still those of the product
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + INCREMENTS[0]) & LOW, (k1 + INCREMENTS[1]) & LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Floats strictly inside (0, 1): 23 bits and a half, which float32 holds exactly."""
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
