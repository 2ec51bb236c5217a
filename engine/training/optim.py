"""Optimizers: AdamW, Muon, SGD; gradient clipping and parameter groups.

    SGDDecay  w -= lr/√t · g                     the rule the theory of convex optimization knows best
    AdamW     w -= lr · m̂/(√v̂ + ε) + lr·λ·w      a step size of its own for every weight (Loshchilov & Hutter, 2019)
    Muon      w -= lr · s · orthogonal(m) + lr·λ·w   a step of equal size in every direction of a matrix (Jordan, 2024)

AdamW divides the mean gradient m by the root of the mean squared gradient v, so each weight moves by about `lr`
whatever the gradient's scale; both means start at zero and are corrected for it (the hats). The decay λ acts on the
weight itself and not through the gradient, where the division would distort it.

Muon notes that a matrix's gradient has a few strong directions which drown the rest. It replaces the momentum
m = U S Vᵀ by U Vᵀ: all singular values one. Five steps of an odd polynomial, applied to the matrix by products alone,
come close enough. Embeddings, heads and vectors stay with AdamW; s = 0.2·√max(rows, columns) gives both kinds of step
the same root mean square, so that they share one learning rate (Liu et al., 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ... import kernels
from ..errors import InputError
from .config import TrainConfig

Rule = Callable[[Tensor], Tensor]
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class SGDDecay(torch.optim.Optimizer):
    """SGD with learning rate lr / √t."""

    def __init__(self, params: Params, lr: float = 1e-1) -> None:
        _check(lr=lr)
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = _evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                p.add_(p.grad, alpha=-group["lr"] / math.sqrt(state["step"]))
        return loss


class AdamW(torch.optim.Optimizer):
    """AdamW; one fused pass over all weights where torch has one (CPU, CUDA)."""

    ONE_PASS = 1 << 22
    """Weights from which on a GPU takes longer over a tensor than the host over a launch for it alone."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        _check(lr=lr, eps=eps, weight_decay=weight_decay)
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise InputError(f"betas[{i}] must be in [0, 1), not {beta}")
        settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "fused": True})  # torch then loads step counters to where the weights are

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = _evaluate(closure)
        for group in self.param_groups:
            self._adamw(group, [p for p in group["params"] if p.grad is not None])
        return loss

    @torch.no_grad()
    def step_and_copy(self, copies: Mapping[Tensor, Tensor], grad_scale: Tensor) -> None:
        """Fused step: for weights among `copies`, gradient scaling, AdamW and the copy to low precision are one pass,
        which moves 40 bytes a weight instead of 52."""
        for group in self.param_groups:
            self._adamw(group, [p for p in group["params"] if p.grad is not None], copies, grad_scale)

    def _adamw(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        copies: Mapping[Tensor, Tensor] | None = None,
        grad_scale: float | Tensor = 1.0,
    ) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        torch._foreach_add_([self.state[p]["step"] for p in params], 1.0)
        beta1, beta2 = group["betas"]
        settings = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}
        lr, copies = float(group["lr"]), copies or {}
        for p in params:
            if p in copies:
                master = None if copies[p] is p else p
                moments = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                options, grad = {**settings, "grad_scale": grad_scale, "master": master}, cast(Tensor, p.grad)
                kernels.adamw_step(copies[p], grad, *moments, lr, self.state[p]["step"], **options)
        rest = [p for p in params if p not in copies]
        if rest:
            self._rest(rest, {"lr": lr, **settings})

    def _rest(self, params: list[Tensor], settings: dict[str, float]) -> None:
        grads, means, squares, steps = zip(
            *((p.grad, *(self.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step"))) for p in params)
        )
        if params[0].device.type in ("cpu", "cuda"):
            torch._fused_adamw_(params, grads, means, squares, [], steps, amsgrad=False, maximize=False, **settings)
            return
        for p, grad, mean, square, step in zip(params, grads, means, squares, steps):
            adamw_update(p, grad, mean, square, float(step), **settings)


def adamw_update(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: float,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Reference AdamW update, in place, as in the paper; the fallback where torch has no fused pass."""
    p.mul_(1 - lr * weight_decay)
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = (square / (1 - beta2**step)).sqrt_().add_(eps)
    p.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))


class Muon(AdamW):
    """Muon (orthogonalized momentum) for matrices, AdamW for the rest (groups with `orthogonal=False`).

    Matrices are orthogonalized in `dtype`. Where this process keeps but a part of them, `on_whole(p, part, rule)` says
    which part of the rule's result belongs to the parameter p, given its part of what the rule is to see.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
        on_whole: Callable[[Tensor, Tensor, Rule], Tensor] = lambda p, part, rule: rule(part),
    ) -> None:
        if not 0 <= momentum < 1:
            raise InputError(f"momentum must be in [0, 1), not {momentum}")
        super().__init__(params, lr, betas, eps, weight_decay)
        self.dtype, self.on_whole = dtype, on_whole
        self.defaults |= {"momentum": momentum, "orthogonal": True}
        for group in self.param_groups:
            group.setdefault("momentum", momentum)
            group.setdefault("orthogonal", True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in params if group["orthogonal"] and p.ndim >= 2]
            self._adamw(group, [p for p in params if not (group["orthogonal"] and p.ndim >= 2)])
            for p in matrices:
                self._muon(group, p)
        return loss

    def _muon(self, group: dict[str, Any], p: Tensor) -> None:
        state, momentum = self.state[p], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        ahead = p.grad.lerp(mean, momentum)  # Nesterov: where the momentum will be
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(self.on_whole(p, ahead, self._level), alpha=-group["lr"])

    def _level(self, matrix: Tensor) -> Tensor:
        return orthogonalize(matrix, dtype=self.dtype).to(matrix.dtype) * (0.2 * math.sqrt(max(matrix.shape[-2:])))


# Chosen by Jordan for a steep slope at zero: small singular values grow 3.4-fold a step, all end between 0.7 and 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
    """Orthogonalize matrices (U S Vᵀ → about U Vᵀ) by Newton–Schulz iteration, which needs only matrix products."""
    a, b, c = QUINTIC
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, norm: Tensor | None = None) -> Tensor:
    """Clip gradients to a global 2-norm of at most `max_norm`; return the norm before.

    `norm` is the joint norm where these parameters are but a part of those that are clipped together.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(()) if norm is None else norm
    joint = norm if norm is not None else torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    scale = clip_scale(joint, max_norm)
    if scale.device.type != "cpu" or scale != 1:  # asking costs nothing on a CPU, and a pass over memory is saved
        torch._foreach_mul_(grads, scale)
    return joint


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """Factor by which clipping scales gradients of this global norm."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def parameter_groups(named: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices, none for vectors; embedding and head are left out of Muon."""
    matrices, tables, vectors = [], [], []
    for name, p in named:
        is_table = name.split(".")[0] in ("embedding", "positions", "head")
        (vectors if p.ndim < 2 else tables if is_table else matrices).append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": tables, "weight_decay": weight_decay, "orthogonal": False},
        {"params": vectors, "weight_decay": 0.0, "orthogonal": False},
    ]
    return [group for group in groups if group["params"]]


def _evaluate(closure: Callable[[], Tensor] | None) -> Tensor | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise InputError(f"{name} must be at least 0, not {value}")


def make_optimizer(
    config: TrainConfig,
    named: dict[str, Tensor],
    dtype: torch.dtype,
    with_full_matrix: Callable[[str, Tensor, Rule], Tensor],
) -> torch.optim.Optimizer:
    """Make the optimizer of a run; Muon gets full matrices of sharded weights through `with_full_matrix`."""
    groups = parameter_groups(named.items(), config.weight_decay)
    if config.optimizer == "sgd":
        return SGDDecay(named.values(), config.lr)
    settings = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.optimizer == "adamw":
        return AdamW(groups, config.lr, **settings)
    names = {p: name for name, p in named.items()}
    return Muon(
        groups, config.lr, **settings, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16,
        on_whole=lambda p, part, rule: with_full_matrix(names[p], part, rule),
    )  # fmt: skip
