"""Mixture of experts: many feed-forward layers, of which each token visits a few.

The router scores every expert for every token; the best `top_k` are kept, their scores (normalized or not) become
weights, and the token's output is the weighted sum of what those experts say. Parameters grow with the number of
experts, work only with `top_k`. Switch routing is top_k = 1 without normalization.

The reference runs every expert on every token and multiplies most of it by zero: the formula and nothing else. The
eager path sorts tokens by expert and runs each expert once on its own.

The by-product `aux` holds what training adds to its loss. `load_balance` is E · Σ f_e · P_e (Switch), where f_e is
the share of assignments that expert e got and P_e its mean probability: 1 when the load is even. `z` is the mean
squared logsumexp of the router's logits, which keeps them small.

Where experts are spread over processes, each holds a run of them, from number `first` on, and computes their part of
every token's sum; the parts add up to the whole.

T tokens, C channels, E experts, F features of an expert, A assignments = T · top_k.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .core.lang import wide
from .core.op import Budget, Case, Op
from .gpu.moe_launch import moe_fused
from .swiglu import swiglu_packed


class MoEAux(NamedTuple):
    """What the router's loss needs, and how tokens were spread."""

    load_balance: torch.Tensor
    z: torch.Tensor
    tokens_per_expert: torch.Tensor


def route(
    router_logits: torch.Tensor, top_k: int, score: str = "softmax", normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor, MoEAux]:
    """Weights and numbers of each token's `top_k` experts (T, top_k), and statistics; ties go to the lower number."""
    E = router_logits.shape[-1]
    _check(E, top_k, score)
    logits_TE = router_logits.to(wide(router_logits))
    scores_TE = torch.softmax(logits_TE, -1) if score == "softmax" else torch.sigmoid(logits_TE)
    order_TE = torch.sort(logits_TE.detach(), dim=-1, descending=True, stable=True).indices
    experts_TK = order_TE[:, :top_k]
    weights_TK = scores_TE.gather(-1, experts_TK)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, experts_TK, _statistics(logits_TE, scores_TE, experts_TK, score)


def _check(E, top_k, score):
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"moe: score is {score!r}; valid are softmax and sigmoid")
    if not 1 <= top_k <= E:
        raise ValueError(f"moe: top_k is {top_k} with {E} experts; it must be between 1 and {E}")


def _check_here(router_logits, w_down, first):
    E, here = router_logits.shape[-1], len(w_down)
    if not 0 <= first <= E - here:
        raise ValueError(f"moe: first is {first} with {here} of {E} experts; it must be between 0 and {E - here}")


def _statistics(logits_TE, scores_TE, experts_TK, score):
    T, E = logits_TE.shape
    counts_E = (experts_TK.flatten()[:, None] == torch.arange(E, device=experts_TK.device)).sum(0)
    probabilities_TE = scores_TE if score == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
    share_E = counts_E.to(logits_TE.dtype) / max(experts_TK.numel(), 1)
    mean_E = probabilities_TE.sum(0) / max(T, 1)
    z = torch.logsumexp(logits_TE, -1).square().sum() / max(T, 1)
    return MoEAux(E * (share_E * mean_E).sum(), z, counts_E)


def _moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    activation: str = "silu",
    first: int = 0,
) -> tuple[torch.Tensor, MoEAux]:
    """x (…, C) through the experts chosen by `router_logits` (…, E): (y, aux).

    `w_gate_up` (E, 2F, C) holds each expert's gate and up projections, `w_down` (E, C, F) the way back. With fewer
    weights than logits, they are those of the experts from `first` on, and y is what these alone contribute.
    """
    _check_here(router_logits, w_down, first)
    flat_TC, logits_TE = x.flatten(0, -2), router_logits.flatten(0, -2)
    weights_TK, experts_TK, aux = route(logits_TE, top_k, score, normalize)
    weights_TE = torch.zeros(logits_TE.shape, dtype=weights_TK.dtype, device=x.device)
    weights_TE = weights_TE.scatter(-1, experts_TK, weights_TK)[:, first : first + len(w_down)]
    h_ETF = swiglu_packed.reference(torch.einsum("tc,efc->etf", flat_TC, w_gate_up), activation)
    y_ETC = torch.einsum("etf,ecf->etc", h_ETF, w_down)
    y_TC = torch.einsum("etc,te->tc", y_ETC.to(weights_TE.dtype), weights_TE)
    return y_TC.to(x.dtype).view(x.shape), aux


def _moe_eager(
    x, router_logits, w_gate_up, w_down, top_k, *, score="softmax", normalize=True, activation="silu", first=0
):
    _check_here(router_logits, w_down, first)
    flat_TC, logits_TE = x.flatten(0, -2), router_logits.flatten(0, -2)
    weights_TK, experts_TK, aux = route(logits_TE, top_k, score, normalize)
    counts = aux.tokens_per_expert.tolist()
    before, here = sum(counts[:first]), counts[first : first + len(w_down)]
    order_A = experts_TK.flatten().argsort(stable=True)[before : before + sum(here)]
    pieces = flat_TC[order_A // top_k].split(here)
    outputs = [
        F.linear(swiglu_packed.eager(F.linear(_filled(part), w_gate_up[e]), activation), w_down[e])[: len(part)]
        for e, piece in enumerate(pieces)
        if len(piece) or e == 0  # one runs on nothing too: the weights have a gradient, and it is zero
        for part in _parts(piece)
    ]
    y_AC = torch.cat(outputs)
    y_TKC = y_AC.new_zeros(experts_TK.numel(), y_AC.shape[-1]).index_copy(0, order_A, y_AC).view(*experts_TK.shape, -1)
    y_TC = (y_TKC.to(weights_TK.dtype) * weights_TK.unsqueeze(-1)).sum(1)
    return y_TC.to(x.dtype).view(x.shape), aux


def _parts(piece_TC):
    """On a CPU, oneDNN compiles and keeps a bfloat16 product for every number of rows that it ever sees. So it sees
    few: 256 at a time, and of the rest (`_filled`) a multiple of 64."""
    return piece_TC.split(256) if _is_kept(piece_TC) else [piece_TC]


def _filled(part_TC):
    return F.pad(part_TC, (0, 0, 0, -len(part_TC) % 64)) if _is_kept(part_TC) else part_TC


def _is_kept(x):
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _moe_fused(x, router_logits, w_gate_up, w_down, top_k, **options):
    _check(router_logits.shape[-1], top_k, options.get("score", "softmax"))
    _check_here(router_logits, w_down, options.get("first", 0))
    y, *aux = moe_fused(x, router_logits, w_gate_up, w_down, top_k, **options)
    return y, MoEAux(*aux)


def _batch(m, T, C, E, F_, logits=None):
    router = m.normal(T, E, dtype=torch.float32) if logits is None else logits
    return m.normal(T, C), router, m.normal(E, 2 * F_, C, scale=C**-0.5), m.normal(E, C, F_, scale=F_**-0.5)


def _some(m, T, C, E, F_, experts):
    """The weights of some experts only."""
    x, logits, up, down = _batch(m, T, C, E, F_)
    return x, logits, *(w.detach()[experts].clone().requires_grad_() for w in (up, down))


def _flops(x, router_logits, w_gate_up, w_down, top_k, **_):
    C, T = x.shape[-1], x.numel() // x.shape[-1]
    return 6 * T * top_k * C * w_down.shape[-1]


moe = Op(
    name="moe",
    reference=_moe,
    eager=_moe_eager,
    fused=_moe_fused,
    rows=("x", "router_logits"),
    autocast=None,
    cases=[
        Case("top 2 of 4", lambda m: (*_batch(m, 9, 32, 4, 24), 2)),
        Case("switch", lambda m: (*_batch(m, 7, 32, 4, 16), 1), {"normalize": False}),
        Case("sigmoid", lambda m: (*_batch(m, 7, 16, 4, 16), 2), {"score": "sigmoid"}),
        Case("all tokens to one expert", lambda m: (*_batch(m, 6, 16, 4, 16, m.tensor([[9.0, 1, 0, 0]] * 6)), 1)),
        Case("one token", lambda m: (*_batch(m, 1, 16, 4, 16), 2)),
        Case("every expert", lambda m: (*_batch(m, 5, 16, 3, 16), 3), {"activation": "gelu"}),
        Case("expanded gradient", lambda m: (*_batch(m, 5, 16, 3, 16), 2), expanded=True),
        Case("some experts live elsewhere", lambda m: (*_some(m, 9, 16, 5, 16, slice(1, 3)), 2), {"first": 1}),
        Case("32768 tokens, 8 of 128 experts", lambda m: (*_batch(m, 32768, 2048, 128, 768), 8), bench=True),
        Case("128 tokens, 8 of 128 experts", lambda m: (*_batch(m, 128, 2048, 128, 768), 8), bench=True),
    ],
    budget={
        f"moe_{name}_kernel": Budget(wgmma=True, vector=True) for name in ("gate", "rows", "gate_backward", "weights")
    },
    traffic=lambda x, logits, up, down, k, **_: (
        2 * x.nbytes + up.nbytes + down.nbytes,
        3 * x.nbytes + 2 * (up.nbytes + down.nbytes),
    ),
    flops=lambda *args, **_: (_flops(*args), 2 * _flops(*args)),
)
