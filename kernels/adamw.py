"""One AdamW step over a tensor, in one pass.

Adam keeps a running mean m of the gradient and a running mean v of its square, and steps by m / √v: every coordinate
moves at about the learning rate, whatever the scale of its gradient. The W is for weight decay that shrinks weights
directly, not through those averages. Eager PyTorch walks the five tensors a dozen times; fused, each is read once and
written once.

The clip coefficient comes in as `grad_scale` and multiplies the gradient on the fly, so clipping needs no pass of its
own. A low-precision parameter can have a float32 `master`, which takes the step and is rounded into the parameter; or
no master, and a `seed`: then rounding is stochastic, up with the probability of the fraction lost, and small steps
count on average instead of vanishing.
"""

import torch

from .op import Case, Op
from .philox import random_bits


def _adamw_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    lr: float | torch.Tensor,
    step: int | torch.Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float | torch.Tensor = 1.0,
    master: torch.Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Updates `param`, both moments and `master` in place, as step number `step` (from 1).

    `lr`, `step` and `grad_scale` may be tensors of one element, so that nothing waits for the device.
    """
    with torch.no_grad():
        weights = param if master is None else master
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        g = grad.to(dtype) * grad_scale
        m = exp_avg.to(dtype).lerp(g, 1 - beta1)
        v = exp_avg_sq.to(dtype) * beta2 + (1 - beta2) * g.square()
        w = weights.to(dtype) * (1 - lr * weight_decay)
        w -= lr / (1 - beta1**step) * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        if master is not None:
            master.copy_(w)
        param.copy_(w if seed is None or param.dtype != torch.bfloat16 else round_stochastically(w, seed, step))


def round_stochastically(x: torch.Tensor, seed: int, step: int | torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, up or down at random so that the mean is exact: add 16 random bits, cut off 16."""
    row = torch.zeros(1, dtype=torch.int64, device=x.device)
    noise = random_bits(row + seed, row + step, x.numel()).view(x.shape) & 0xFFFF
    bits = (x.view(torch.int32) + noise.to(torch.int32)) & -0x10000
    return bits.view(torch.float32).where(x.isfinite(), x).to(torch.bfloat16)


def _state(m, *shape, **options):
    return (
        *(m.normal(*shape, grad=False) for _ in range(3)),
        m.normal(*shape, grad=False).square(),
        options.pop("lr", 1e-2),
        options.pop("step", 3),
        options,
    )


def _mixed(m, *shape):
    """A bfloat16 parameter and gradient with float32 moments and master weights."""
    master, exp_avg, deviation = (m.normal(*shape, dtype=torch.float32, grad=False) for _ in range(3))
    options = {"weight_decay": 0.1, "grad_scale": m.tensor(0.5), "master": master}
    return master.to(m.dtype), m.normal(*shape, grad=False), exp_avg, deviation.square(), 1e-2, 3, options


def _traffic(param, grad, exp_avg, exp_avg_sq, *_, master=None, **__):
    kept = exp_avg.nbytes + exp_avg_sq.nbytes + (param if master is None else master).nbytes
    return 2 * kept + grad.nbytes + (0 if master is None else param.nbytes), 0


adamw_step = Op(
    name="adamw_step",
    reference=_adamw_step,
    mutates=("param", "exp_avg", "exp_avg_sq", "master"),
    cases=[
        Case("first step", lambda m: _state(m, 5, 33, step=1)),
        Case("decay and clip", lambda m: _state(m, 100, weight_decay=0.1, grad_scale=m.tensor(0.3))),
        Case("tensors for scalars", lambda m: _state(m, 64, lr=m.tensor(1e-2), step=m.tensor(4.0))),
        Case("master weights", lambda m: _mixed(m, 7, 19)),
        Case("empty", lambda m: _state(m, 0)),
        Case("4096x14336", lambda m: _mixed(m, 4096, 14336), bench=True),
    ],
    traffic=_traffic,
)
