"""Calibrated quantization (GPTQ): rounding errors are fed back so that they cancel on the activations of a text.

Round-to-nearest treats each column by itself. But activations are correlated: the error that one rounded column adds to
a product can be compensated by the columns after it. How much each takes follows from the inverse of the Hessian of
a layer's squared error, H = Σ x xᵀ over the tokens of the text: with the upper Cholesky factor U of H⁻¹, column j takes
U[c, j] / U[c, c] of the error of column c. x is rotated as the weights are (csrc/cpu/serving/hadamard.hpp), and a
layer sees the activations that rounded layers before it make.

On SmolLM2-135M that halves the loss of 8 bits, and cuts that of 4 to a quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...kernels import swiglu_packed
from ...kernels.moe import route
from ...kernels.packed_linear import TURNED, rotated
from ...tokenizer.chat import encode_chat
from ..formats.packed_weight import Layout, PackedExperts, PackedWeight, install, matrix_of
from ..layers import Linear, MoE, routing_options
from ..model import Transformer, dense_attention
from .execution.native_matrix import pack
from .llm import LLM
from .sampling_params import SamplingParams
from .scheme import Scheme

DAMPING = 0.01  # relative to the mean of H's diagonal; keeps columns that the text never activates
BATCH = 4096  # tokens computed together


class Hessian:
    """GPTQ's Hessian H = Σ x xᵀ of a layer's inputs, accumulated by a forward hook or by `add`."""

    def __init__(self, layout: Layout, layer: torch.nn.Module | None = None) -> None:
        self.layout, self.total = layout, torch.zeros(0)
        self.hook = layer and layer.register_forward_pre_hook(lambda _, inputs: self.add(inputs[0]))

    def add(self, x: Tensor) -> None:
        rows_NC = x.flatten(0, -2).float()
        step = TURNED if self.layout.rotate else self.layout.group
        rows_NC = torch.nn.functional.pad(rows_NC, (0, -rows_NC.shape[1] % step))
        if self.layout.rotate:
            rows_NC = rotated(rows_NC)
        product = rows_NC.T @ rows_NC
        self.total = self.total + product.double() if self.total.numel() else product.double()

    def feedback(self) -> Tensor | None:
        """GPTQ error feedback, row c: shares of column c's error that later columns take; None without inputs."""
        if self.hook is not None:
            self.hook.remove()
        if not self.total.numel():
            return None
        diagonal = self.total.diagonal()
        diagonal += DAMPING * diagonal.mean().clamp(min=1e-12)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.total))
        upper = torch.linalg.cholesky(inverse, upper=True)
        return (upper / upper.diagonal()[:, None]).float().contiguous()


@torch.inference_mode()
def quantize(
    model: Transformer,
    scheme: Scheme,
    rows: Sequence[list[int]] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Quantize the model's matrices in place; with `rows` of tokens (all of one length) calibrated on them."""
    total = len(model.blocks) + 1
    parts = torch.tensor(rows).split(max(1, BATCH // len(rows[0]))) if rows else ()
    state = [(stream := model._embed(part, None), torch.zeros_like(stream)) for part in parts]
    for index, block in enumerate(cast("list[Any]", model.blocks)):
        layers = {path: layer for path, layer in block.named_modules() if type(layer) is Linear}
        layouts = {path: scheme.layout(matrix_of(path)) for path in layers}
        rotate, seen = model.rotation(block.kind), {}
        mixtures = {path: Inputs(layer) for path, layer in block.named_modules() if type(layer) is MoE}
        if rows:
            seen = {path: Hessian(layouts[path], layer) for path, layer in layers.items()}
            for stream, delta in state:
                block(stream, delta, rotate, dense_attention)
        for path, inputs in mixtures.items():  # by the router before it is quantized
            for name, experts in _experts(block.get_submodule(path), scheme, inputs.taken()).items():
                install(block, f"{path}.{name}", experts)
        for path, layer in layers.items():
            packed = _packed(layer.weight, layouts[path], seen.get(path))
            install(block, path, packed)
        state = [block(stream, delta, rotate, dense_attention)[:2] for stream, delta in state]
        progress(index + 1, total)
    seen = None
    if rows:
        head, norm = torch.nn.Identity(), cast(Any, model.norm)
        seen = Hessian(scheme.layout("head"), head)
        for stream, delta in state:
            head(norm.add(delta, stream)[0])
    install(model, "head.weight", _packed(model.head_weight, scheme.layout("head"), seen))
    progress(total, total)


def sampled_rows(
    llm: LLM, count: int, length: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[list[int]]:
    """Calibration data sampled from the model itself (reproducible), for want of a text.

    Rows start with the beginning of a text, and every other one, if there is a chat template, with that of a user's
    message: the model writes the question and the answer (Magpie). An end of text does not end a row.
    """
    tokenizer, starts = llm.tokenizer, [[0]]
    if tokenizer is not None:
        special = tokenizer.special
        begin = special.ids.get(special.bos or "", tokenizer.eos_id)
        starts = [tokenizer.prefix_ids or [begin or 0]]
        if tokenizer.chat_template:
            starts.append(encode_chat(tokenizer, [{"role": "user", "content": ""}], continue_last=True))
    starts = [start[: length // 2] for start in starts]
    prompts = [starts[row % len(starts)] for row in range(count)]
    asked = [
        llm.submit(prompt, SamplingParams(length - len(prompt), top_p=0.9, ignore_eos=True, seed=row))
        for row, prompt in enumerate(prompts)
    ]
    rows = []
    for prompt, generation in zip(prompts, asked):
        rows.append([*prompt, *generation.result().token_ids])
        progress(len(rows), count)
    return rows


class Inputs:
    """Forward hook that records a layer's inputs, as rows."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.parts: list[Tensor] = []
        self.hook = layer.register_forward_pre_hook(lambda _, inputs: self.parts.append(inputs[0].flatten(0, -2)))

    def taken(self) -> Tensor | None:
        self.hook.remove()
        return torch.cat(self.parts) if self.parts else None


def _experts(moe: Any, scheme: Scheme, x_TC: Tensor | None) -> dict[str, PackedExperts]:
    """Quantize a layer's experts, each calibrated on the tokens routed to it."""
    c, options = moe.config, routing_options(moe.config)
    activation, up, down = options.pop("activation"), scheme.layout("ffn.up"), scheme.layout("ffn.down")
    chosen_TE = None
    if x_TC is not None:
        choice = {"choice_bias": moe.choice_bias} if moe.choice_bias is not None else {}
        _, experts_TK, _ = route(moe.router(x_TC), c.experts_per_token, **options, **choice)
        chosen_TE = torch.zeros(len(x_TC), c.n_experts, dtype=torch.bool).scatter_(1, experts_TK, True)
    none = [None] * c.n_experts
    biases = none if moe.b_gate_up is None else moe.b_gate_up
    found: dict[str, list[PackedWeight]] = {"w_gate_up": [], "w_down": []}
    for e, (w_gate_up, bias, w_down) in enumerate(zip(moe.w_gate_up, biases, moe.w_down)):
        before, between = Hessian(up), Hessian(down)
        if chosen_TE is not None and x_TC is not None and chosen_TE[:, e].any():
            rows_NC = x_TC[chosen_TE[:, e]]
            before.add(rows_NC)
            between.add(swiglu_packed(linear(rows_NC, w_gate_up, bias), activation))
        found["w_gate_up"].append(_packed(w_gate_up, up, before))
        found["w_down"].append(_packed(w_down, down, between))
    return {name: PackedExperts(weights) for name, weights in found.items()}


def _packed(weight: Tensor, layout: Layout, seen: Hessian | None) -> PackedWeight:
    return pack(weight, layout, None if seen is None else seen.feedback())
