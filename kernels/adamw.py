"""Fused AdamW step: one pass over each tensor, with stochastic rounding or float32 masters.

Adam keeps a running mean m of the gradient and a running mean v of its square, and steps by m / √v: every coordinate
moves at about the learning rate, whatever the scale of its gradient. The W is for decoupled weight decay, which shrinks
weights directly, not through those averages. Eager PyTorch passes over the five tensors a dozen times; fused, each is
read once and written once.

The clip coefficient comes in as `grad_scale` and multiplies the gradient on the fly, so clipping needs no pass of its
own. A low-precision parameter can have a float32 `master`, which takes the step and is rounded into the parameter; or
no master, and a `seed`: then rounding is stochastic, up with the probability of the fraction lost, and small steps
count on average instead of vanishing.
"""

import math

import torch

from .core.lang import cdiv, tl, triton
from .core.launch import launch, launcher
from .core.op import Budget, Case, Op
from .core.philox import philox_bits, random_bits
from .core.tuned import tuned


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
    """Update `param`, both moments and `master` in place; `step` counts from 1.

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
    """Stochastic rounding of float32 to bfloat16: add 16 random bits, truncate 16; unbiased."""
    row = torch.zeros(1, dtype=torch.int64, device=x.device)
    noise = random_bits(row + seed, row + step, x.numel()).view(x.shape) & 0xFFFF
    bits = (x.view(torch.int32) + noise.to(torch.int32)) & -0x10000
    return bits.view(torch.float32).where(x.isfinite(), x).to(torch.bfloat16)


# ---- fused ----


@triton.jit
def _number(x, x_ptr, POINTER: tl.constexpr):
    """Load a number given as itself or in a tensor, as float32."""
    return tl.load(x_ptr).to(tl.float32) if POINTER else tl.full([], x, tl.float32)


@triton.jit
def _one_minus_power(step, LOG_BETA: tl.constexpr):
    """1 − βᵗ, by a series near zero, where the subtraction would cancel."""
    y = step * LOG_BETA
    series = -y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y / 720)))))
    return tl.where(y > -0.25, series, 1 - tl.exp(y))


@triton.jit
def adamw_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, master_ptr,
    lr, step, grad_scale, lr_ptr, step_ptr, scale_ptr, seed, n,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr, DECAY: tl.constexpr,
    LR_POINTER: tl.constexpr, STEP_POINTER: tl.constexpr, SCALE_POINTER: tl.constexpr,
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    mask = i < n
    lr, step = _number(lr, lr_ptr, LR_POINTER), _number(step, step_ptr, STEP_POINTER)
    grad_scale = _number(grad_scale, scale_ptr, SCALE_POINTER)
    correction1 = _one_minus_power(step, LOG_BETA1)
    correction2 = tl.sqrt(_one_minus_power(step, LOG_BETA2))
    g = tl.load(grad_ptr + i, mask=mask, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(m_ptr + i, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + i, mask=mask, other=0.0).to(tl.float32)
    w = tl.load((master_ptr if MASTER else param_ptr) + i, mask=mask, other=0.0).to(tl.float32)
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    w = w * (1 - lr * DECAY) - (lr / correction1) * (m / (tl.sqrt(v) / correction2 + EPS))
    tl.store(m_ptr + i, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + i, v.to(v_ptr.dtype.element_ty), mask=mask)
    if MASTER:
        tl.store(master_ptr + i, w, mask=mask)
    if STOCHASTIC:
        noise = philox_bits(tl.full([], seed, tl.int64), step.to(tl.int64), first, BLOCK) & 0xFFFF
        bits = (w.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
        w = tl.where(tl.abs(w) < float("inf"), bits.to(tl.float32, bitcast=True), w)
    tl.store(param_ptr + i, w.to(param_ptr.dtype.element_ty), mask=mask)


@launcher(mutates=("param", "exp_avg", "exp_avg_sq", "master"))
def adamw_launch(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor | None,
    lr: float,
    step: float,
    grad_scale: float,
    lr_tensor: torch.Tensor | None,
    step_tensor: torch.Tensor | None,
    scale_tensor: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
) -> None:
    n = param.numel()
    stochastic = seed is not None and param.dtype == torch.bfloat16
    tensors = lr_tensor, step_tensor, scale_tensor
    given = [x is not None for x in tensors]
    key, block = ("stochastic", 1024) if stochastic else ("any", 2048)  # random numbers take registers
    tile = tuned("adamw_step", param.device, key, {"BLOCK": block, "num_warps": 8})
    launch(
        adamw_kernel, (cdiv(n, tile["BLOCK"]),),
        param, grad, exp_avg, exp_avg_sq, param if master is None else master,
        lr, step, grad_scale, *(param if x is None else x for x in tensors), seed if stochastic else 0, n,
        BETA1=beta1, BETA2=beta2, LOG_BETA1=math.log(beta1) if beta1 else -1e4, LOG_BETA2=math.log(beta2),
        EPS=eps, DECAY=weight_decay, LR_POINTER=given[0], STEP_POINTER=given[1], SCALE_POINTER=given[2],
        MASTER=master is not None, STOCHASTIC=stochastic, **tile,
    )  # fmt: skip


def _adamw_step_fused(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    lr,
    step,
    *,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    grad_scale=1.0,
    master=None,
    seed=None,
):
    if not all(x.is_contiguous() for x in (param, exp_avg, exp_avg_sq, param if master is None else master)):
        raise ValueError("adamw_step: parameter, moments and master must be contiguous: they are updated in place")
    numbers = lr, step, grad_scale
    floats = (0.0 if isinstance(x, torch.Tensor) else float(x) for x in numbers)
    tensors = (x if isinstance(x, torch.Tensor) else None for x in numbers)
    with torch.no_grad():
        adamw_launch(
            param, grad.contiguous(), exp_avg, exp_avg_sq, master, *floats, *tensors,
            beta1, beta2, eps, weight_decay, seed,
        )  # fmt: skip


def _state(m, *shape, **options):
    return (
        *(m.normal(*shape, grad=False) for _ in range(3)),
        m.normal(*shape, grad=False).square(),
        options.pop("lr", 1e-2),
        options.pop("step", 3),
        options,
    )


def _mixed(m, *shape):
    """Test case: bfloat16 parameter and gradient, float32 moments and master weights."""
    master, exp_avg, deviation = (m.normal(*shape, dtype=torch.float32, grad=False) for _ in range(3))
    options = {"weight_decay": 0.1, "grad_scale": m.tensor(0.5), "master": master}
    return master.to(m.dtype), m.normal(*shape, grad=False), exp_avg, deviation.square(), 1e-2, 3, options


def _traffic(param, grad, exp_avg, exp_avg_sq, *_, master=None, **__):
    kept = exp_avg.nbytes + exp_avg_sq.nbytes + (param if master is None else master).nbytes
    return 2 * kept + grad.nbytes + (0 if master is None else param.nbytes), 0


adamw_step = Op(
    name="adamw_step",
    reference=_adamw_step,
    fused=_adamw_step_fused,
    shapes="param ..., grad ..., exp_avg ..., exp_avg_sq ..., master ...",
    mutates=("param", "exp_avg", "exp_avg_sq", "master"),
    cases=[
        Case("first step", lambda m: _state(m, 5, 33, step=1)),
        Case("decay and clip", lambda m: _state(m, 100, weight_decay=0.1, grad_scale=m.tensor(0.3))),
        Case("tensors for scalars", lambda m: _state(m, 64, lr=m.tensor(1e-2), step=m.tensor(4.0))),
        Case("master weights", lambda m: _mixed(m, 7, 19)),
        Case("stochastic rounding", lambda m: _state(m, 70, seed=11)),
        Case("empty", lambda m: _state(m, 0)),
        Case("4096x14336", lambda m: _mixed(m, 4096, 14336), bench=True),
    ],
    traffic=_traffic,
    budget=Budget(registers=64, vector=True),
)
