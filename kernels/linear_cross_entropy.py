"""Fused linear cross-entropy: LM head and loss in chunks, without materializing all logits.

At 8192 tokens and 128K classes the logits alone are 2 GB in bfloat16, their gradient as much again. But each row
needs its logits only for a moment: so walk over the rows in chunks, and for each chunk multiply, take the loss, turn
the logits into their gradient in place, and multiply back at once into d hidden and d weight. A mean or a sum hands
every row the same upstream gradient, a scalar, so both gradients can be finished during the forward and scaled when
the backward asks: three matrix products in all, as many as with full logits. Only `reduction="none"` has to form each
chunk's logits again.

`weights` multiply the losses of targets before they are reduced, and get no gradient. One op is then the loss of many
kinds of training: weights of 0 and 1 choose what is learned, advantages make it a policy gradient, β σ(−margin) the
gradient of DPO. Minus the losses of `reduction="none"` are the log-probabilities of the targets.

N rows, C channels, V classes, S rows of a slab.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .core.lang import tl, triton, wide
from .core.launch import AutogradOp, is_real, launch, launcher
from .core.op import Budget, Case, Op
from .cpu import gemm, head_loss, pointwise
from .cross_entropy import (
    check_reduction,
    cross_entropy,
    load_target,
    reduce,
    row_gradient,
    row_loss,
    row_statistics,
    tile_of,
)


class Options(NamedTuple):
    """Options of the loss (all but its tensors)."""

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
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`cross_entropy` of the logits hidden (…, C) · weightᵀ (V, C) against `targets` (…).

    `weights` (…) are factors on the losses of targets. A mean divides by the number of targets that count all the same.
    """
    check_reduction(reduction)
    logits = F.linear(hidden, weight)
    losses = cross_entropy.reference(logits, targets, ignore_index, label_smoothing, z_loss, softcap, "none")
    return reduce(weighted(losses, weights), targets != ignore_index, reduction)


def weighted(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return losses if weights is None else losses * weights.detach().to(losses.dtype)


def _linear_cross_entropy_eager(
    hidden,
    weight,
    targets,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
    weights=None,
):
    check_reduction(reduction)
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    flat = hidden.reshape(-1, hidden.shape[-1])
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    weights_N = None if weights is None else weights.detach().reshape(-1).to(wide(hidden))
    out = _Chunked.apply(flat, weight, targets.reshape(-1), weights_N, options, wants_grad)
    return out.view(targets.shape) if reduction == "none" else out


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, targets_N, weights_N, options, wants_grad):
        ctx.options = options
        if not wants_grad or options.reduction == "none":
            ctx.save_for_backward(hidden_NC, weight_VC, targets_N, weights_N)
            losses_N, _, _ = _walk(hidden_NC, weight_VC, targets_N, options, None)
            return reduce(weighted(losses_N, weights_N), targets_N != options.ignore_index, options.reduction)
        counted = targets_N != options.ignore_index
        share = 1 / counted.sum().clamp(min=1) if options.reduction == "mean" else torch.ones((), device=counted.device)
        scale_N = weighted(share.to(wide(hidden_NC)).expand(len(targets_N)), weights_N)
        losses_N, *grads = _walk(hidden_NC, weight_VC, targets_N, options, scale_N, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        return reduce(weighted(losses_N, weights_N), counted, options.reduction)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.options.reduction == "none":
            *inputs, weights_N = ctx.saved_tensors
            _, *grads = _walk(*inputs, ctx.options, weighted(grad, weights_N), *ctx.needs_input_grad[:2])
            return *grads, None, None, None, None
        return *(g if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None, None, None, None


class _Products(NamedTuple):
    """PyTorch products of a slab of rows, with the interface of `gemm.Packed`."""

    weight_VC: torch.Tensor

    def multiply(self, hidden_SC):
        return hidden_SC @ self.weight_VC.T

    def multiply_back(self, d_logits_SV, d_hidden_SC):
        torch.mm(d_logits_SV, self.weight_VC, out=d_hidden_SC)

    def add_gradient(self, sum_VC, d_logits_SV, hidden_SC):
        _add_gradient(sum_VC, d_logits_SV, hidden_SC)


def _walk(hidden_NC, weight_VC, targets_N, options, scale_N, want_hidden=False, want_weight=False):
    """Losses of all rows; given their upstream gradients, also the gradients of hidden and weight."""
    N, V = len(hidden_NC), len(weight_VC)
    if options.softcap is None and head_loss.fits(hidden_NC, weight_VC):
        return head_loss.walk(hidden_NC, weight_VC, targets_N, options, scale_N, want_hidden, want_weight)
    losses_N = hidden_NC.new_empty(N, dtype=wide(hidden_NC))
    d_hidden_NC = torch.empty_like(hidden_NC) if want_hidden else None
    d_weight_VC = torch.zeros_like(weight_VC, dtype=wide(weight_VC)) if want_weight else None
    products = gemm.Packed(weight_VC, want_hidden) if gemm.fits(hidden_NC, weight_VC) else _Products(weight_VC)
    for start in range(0, N, rows_per_slab(V)):
        rows = slice(start, start + rows_per_slab(V))
        logits_SV = products.multiply(hidden_NC[rows])
        scale_S = None if scale_N is None else scale_N[rows]
        losses_N[rows], d_logits_SV = _slab(logits_SV, targets_N[rows], options, scale_S)
        if d_logits_SV is None:
            continue
        if d_hidden_NC is not None:
            products.multiply_back(d_logits_SV, d_hidden_NC[rows])
        if d_weight_VC is not None:
            products.add_gradient(d_weight_VC, d_logits_SV, hidden_NC[rows])
    return losses_N, d_hidden_NC, None if d_weight_VC is None else d_weight_VC.to(weight_VC.dtype)


def rows_per_slab(V: int) -> int:
    """Rows of a slab on a CPU: about a million logits fit the cache; fewer rows would rewrite d weight too often."""
    return max(256, (1 << 20) // V)


def _slab(logits_SV, targets_S, options, scale_S):
    """Losses of a slab; given upstream gradients, also the gradient of its logits."""
    ignore_index, smoothing, z_loss, softcap, _ = options
    if softcap is None and pointwise.is_supported(logits_SV):
        losses_S = pointwise.entropy(logits_SV, targets_S, scale_S, ignore_index, smoothing, z_loss)
        return losses_S, logits_SV
    dtype = wide(logits_SV)
    x = logits_SV if softcap is None else softcap * torch.tanh(logits_SV.to(dtype) / softcap)
    counted_S = targets_S != ignore_index
    target_S1 = targets_S.where(counted_S, 0).unsqueeze(-1)
    log_p = torch.log_softmax(x, -1, dtype=dtype)  # one pass of PyTorch's, against five of logsumexp and subtraction
    picked_S = x.gather(-1, target_S1).squeeze(-1).to(dtype)
    lse_S = picked_S - log_p.gather(-1, target_S1).squeeze(-1)
    losses_S = lse_S - (1 - smoothing) * picked_S + z_loss * lse_S.square()
    if smoothing:
        losses_S -= smoothing * x.mean(-1, dtype=dtype)
    losses_S = losses_S.where(counted_S, 0.0)
    if scale_S is None:
        return losses_S, None
    scale_S1 = scale_S.to(dtype).where(counted_S, 0.0).unsqueeze(-1)
    slope = None if softcap is None else 1 - (x / softcap).square()
    grad = log_p.exp_()
    grad *= scale_S1 * (1 + 2 * z_loss * lse_S.unsqueeze(-1))
    if smoothing:
        grad -= scale_S1 * (smoothing / x.shape[-1])
    grad.scatter_add_(-1, target_S1, -scale_S1 * (1 - smoothing))
    if slope is not None:
        grad *= slope
    return losses_S, grad.to(logits_SV.dtype)


# ---- fused ----


@triton.jit
def linear_cross_entropy_kernel(
    x_ptr, target_ptr, loss_ptr, upstream_ptr, V, x_row, upstream_stride, ignore_index,
    SMOOTHING: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row: its loss, then its gradient written over the logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * x_row
    target = tl.load(target_ptr + row).to(tl.int64)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK).to(tl.int64)
                tl.store(row_ptr + cols, tl.zeros([BLOCK], x_ptr.dtype.element_ty), mask=cols < V)
    else:
        picked = load_target(row_ptr, 1, target, V)
        tl.debug_barrier()  # every thread has read the target's logit before any thread overwrites it
        lse, total = row_statistics(row_ptr, 1, V, SMOOTHING, CAP, BLOCK, STAGES)
        tl.store(loss_ptr + row, row_loss(picked, V, lse, total, SMOOTHING, Z, CAP))
        if GRADIENT:
            upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
            row_gradient(row_ptr, row_ptr, 1, 1, V, target, lse, upstream, SMOOTHING, Z, CAP, BLOCK, STAGES)


def gpu_rows_per_slab(V: int) -> int:
    """Rows of a slab on a GPU: half a billion logits (1 GB in bfloat16), enough for products at full speed."""
    return max(128, (1 << 29) // V // 128 * 128)


def _add_gradient(sum_VC, a_SV, b_SC, first=False):
    """sum += aᵀ · b in the wide dtype, inside the product where possible. With `first`, the sum is overwritten instead.

    PyTorch 2.11 cannot trace a product that adds to a wider sum, but one with a wider result."""
    a_VS, beta = a_SV.T, 0 if first else 1
    if a_VS.dtype == sum_VC.dtype:
        sum_VC.addmm_(a_VS, b_SC, beta=beta)
    elif sum_VC.is_cuda and is_real((sum_VC, a_VS, b_SC)):
        torch.addmm(sum_VC, a_VS, b_SC, beta=beta, out_dtype=torch.float32, out=sum_VC)
    else:
        product = a_VS @ b_SC if sum_VC.device.type == "cpu" else torch.mm(a_VS, b_SC, out_dtype=torch.float32)
        sum_VC.copy_(product if first else sum_VC + product)


def _walk_fused(hidden_NC, weight_VC, targets_N, upstream_N, options, want_hidden, want_weight):
    """Triton version of `_walk`, with one slab of memory for all chunks; unwanted gradients are empty."""
    ignore_index, smoothing, z_loss, softcap = options
    (N, C), V = hidden_NC.shape, len(weight_VC)
    device = hidden_NC.device
    losses_N = torch.empty(N, dtype=torch.float32, device=device)
    d_hidden_NC = torch.empty(N if want_hidden else 0, C, dtype=hidden_NC.dtype, device=device)
    make = torch.empty if N else torch.zeros
    d_weight_VC = make(V if want_weight else 0, C, dtype=torch.float32, device=device)
    step = min(gpu_rows_per_slab(V), max(N, 1))
    slab = torch.empty(step, V, dtype=hidden_NC.dtype, device=device)
    upstream_N = losses_N if upstream_N is None else upstream_N
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        logits_SV = torch.mm(hidden_NC[rows], weight_VC.T, out=slab[: rows.stop - start])
        launch(
            linear_cross_entropy_kernel, (rows.stop - start,),
            logits_SV, targets_N[rows], losses_N[rows], upstream_N[rows],
            V, V, upstream_N.stride(0), ignore_index,
            SMOOTHING=smoothing, Z=z_loss, CAP=softcap, GRADIENT=want_hidden or want_weight,
            **tile_of("linear_cross_entropy", logits_SV),
        )  # fmt: skip
        if want_hidden:
            torch.mm(logits_SV, weight_VC, out=d_hidden_NC[rows])
        if want_weight:
            _add_gradient(d_weight_VC, logits_SV, hidden_NC[rows], first=start == 0)
    return losses_N, d_hidden_NC, d_weight_VC.to(weight_VC.dtype)


@launcher
def linear_cross_entropy_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    weights: torch.Tensor | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counted_N = targets != ignore_index
    options = ignore_index, label_smoothing, z_loss, softcap
    if reduction == "none":
        losses_N, no_hidden, no_weight = _walk_fused(hidden, weight, targets, None, options, False, False)
        return weighted(losses_N, weights), no_hidden, no_weight
    share = torch.ones((), device=hidden.device) if reduction == "sum" else 1 / counted_N.sum().clamp(min=1)
    upstream_N = weighted(share.float().expand(len(targets)), weights)
    walked = _walk_fused(hidden, weight, targets, upstream_N, options, want_hidden, want_weight)
    losses_N, d_hidden, d_weight = walked
    return reduce(weighted(losses_N, weights), counted_N, reduction), d_hidden, d_weight


@launcher
def linear_cross_entropy_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    weights: torch.Tensor | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = ignore_index, label_smoothing, z_loss, softcap
    upstream_N = weighted(upstream, weights)
    return _walk_fused(hidden, weight, targets, upstream_N, options, want_hidden, want_weight)[1:]


def _save(ctx, inputs, output):
    hidden, weight, targets, *ctx.options, ctx.reduction, weights, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((hidden, weight, targets, weights) if ctx.reduction == "none" else output[1:]))


def _gradient(ctx, upstream, *_):
    nothing = (None,) * 9
    if upstream is None:
        return None, None, *nothing
    wanted = ctx.needs_input_grad[:2]
    if ctx.reduction == "none":
        *inputs, weights = ctx.saved_tensors
        gradients = linear_cross_entropy_backward(*inputs, upstream, *ctx.options, weights, *wanted)
    else:
        gradients = [g * upstream.to(g.dtype) for g in ctx.saved_tensors]
    return *(g if want else None for g, want in zip(gradients, wanted)), *nothing


_loss = AutogradOp(linear_cross_entropy_forward, _save, _gradient)


def _linear_cross_entropy_fused(
    hidden,
    weight,
    targets,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
    weights=None,
):
    check_reduction(reduction)
    flat_NC, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    wants = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    options = ignore_index, float(label_smoothing), float(z_loss), softcap, reduction
    weights_N = None if weights is None else weights.detach().reshape(-1).float()
    loss = _loss(flat_NC, weight, targets_N, *options, weights_N, *wants)[0]
    return loss.view(targets.shape) if reduction == "none" else loss


def _batch(m, N, C, V, scale=1.0):
    targets = m.integers(0, V, N)
    if m.device.type != "meta":
        targets[N // 2] = -100
    return m.normal(N, C, scale=scale), m.normal(V, C, scale=C**-0.5), targets


def _weighted(m, N, C, V):
    """Test case: advantages of both signs, and an ignored target."""
    weights = m.normal(N, grad=False, dtype=torch.promote_types(m.dtype, torch.float32))
    if m.device.type != "meta":
        weights[1] = 0.0
    return *_batch(m, N, C, V), {"weights": weights}


def _cost(hidden, weight, *_, **__):
    return 2 * hidden.numel() * weight.shape[0]


linear_cross_entropy = Op(
    name="linear_cross_entropy",
    reference=_linear_cross_entropy,
    eager=_linear_cross_entropy_eager,
    native=True,
    fused=_linear_cross_entropy_fused,
    shapes="hidden ... C, weight V C, targets ...",
    autocast=True,
    cases=[
        Case("tail", lambda m: _batch(m, 7, 24, 100)),
        Case("every option", lambda m: _batch(m, 6, 16, 50), {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}),
        Case("a loss a row", lambda m: _batch(m, 6, 16, 50), {"reduction": "none"}),
        Case("sum", lambda m: _batch(m, 6, 16, 50), {"reduction": "sum"}),
        Case("peaked", lambda m: _batch(m, 6, 16, 40, 20.0)),
        Case("expanded gradient", lambda m: _batch(m, 6, 16, 50), {"reduction": "none"}, expanded=True),
        Case("weighted", lambda m: _weighted(m, 7, 24, 100)),
        Case("weighted sum", lambda m: _weighted(m, 6, 16, 50), {"reduction": "sum", "softcap": 3.0}),
        Case("a weighted loss a row", lambda m: _weighted(m, 6, 16, 50), {"reduction": "none"}),
        Case("8192x4096x128256", lambda m: _batch(m, 8192, 4096, 128256), bench=True),
    ],
    traffic=lambda hidden, weight, *_, **__: (hidden.nbytes + weight.nbytes, 2 * (hidden.nbytes + weight.nbytes)),
    budget=Budget(registers=96, vector=True),
    flops=lambda *args, **__: (_cost(*args), 2 * _cost(*args)),
)
