"""Cross-entropy of logits and targets, with ignored targets, label smoothing, z-loss and soft cap.

For logits x and target t the loss is lse(x) − x_t, where lse is the logarithm of the sum of exponentials. Eager
PyTorch writes a table of log-probabilities as large as the logits; one pass with a running maximum and sum needs no
table, and the gradient is simply softmax(x) − onehot(t).

Options, all of which keep that shape. Label smoothing ε asks for (1 − ε) on the target and ε spread evenly. `z_loss`
adds z · lse², which keeps logits from drifting. `softcap` c replaces x by c · tanh(x / c) first. Targets equal to
`ignore_index` cost nothing. A mean over no target at all is 0, so that an empty microbatch leaves a run alive.

N rows, V classes.
"""

import torch
import torch.nn.functional as F

from .core.lang import next_power_of_2, tl, triton, wide
from .core.launch import AutogradOp, as_rows, launch, launcher
from .core.op import Budget, Case, Op
from .core.tuned import tuned
from .cpu import pointwise

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
    """Cross-entropy of `logits` (…, V) and class numbers `targets` (…), in float32, reduced over counted targets."""
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
    """Reduce losses: none, sum, or mean over the `counted` ones."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp(min=1)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; valid are {', '.join(REDUCTIONS)}")


def _cross_entropy_eager(
    logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"
):
    """C++ pass where supported; else PyTorch's own on float32 logits where no option asks for more."""
    check_reduction(reduction)
    if softcap is None and logits.shape[-1] and pointwise.is_supported(logits):
        losses = pointwise.cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss)
        return reduce(losses, targets != ignore_index, reduction)
    if z_loss or softcap is not None:
        return _cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss, softcap, reduction)
    rows = logits.to(wide(logits)).reshape(-1, logits.shape[-1])
    losses = F.cross_entropy(rows, targets.reshape(-1), None, None, ignore_index, None, "none", label_smoothing)
    return reduce(losses.view(targets.shape), targets != ignore_index, reduction)


# ---- fused ----


@triton.jit
def capped(x, CAP: tl.constexpr):
    """Soft cap c · tanh(x / c), with tanh as 2 σ(2x) − 1."""
    return CAP * (2 * tl.sigmoid(x * (2 / CAP)) - 1) if CAP is not None else x


@triton.jit
def row_statistics(
    row_ptr, x_col, V, SMOOTHING: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Logsumexp of a row of logits, and their sum if label smoothing needs it.

    Maximum and sum are kept by eight neighbors, which a thread reads at once, and merged once: a maximum of a whole
    piece would make the warps wait for each other at every one. An eighth more exponentials, in base 2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    group = tl.arange(0, BLOCK // 8).to(tl.int64)[:, None] * 8 + tl.arange(0, 8).to(tl.int64)[None, :]
    highest = tl.full([BLOCK // 8], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK // 8], tl.float32)
    totals = tl.zeros([BLOCK // 8], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        cols = start + group
        x = tl.load(row_ptr + cols * x_col, mask=cols < V, other=-float("inf")).to(tl.float32)
        if CAP is not None:
            x = tl.where(cols < V, capped(x, CAP), -float("inf"))
        higher = tl.maximum(highest, tl.max(x, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # a group of nothing but −inf has no scale
        weights = tl.exp2((x - base[:, None]) * LOG2E)
        sums = sums * tl.exp2((highest - base) * LOG2E) + tl.sum(weights, 1)
        highest = higher
        if SMOOTHING > 0:
            totals += tl.sum(tl.where(cols < V, x, 0.0), 1)
    peak = tl.max(highest, 0)
    base = tl.where(peak == -float("inf"), 0.0, peak)
    return peak + tl.log(tl.sum(sums * tl.exp2((highest - base) * LOG2E), 0)), tl.sum(totals, 0)


@triton.jit
def load_target(row_ptr, x_col, target, V):
    """Logit of the target; NaN for an invalid class, which the host cannot refuse without synchronizing."""
    return tl.load(row_ptr + target * x_col, mask=(target >= 0) & (target < V), other=float("nan"))


@triton.jit
def row_loss(picked, V, lse, total, SMOOTHING: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr):
    """Loss of a row, from the target's logit and the row's statistics."""
    picked = capped(picked.to(tl.float32), CAP)
    loss = lse - (1 - SMOOTHING) * picked + Z * lse * lse
    return loss - SMOOTHING * (total / V) if SMOOTHING > 0 else loss


@triton.jit
def row_gradient(
    row_ptr, out_ptr, x_col, out_col, V, target, lse, upstream,
    SMOOTHING: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write upstream · d loss / d logits, formed in float32 and rounded once; in place allowed."""
    LOG2E: tl.constexpr = 1.4426950408889634
    slope = upstream * (1 + 2 * Z * lse)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        x = capped(tl.load(row_ptr + cols * x_col, mask=cols < V, other=0.0).to(tl.float32), CAP)
        grad = slope * tl.exp2((x - lse) * LOG2E)
        if SMOOTHING > 0:
            grad -= upstream * (SMOOTHING / V)
        grad = tl.where(cols == target, grad - upstream * (1 - SMOOTHING), grad)
        if CAP is not None:
            grad *= 1 - (x / CAP) * (x / CAP)
        tl.store(out_ptr + cols * out_col, grad.to(out_ptr.dtype.element_ty), mask=cols < V)


@triton.jit
def cross_entropy_fwd_kernel(
    x_ptr, target_ptr, loss_ptr, lse_ptr, V, x_row, x_col, ignore_index,
    SMOOTHING: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
    else:
        lse, total = row_statistics(x_ptr + row * x_row, x_col, V, SMOOTHING, CAP, BLOCK, STAGES)
        tl.store(lse_ptr + row, lse)
        picked = load_target(x_ptr + row * x_row, x_col, target, V)
        tl.store(loss_ptr + row, row_loss(picked, V, lse, total, SMOOTHING, Z, CAP))


@triton.jit
def cross_entropy_bwd_kernel(
    x_ptr, target_ptr, lse_ptr, upstream_ptr, dx_ptr, V, x_row, x_col, upstream_stride, ignore_index,
    SMOOTHING: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    out_ptr = dx_ptr + row * V
    if target == ignore_index:
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK).to(tl.int64)
            tl.store(out_ptr + cols, tl.zeros([BLOCK], dx_ptr.dtype.element_ty), mask=cols < V)
    else:
        row_gradient(
            x_ptr + row * x_row, out_ptr, x_col, 1, V, target, tl.load(lse_ptr + row), upstream,
            SMOOTHING, Z, CAP, BLOCK, STAGES,
        )  # fmt: skip


def tile_of(kernel: str, x: torch.Tensor) -> dict:
    """Tile of 4096 columns: 16 numbers a thread, so that each thread's two loads are as wide as they get. With more
    than one of STAGES, loads are pipelined."""
    width = next_power_of_2(x.shape[-1])
    block = min(4096, max(width, 128))
    return tuned(kernel, x.device, width, {"BLOCK": block, "STAGES": 1, "num_warps": max(4, block // 512)})


@launcher
def cross_entropy_forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_NV = as_rows(logits)
    losses, lse = (torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    launch(
        cross_entropy_fwd_kernel, (len(x_NV),), x_NV, targets.reshape(-1), losses, lse,
        x_NV.shape[1], *x_NV.stride(), ignore_index,
        SMOOTHING=label_smoothing, Z=z_loss, CAP=softcap, **tile_of("cross_entropy_forward", x_NV),
    )  # fmt: skip
    return losses, lse


@launcher
def cross_entropy_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> torch.Tensor:
    x_NV, upstream_N = as_rows(logits), upstream.reshape(-1)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch(
        cross_entropy_bwd_kernel, (len(x_NV),), x_NV, targets.reshape(-1), lse, upstream_N, gradient,
        x_NV.shape[1], *x_NV.stride(), upstream_N.stride(0), ignore_index,
        SMOOTHING=label_smoothing, Z=z_loss, CAP=softcap, **tile_of("cross_entropy_backward", x_NV),
    )  # fmt: skip
    return gradient


def _save(ctx, inputs, output):
    logits, targets, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, output[1])


def _gradient(ctx, upstream, _):
    if upstream is None:
        return None, None, None, None, None, None
    logits, targets, lse = ctx.saved_tensors
    return cross_entropy_backward(logits, targets, lse, upstream, *ctx.options), None, None, None, None, None


_losses = AutogradOp(cross_entropy_forward, _save, _gradient)


def _cross_entropy_fused(
    logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"
):
    check_reduction(reduction)
    losses, _ = _losses(logits, targets, ignore_index, float(label_smoothing), float(z_loss), softcap)
    return losses if reduction == "none" else reduce(losses, targets != ignore_index, reduction)


def _rows(m, N, V, scale=1.0, ignored=True):
    targets = m.integers(0, V, N)
    if ignored and N > 1 and m.device.type != "meta":
        targets[N // 2] = -100
    return m.normal(N, V, scale=scale), targets


def _peaked(m, N, V):
    """Test case: logits so peaked that softmax rounds to one, where careless gradients lose all accuracy."""
    targets = m.integers(0, V, N)
    hot = torch.nn.functional.one_hot(targets, V) * 20.0
    logits = m.normal(N, V, grad=False) + hot.to(m.device, m.dtype)
    return logits.detach().requires_grad_(), targets


cross_entropy = Op(
    name="cross_entropy",
    reference=_cross_entropy,
    eager=_cross_entropy_eager,
    fused=_cross_entropy_fused,
    shapes="logits ... V, targets ...",
    rows=("logits", "targets"),
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
    native=True,
    budget=Budget(registers=96, vector=True, streams=True),
    flops=lambda logits, *_, **__: (4 * logits.numel(), 4 * logits.numel()),
)
