"""Cross-entropy: minus the log-probability of the right answer.

For logits x and target t the loss is lse(x) − x_t, where lse is the logarithm of the sum of exponentials. Eager
PyTorch writes a table of log-probabilities as large as the logits; one pass with a running maximum and sum needs no
table, and the gradient is simply softmax(x) − onehot(t).

Options, all of which keep that shape. Label smoothing ε asks for (1 − ε) on the target and ε spread evenly. `z_loss`
adds z · lse², which keeps logits from drifting. `softcap` c replaces x by c · tanh(x / c) first. Targets equal to
`ignore_index` cost nothing. A mean over no target at all is 0, so that an empty microbatch leaves a run alive.

N rows, V classes.
"""

import torch

from .lang import wide
from .op import Case, Op

REDUCTIONS = ("mean", "sum", "none")


def _cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The loss of `logits` (…, V) against class numbers `targets` (…), in float32, reduced over targets that count."""
    check_reduction(reduction)
    x = logits.to(wide(logits))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    counted = targets != ignore_index
    lse = torch.logsumexp(x, -1)
    picked = x.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    losses = lse - (1 - label_smoothing) * picked + z_loss * lse.square()
    if label_smoothing:
        losses = losses - label_smoothing * x.mean(-1)
    return reduce(losses.where(counted, 0.0), counted, reduction)


def reduce(losses: torch.Tensor, counted: torch.Tensor, reduction: str) -> torch.Tensor:
    """Losses as they are, their sum, or their mean over the `counted` ones."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp(min=1)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; valid are {', '.join(REDUCTIONS)}")


def _rows(m, N, V, scale=1.0, ignored=True):
    targets = m.integers(0, V, N)
    if ignored and N > 1 and m.device.type != "meta":
        targets[N // 2] = -100
    return m.normal(N, V, scale=scale), targets


def _peaked(m, N, V):
    """Logits so sure of the target that softmax rounds to one: where careless gradients lose all accuracy."""
    targets = m.integers(0, V, N)
    hot = torch.nn.functional.one_hot(targets, V) * 20.0
    logits = m.normal(N, V, grad=False) + hot.to(m.device, m.dtype)
    return logits.detach().requires_grad_(), targets


cross_entropy = Op(
    name="cross_entropy",
    reference=_cross_entropy,
    cases=[
        Case("tail", lambda m: _rows(m, 5, 100)),
        Case("one row", lambda m: _rows(m, 1, 33)),
        Case("no rows", lambda m: _rows(m, 0, 33)),
        Case("every option", lambda m: _rows(m, 4, 70), {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}),
        Case("a loss a row", lambda m: _rows(m, 6, 50), {"reduction": "none"}),
        Case("sum", lambda m: _rows(m, 6, 50), {"reduction": "sum"}),
        Case("peaked", lambda m: _peaked(m, 4, 64)),
        Case("large magnitude", lambda m: _rows(m, 4, 64, scale=100.0)),
        Case("padded rows", lambda m: (m.padded(4, 40), m.integers(0, 40, 4))),
        Case("all ignored", lambda m: (m.normal(2, 16), m.tensor([-100, -100]))),
        Case("expanded gradient", lambda m: _rows(m, 4, 40), {"reduction": "none"}, expanded=True),
        Case("8192x128256", lambda m: _rows(m, 8192, 128256), bench=True),
    ],
    traffic=lambda logits, *_, **__: (logits.nbytes, 2 * logits.nbytes),
    flops=lambda logits, *_, **__: (4 * logits.numel(), 4 * logits.numel()),
)
