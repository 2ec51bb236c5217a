"""Drawing the next token, each row with its own settings and its own generator.

Greedy is temperature 0. Otherwise, logits / temperature become probabilities p; `top_k` keeps the k largest, `top_p`
the smallest set of largest whose share of what top_k left reaches top_p, `min_p` those with p ≥ min_p · max p. Each
is a threshold on p, so all tokens that tie with the last one kept are kept.

The draw is an exponential race: token i finishes at −log(u_i) / p_i, and the first to finish wins with probability
p_i. No sum, no cumulative table, and u_i comes from `philox` at (seed, position, i): same request, same token, in any
batch, on any device.

B rows, V tokens.
"""

import math

import torch

from .op import Case, Op
from .philox import random_bits, uniform


def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """One token (B,) for each row of `logits` (B, V), under that row's settings (all (B,)).

    `temperature` 0 is greedy, `top_k` 0, `top_p` 1 and `min_p` 0 keep everything. A token depends on its own row only.
    """
    x_BV = logits.float()
    greedy_B = x_BV.argmax(-1)
    x_BV = x_BV / temperature.float().where(temperature > 0, 1.0)[:, None]
    kept_BV = _kept(x_BV, top_k, top_p.float(), min_p.float())
    race_BV = x_BV - torch.log(-torch.log(uniform(random_bits(seeds, positions, x_BV.shape[1]))))
    drawn_B = race_BV.masked_fill(~kept_BV, -math.inf).argmax(-1)
    return drawn_B.where(temperature > 0, greedy_B)


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
    cases=[
        Case("greedy", lambda m: _rows(m, 100, [0.0] * 3, [0] * 3, [1.0] * 3, [0.0] * 3)),
        Case("plain", lambda m: _rows(m, 1500, [1.0, 0.7, 2.0], [0] * 3, [1.0] * 3, [0.0] * 3)),
        Case("top k", lambda m: _rows(m, 300, [1.0] * 4, [1, 5, 50, 400], [1.0] * 4, [0.0] * 4)),
        Case("top p", lambda m: _rows(m, 300, [1.0, 0.5, 1.5, 1.0], [0] * 4, [0.1, 0.5, 0.9, 1.0], [0.0] * 4)),
        Case("top k and top p", lambda m: _rows(m, 300, [1.0, 0.8, 1.5], [3, 20, 100], [0.5, 0.9, 0.95], [0.0] * 3)),
        Case("min p", lambda m: _rows(m, 300, [1.0, 2.0], [0] * 2, [1.0] * 2, [0.1, 0.01])),
        Case("all at once", lambda m: _rows(m, 1100, [1.2, 0.0, 0.9], [40, 7, 0], [0.9, 0.5, 0.8], [0.02, 0.1, 0.05])),
        Case(
            "far",
            lambda m: _rows(m, 64, [1.0] * 2, [0] * 2, [1.0] * 2, [0.0] * 2, positions=[2**40, 2**33 + 5]),
        ),
        Case("64x128256", lambda m: _rows(m, 128256, [0.8] * 64, [50] * 64, [0.9] * 64, [0.0] * 64), bench=True),
    ],
    traffic=lambda logits, *_: (logits.nbytes, 0),
)
