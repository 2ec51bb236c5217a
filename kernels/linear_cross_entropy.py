"""The output layer and its loss in one op, without ever holding all logits.

At 8192 tokens and 128K classes the logits alone are 2 GB in bfloat16, their gradient as much again. But each row
needs its logits only for a moment: so walk over the rows in chunks, and for each chunk multiply, take the loss, turn
the logits into their gradient in place, and multiply back at once into d hidden and d weight. A mean or a sum hands
every row the same upstream gradient, a scalar, so both gradients can be finished during the forward and scaled when
the backward asks: three matrix products in all, as many as with full logits. Only `reduction="none"` has to form each
chunk's logits again.

N rows, C channels, V classes, S rows of a slab.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cross_entropy import check_reduction, cross_entropy, reduce
from .lang import wide
from .op import Case, Op


class Options(NamedTuple):
    """What a loss depends on besides its tensors."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    reduction: str


def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`cross_entropy` of the logits hidden (…, C) · weightᵀ (V, C) against `targets` (…), with its options."""
    logits = F.linear(hidden, weight)
    return cross_entropy.reference(logits, targets, ignore_index, label_smoothing, z_loss, softcap, reduction)


def _linear_cross_entropy_eager(
    hidden, weight, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"
):
    check_reduction(reduction)
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    flat = hidden.reshape(-1, hidden.shape[-1])
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    out = _Chunked.apply(flat, weight, targets.reshape(-1), options, wants_grad)
    return out.view(targets.shape) if reduction == "none" else out


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, targets_N, options, wants_grad):
        ctx.options = options
        if not wants_grad or options.reduction == "none":
            ctx.save_for_backward(hidden_NC, weight_VC, targets_N)
            losses_N, _, _ = _walk(hidden_NC, weight_VC, targets_N, options, None)
            return reduce(losses_N, targets_N != options.ignore_index, options.reduction)
        counted = targets_N != options.ignore_index
        share = 1 / counted.sum().clamp(min=1) if options.reduction == "mean" else torch.ones((), device=counted.device)
        scale_N = share.to(wide(hidden_NC)).expand(len(targets_N))
        losses_N, *grads = _walk(hidden_NC, weight_VC, targets_N, options, scale_N, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        return reduce(losses_N, counted, options.reduction)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.options.reduction == "none":
            _, *grads = _walk(*ctx.saved_tensors, ctx.options, grad, *ctx.needs_input_grad[:2])
            return *grads, None, None, None
        return *(g if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None


def _walk(hidden_NC, weight_VC, targets_N, options, scale_N, want_hidden=False, want_weight=False):
    """Losses of all rows and, given each row's upstream gradient, the gradients of hidden and weight."""
    N, V = len(hidden_NC), len(weight_VC)
    losses_N = hidden_NC.new_empty(N, dtype=wide(hidden_NC))
    d_hidden_NC = torch.empty_like(hidden_NC) if want_hidden else None
    d_weight_VC = torch.zeros_like(weight_VC, dtype=wide(weight_VC)) if want_weight else None
    for start in range(0, N, rows_per_slab(V)):
        rows = slice(start, start + rows_per_slab(V))
        logits_SV = hidden_NC[rows] @ weight_VC.T
        scale_S = None if scale_N is None else scale_N[rows]
        losses_N[rows], d_logits_SV = _slab(logits_SV, targets_N[rows], options, scale_S)
        if want_hidden:
            torch.mm(d_logits_SV, weight_VC, out=d_hidden_NC[rows])
        if want_weight:
            d_weight_VC += d_logits_SV.T @ hidden_NC[rows]
    return losses_N, d_hidden_NC, None if d_weight_VC is None else d_weight_VC.to(weight_VC.dtype)


def rows_per_slab(V: int) -> int:
    """About four million logits at a time: they stay in a CPU's cache between the product and the gradient."""
    return max(64, (1 << 22) // V)


def _slab(logits_SV, targets_S, options, scale_S):
    """Losses of a slab and, given each row's upstream gradient, the gradient of its logits."""
    ignore_index, smoothing, z_loss, softcap, _ = options
    x = logits_SV.to(wide(logits_SV))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    counted_S = targets_S != ignore_index
    target_S1 = targets_S.where(counted_S, 0).unsqueeze(-1)
    lse_S = torch.logsumexp(x, -1)
    losses_S = lse_S - (1 - smoothing) * x.gather(-1, target_S1).squeeze(-1) + z_loss * lse_S.square()
    if smoothing:
        losses_S -= smoothing * x.mean(-1)
    losses_S = losses_S.where(counted_S, 0.0)
    if scale_S is None:
        return losses_S, None
    scale_S1 = scale_S.to(x.dtype).where(counted_S, 0.0).unsqueeze(-1)
    slope = None if softcap is None else 1 - (x / softcap).square()
    grad = x.sub_(lse_S.unsqueeze(-1)).exp_()
    grad *= scale_S1 * (1 + 2 * z_loss * lse_S.unsqueeze(-1))
    if smoothing:
        grad -= scale_S1 * (smoothing / x.shape[-1])
    grad.scatter_add_(-1, target_S1, -scale_S1 * (1 - smoothing))
    if slope is not None:
        grad *= slope
    return losses_S, grad.to(logits_SV.dtype)


def _batch(m, N, C, V, scale=1.0):
    targets = m.integers(0, V, N)
    if m.device.type != "meta":
        targets[N // 2] = -100
    return m.normal(N, C, scale=scale), m.normal(V, C, scale=C**-0.5), targets


def _cost(hidden, weight, *_, **__):
    return 2 * hidden.numel() * weight.shape[0]


linear_cross_entropy = Op(
    name="linear_cross_entropy",
    reference=_linear_cross_entropy,
    eager=_linear_cross_entropy_eager,
    autocast=True,
    cases=[
        Case("tail", lambda m: _batch(m, 7, 24, 100)),
        Case("every option", lambda m: _batch(m, 6, 16, 50), {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}),
        Case("a loss a row", lambda m: _batch(m, 6, 16, 50), {"reduction": "none"}),
        Case("sum", lambda m: _batch(m, 6, 16, 50), {"reduction": "sum"}),
        Case("peaked", lambda m: _batch(m, 6, 16, 40, 20.0)),
        Case("expanded gradient", lambda m: _batch(m, 6, 16, 50), {"reduction": "none"}, expanded=True),
        Case("8192x4096x128256", lambda m: _batch(m, 8192, 4096, 128256), bench=True),
    ],
    traffic=lambda hidden, weight, *_, **__: (hidden.nbytes + weight.nbytes, 2 * (hidden.nbytes + weight.nbytes)),
    flops=lambda *args, **__: (_cost(*args), 2 * _cost(*args)),
)
