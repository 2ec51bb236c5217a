"""Mixture of experts: top-k routing and the grouped GEMMs of the chosen feed-forwards.

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

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .core.lang import wide
from .core.op import Budget, Case, Op
from .gpu.moe_launch import moe_fused
from .swiglu import swiglu_packed


class MoEAux(NamedTuple):
    """Auxiliary outputs of routing: router losses and the load of each expert."""

    load_balance: torch.Tensor
    z: torch.Tensor
    tokens_per_expert: torch.Tensor


def route(
    router_logits: torch.Tensor,
    top_k: int,
    score: str = "softmax",
    normalize: bool = True,
    *,
    choice_bias: torch.Tensor | None = None,
    groups: tuple[int, int] = (1, 1),
) -> tuple[torch.Tensor, torch.Tensor, MoEAux]:
    """Top-k routing: weights and numbers of each token's experts (T, top_k), and `MoEAux`; ties go to the lower number.

    The experts chosen are those of the highest scores. `choice_bias` (E,) is added to them for the choice, not for the
    weight (DeepSeek-V3's balancing without an auxiliary loss). `groups` = (G, n): experts in G groups, and only the n
    best groups are chosen from; a group is as good as its best expert, with `choice_bias` as its two best together.
    """
    E = router_logits.shape[-1]
    _check(E, top_k, score)
    logits_TE = router_logits.to(wide(router_logits))
    scores_TE = torch.softmax(logits_TE, -1) if score == "softmax" else torch.sigmoid(logits_TE)
    merits_TE = logits_TE.detach()  # rise with the scores, and tell more of them apart
    if choice_bias is not None:
        merits_TE = scores_TE.detach() + choice_bias.detach().to(scores_TE.dtype)
    if groups[0] > 1:
        merits_TE = _within_best_groups(merits_TE, *groups, best=1 if choice_bias is None else 2)
    order_TE = torch.sort(merits_TE, dim=-1, descending=True, stable=True).indices
    experts_TK = order_TE[:, :top_k]
    weights_TK = scores_TE.gather(-1, experts_TK)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    aux = _statistics(logits_TE, scores_TE, experts_TK, score)
    return weights_TK, experts_TK, aux if choice_bias is None else _with_load_error(aux, choice_bias)


def _within_best_groups(merits_TE, count, used, best):
    merits_TGM = merits_TE.unflatten(-1, (count, -1))
    merit_TG = merits_TGM.topk(min(best, merits_TGM.shape[-1]), -1).values.sum(-1)
    chosen_TG = torch.zeros_like(merit_TG, dtype=torch.bool).scatter(-1, merit_TG.topk(used, -1).indices, True)
    return merits_TGM.masked_fill(~chosen_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def _with_load_error(aux, choice_bias):
    """Give `choice_bias` the load error as gradient (auxiliary-loss-free balancing); the loss keeps its value."""
    share_E = aux.tokens_per_expert / aux.tokens_per_expert.sum().clamp(min=1)
    pull = (choice_bias * (share_E - 1 / len(share_E)).to(choice_bias.dtype)).sum()
    return aux._replace(load_balance=aux.load_balance + (pull - pull.detach()).to(aux.load_balance.dtype))


def _check(E, top_k, score):
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"moe: score is {score!r}; valid are softmax and sigmoid")
    if not 1 <= top_k <= E:
        raise ValueError(f"moe: top_k is {top_k} with {E} experts; it must be between 1 and {E}")


def _check_here(router_logits, w_gate_up, w_down, first):
    E, here = router_logits.shape[-1], len(w_down)
    if not 0 <= first <= E - here:
        raise ValueError(f"moe: first is {first} with {here} of {E} experts; it must be between 0 and {E - here}")
    if w_gate_up.shape[1] != 2 * w_down.shape[2]:
        raise ValueError(
            f"moe: w_gate_up {tuple(w_gate_up.shape)} must be twice as tall as w_down {tuple(w_down.shape)} is wide"
        )


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
    b_gate_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    **choice,
) -> tuple[torch.Tensor, MoEAux]:
    """x (…, C) through the experts chosen by `router_logits` (…, E): (y, aux).

    `w_gate_up` (E, 2F, C) holds each expert's gate and up projections, `w_down` (E, C, F) the way back, `b_gate_up` and
    `b_down` their biases. With fewer weights than logits, they are those of the experts from `first` on, and y is what
    these alone contribute. `choice` is `route`'s: choice_bias, groups.
    """
    _check_here(router_logits, w_gate_up, w_down, first)
    flat_TC, logits_TE = x.flatten(0, -2), router_logits.flatten(0, -2)
    weights_TK, experts_TK, aux = route(logits_TE, top_k, score, normalize, **choice)
    weights_TE = torch.zeros(logits_TE.shape, dtype=weights_TK.dtype, device=x.device)
    weights_TE = weights_TE.scatter(-1, experts_TK, weights_TK)[:, first : first + len(w_down)]
    h_ETF = torch.einsum("tc,efc->etf", flat_TC, w_gate_up)
    h_ETF = swiglu_packed.reference(h_ETF if b_gate_up is None else h_ETF + b_gate_up.unsqueeze(1), activation)
    y_ETC = torch.einsum("etf,ecf->etc", h_ETF, w_down)
    y_ETC = y_ETC if b_down is None else y_ETC + b_down.unsqueeze(1)
    y_TC = torch.einsum("etc,te->tc", y_ETC.to(weights_TE.dtype), weights_TE)
    return y_TC.to(x.dtype).view(x.shape), aux


def _moe_eager(
    x, router_logits, w_gate_up, w_down, top_k, *, score="softmax", normalize=True, activation="silu", first=0,
    b_gate_up=None, b_down=None, **choice,
):  # fmt: skip
    _check_here(router_logits, w_gate_up, w_down, first)
    flat_TC, logits_TE = x.flatten(0, -2), router_logits.flatten(0, -2)
    weights_TK, experts_TK, aux = route(logits_TE, top_k, score, normalize, **choice)
    up_biases, down_biases = (itertools.repeat(None) if b is None else b for b in (b_gate_up, b_down))
    biases = list(zip(range(len(w_down)), up_biases, down_biases))
    counts = aux.tokens_per_expert.tolist()
    before, here = sum(counts[:first]), counts[first : first + len(w_down)]
    order_A = experts_TK.flatten().argsort(stable=True)[before : before + sum(here)]
    pieces = flat_TC[order_A // top_k].split(here)
    outputs = [
        F.linear(swiglu_packed.eager(F.linear(_filled(part), w_gate_up[e], b_up), activation), w_down[e], b)[
            : len(part)
        ]
        for piece, (e, b_up, b) in zip(pieces, biases)
        if len(piece) or e == 0  # one runs on nothing too: the weights have a gradient, and it is zero
        for part in _parts(piece)
    ]
    y_AC = torch.cat(outputs)
    y_TKC = y_AC.new_zeros(experts_TK.numel(), y_AC.shape[-1]).index_copy(0, order_A, y_AC).view(*experts_TK.shape, -1)
    y_TC = (y_TKC.to(weights_TK.dtype) * weights_TK.unsqueeze(-1)).sum(1)
    return y_TC.to(x.dtype).view(x.shape), aux


def _parts(piece_TC):
    """Split rows into few distinct sizes: on a CPU, oneDNN compiles and keeps a bfloat16 product for every number of
    rows that it ever sees. 256 at a time, and of the rest (`_filled`) a multiple of 64."""
    return piece_TC.split(256) if _is_kept(piece_TC) else [piece_TC]


def _filled(part_TC):
    return F.pad(part_TC, (0, 0, 0, -len(part_TC) % 64)) if _is_kept(part_TC) else part_TC


def _is_kept(x):
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _moe_fused(x, router_logits, w_gate_up, w_down, top_k, **options):
    _check(router_logits.shape[-1], top_k, options.get("score", "softmax"))
    _check_here(router_logits, w_gate_up, w_down, options.get("first", 0))
    if options.get("activation") == "clamped" or "b_gate_up" in options or "b_down" in options:
        return _moe_unfused(x, router_logits, w_gate_up, w_down, top_k, **options)

    def run(logits, **rest):
        return moe_fused(x, logits, w_gate_up, w_down, top_k, **rest)

    return by_highest_logits(run, router_logits, top_k, **options)


def by_highest_logits(run, router_logits, top_k, choice_bias=None, groups=(1, 1), **options):
    """Adapt kernels that choose the highest logits to other routing rules: logits of unchosen experts are masked."""
    if choice_bias is None and groups[0] == 1:
        y, *aux = run(router_logits, **options)
        return y, MoEAux(*aux)
    logits_TE = router_logits.flatten(0, -2)
    score, normalize = options.get("score", "softmax"), options.get("normalize", True)
    _, experts_TK, aux = route(logits_TE, top_k, score, normalize, choice_bias=choice_bias, groups=groups)
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(-1, experts_TK, True)
    reachable_TE = logits_TE.to(wide(logits_TE)).masked_fill(~chosen_TE, -1e30)
    y, *_ = run(reachable_TE.view(router_logits.shape), **options)
    if score == "softmax" and not normalize:  # theirs sum to 1 among the chosen
        shares_TE = torch.softmax(logits_TE.to(wide(logits_TE)), -1)
        y = y * (shares_TE * chosen_TE).sum(-1).view(*y.shape[:-1], 1).to(y.dtype)
    return y, aux


def _moe_unfused(x, *args, **options):
    """Eager experts for what no kernel supports. Under CUDA-graph capture and with fake tensors the number of tokens of
    an expert is unknown, so there each expert computes all."""
    unknown = x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    return (_moe if unknown else _moe_eager)(x, *args, **options)


def _batch(m, T, C, E, F_, logits=None):
    router = m.normal(T, E, dtype=torch.float32) if logits is None else logits
    return m.normal(T, C), router, m.normal(E, 2 * F_, C, scale=C**-0.5), m.normal(E, C, F_, scale=F_**-0.5)


def _some(m, T, C, E, F_, experts):
    """Test case: the weights of some experts only (expert parallelism)."""
    x, logits, up, down = _batch(m, T, C, E, F_)
    return x, logits, *(w.detach()[experts].clone().requires_grad_() for w in (up, down))


def _flops(x, router_logits, w_gate_up, w_down, top_k, **_):
    C, T = x.shape[-1], x.numel() // x.shape[-1]
    return 6 * T * top_k * C * w_down.shape[-1]


moe = Op(
    name="moe",
    reference=_moe,
    eager=_moe_eager,
    native=True,
    fused=_moe_fused,
    shapes="x ... C, router_logits ... E, w_gate_up here both C, w_down here C F",
    rows=("x", "router_logits"),
    autocast=None,
    cases=[
        Case("top 2 of 4", lambda m: (*_batch(m, 9, 32, 4, 24), 2)),
        Case("switch", lambda m: (*_batch(m, 7, 32, 4, 16), 1), {"normalize": False}),
        Case("sigmoid", lambda m: (*_batch(m, 7, 16, 4, 16), 2), {"score": "sigmoid"}),
        Case("all tokens to one expert", lambda m: (*_batch(m, 6, 16, 4, 16, m.tensor([[9.0, 1, 0, 0]] * 6)), 1)),
        Case("one token", lambda m: (*_batch(m, 1, 16, 4, 16), 2)),
        Case("every expert", lambda m: (*_batch(m, 5, 16, 3, 16), 3), {"activation": "gelu"}),
        Case(
            "a bias moves the choice",
            lambda m: (*_batch(m, 9, 16, 6, 16), 2, {"choice_bias": m.normal(6, dtype=torch.float32, grad=False)}),
            {"score": "sigmoid"},
        ),
        Case("best of four groups", lambda m: (*_batch(m, 9, 16, 8, 16), 2), {"groups": (4, 2), "normalize": False}),
        Case(
            "experts with biases, clamped",
            lambda m: (*_batch(m, 9, 16, 4, 16), 2, {"b_gate_up": m.normal(4, 32), "b_down": m.normal(4, 16)}),
            {"activation": "clamped"},
        ),
        Case("expanded gradient", lambda m: (*_batch(m, 5, 16, 3, 16), 2), expanded=True),
        Case("some experts live elsewhere", lambda m: (*_some(m, 9, 16, 5, 16, slice(1, 3)), 2), {"first": 1}),
        Case("32768 tokens, 8 of 128 experts", lambda m: (*_batch(m, 32768, 2048, 128, 768), 8), bench=True),
        Case("128 tokens, 8 of 128 experts", lambda m: (*_batch(m, 128, 2048, 128, 768), 8), bench=True),
    ],
    budget={
        f"moe_grouped_{name}_kernel": Budget(wgmma=True, vector=True, copies=copies, products=1, tensor_share=share)
        # The shares are those of few tokens.
        for name, copies, share in (
            ("gemm_swiglu", 2, 0.8),
            ("gemm", 2, 0.66),
            ("gemm_swiglu_bwd", 2, 0.5),
            ("dw", 2, 0.8),
        )
    },
    traffic=lambda x, logits, up, down, k, **_: (
        2 * x.nbytes + up.nbytes + down.nbytes,
        3 * x.nbytes + 2 * (up.nbytes + down.nbytes),
    ),
    flops=lambda *args, **_: (_flops(*args), 2 * _flops(*args)),
)
