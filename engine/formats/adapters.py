"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

An adapter adds s·B·A to the weight W (outputs, inputs) of a linear layer: A (r, inputs) and B (outputs, r) hold few
numbers, s = alpha/r, or alpha/√r with rsLoRA (Hu et al., 2021; Kalajdzievski, 2023). Files name published layers, and a
weight of ours may pack several of them (q, k and v), in an order of its own. So a `LowRank` describes one weight: which
layers lie in it, row by row. It maps factors to the weight's update, and the weight's gradient to the factors':

    W' = W + s·B·A    dA = s·Bᵀ·dW'    dB = s·dW'·Aᵀ

Embedding and head may be trained whole (`modules_to_save`). What changes more than weights by such a product (DoRA,
biases, experts) is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError
from ..layers import Linear
from ..model import Transformer
from .families import weight_map
from .weights import first_line, read_json

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Options of PEFT's LoRA that make it another function than W + s·B·A."""
INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # others subtract what they begin with from the base
WHOLE = ("embedding.weight", "head.weight")
BASE_SAMPLE = "base_sample.json"
"""Beside PEFT's two files, which have no place for it: a few numbers of the base."""
ALIKE = 0.5  # correlation of such numbers: above 0.99 for a model in 4 bits, within ±0.3 for another model


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds a LoRA adapter instead of a model."""
    return (directory / CONFIG).is_file()


def factor_names(layer: str) -> tuple[str, str]:
    """Names of the tensors A and B (`lora_A`, `lora_B`) of a published layer."""
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA update of one weight of ours, which may pack several published layers (q, k and v)."""

    weight: str
    shape: tuple[int, int]
    layers: tuple[str, ...]
    """All that lie in it, adapted or not."""
    sizes: tuple[int, ...]
    order: Tensor | None
    """Permutation from their rows to ours."""

    def change(self, factors: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
        """Weight update s·B·A of all packed layers, in our row order; zero rows for layers without factors."""
        rows = []
        for layer, size in zip(self.layers, self.sizes):
            a, b = (factors.get(name) for name in factor_names(layer))
            if a is None:
                rows.append(next(iter(factors.values())).new_zeros(size, self.shape[1]))
            else:
                rows.append((b @ a).mul_(scales[layer]))
        change = torch.cat(rows)
        return change if self.order is None else change.index_select(0, self.order.to(change.device))

    def gradients(
        self, grad: Tensor, factors: Mapping[str, Tensor], scales: Mapping[str, float]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of the factors A and B, given the gradient of the weight (chain rule)."""
        if self.order is not None:
            grad = grad.index_select(0, self.order.argsort().to(grad.device))
        for layer, rows in zip(self.layers, grad.split(self.sizes)):
            name_a, name_b = factor_names(layer)
            if name_a in factors:
                a, b = factors[name_a], factors[name_b]
                yield name_a, (b.T @ rows).mul_(scales[layer])
                yield name_b, (rows @ a.T).mul_(scales[layer])


def low_rank_weights(config: ModelConfig, kind: str) -> list[LowRank]:
    """Weights that LoRA may adapt: all linear layers of the blocks except routers and experts."""
    with torch.device("meta"):
        blocks = Transformer(config).blocks
    found = []
    for path, module in blocks.named_modules():
        if type(module) is not Linear or path.endswith("router"):
            continue
        name = f"blocks.{path}.weight"
        (piece,) = weight_map(config, [name], kind)
        layers, shape = tuple(each.removesuffix(".weight") for each in piece.theirs), tuple(module.weight.shape)
        found.append(LowRank(name, shape, layers, piece.sizes or shape[:1], piece.order))
    return found


@dataclass(frozen=True)
class AdapterConfig:
    """Fields of `adapter_config.json` that decide what is computed."""

    base: str
    """The model it belongs to: a directory or a Hub id."""
    rank: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] = ()
    """Names, or last parts of names, of published layers."""
    saved: tuple[str, ...] = ()
    """Published modules that are trained whole."""
    alphas: tuple[tuple[str, float], ...] = ()
    """Layers by pattern whose alpha is another."""
    sample: tuple[float, ...] = ()
    """A few numbers of the base, in a file of their own."""

    def scale(self, layer: str, rank: int) -> float:
        """Scale s of a layer: alpha / rank, or alpha / √rank with rsLoRA; `alpha_pattern` applies."""
        alpha = next((alpha for pattern, alpha in self.alphas if _matches(pattern, layer)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def to_peft(self, transposed: bool) -> dict[str, Any]:
        """Convert to PEFT's LoraConfig; `transposed`: the family stores (inputs, outputs), as GPT-2 does."""
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.base, "r": self.rank,
            "lora_alpha": self.alpha, "use_rslora": self.rslora, "target_modules": list(self.targets),
            "modules_to_save": list(self.saved) or None, "fan_in_fan_out": transposed, "lora_dropout": 0.0,
            "bias": "none", "init_lora_weights": True, "inference_mode": True,
        }  # fmt: skip

    @staticmethod
    def read(directory: Path) -> AdapterConfig:
        """Read `adapter_config.json`; options that change the function (DoRA, biases …) are refused by name."""
        path = directory / CONFIG
        values = read_json(path)
        if values.get("peft_type") != "LORA":
            raise InputError(f"{path}: peft_type {values.get('peft_type')!r} is not supported, only 'LORA' is")
        for word in REFUSED:
            if values.get(word):
                raise InputError(f"{path}: {word}={values[word]!r} is not supported: only plain LoRA (and rslora) is")
        if values.get("bias", "none") != "none":
            raise InputError(f"{path}: bias={values['bias']!r} is not supported, only 'none' is")
        if values.get("init_lora_weights", True) not in INITS:
            raise InputError(
                f"{path}: init_lora_weights={values['init_lora_weights']!r} changes the base model: "
                f"save it with PEFT's path_initial_model_for_weight_conversion"
            )
        rank, alpha, base = values.get("r"), values.get("lora_alpha", 8), values.get("base_model_name_or_path")
        if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
            raise InputError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be numbers, r at least 1")
        if not isinstance(base, str) or not base:
            raise InputError(f"{path} names no base_model_name_or_path: write the directory of its model there")
        targets = values.get("target_modules") or ()
        return AdapterConfig(
            base, rank, alpha, bool(values.get("use_rslora")), (targets,) if isinstance(targets, str) else (*targets,),
            tuple(values.get("modules_to_save") or ()), tuple((values.get("alpha_pattern") or {}).items()),
        )  # fmt: skip


def _matches(pattern: str, layer: str) -> bool:
    """PEFT's rule: a pattern matches the end of a name, after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None


def choose_layers(weights: Iterable[LowRank], targets: tuple[str, ...]) -> list[str]:
    """Published layers whose names end in one of `targets` (all if there are none)."""
    layers = [layer for weight in weights for layer in weight.layers]
    for target in targets:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
            raise InputError(f"lora_targets has {target!r}, which is no linear layer of this model; there are: {known}")
    return [layer for layer in layers if not targets or layer.endswith(tuple(f".{target}" for target in targets))]


class Adapter:
    """A loaded LoRA adapter, its tensors checked against the shapes of the base model."""

    def __init__(self, directory: Path, config: ModelConfig, kind: str) -> None:
        self.config, path = AdapterConfig.read(directory), directory / TENSORS
        self.path = path
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in _read_tensors(path).items()}
        self.base_sample = _read_sample(directory / BASE_SAMPLE)
        weights = {weight.weight: weight for weight in low_rank_weights(config, kind)}
        self.whole = self._take_whole(tensors, config, kind)
        self.factors: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}
        for weight in weights.values():
            for layer, outputs in zip(weight.layers, weight.sizes):
                self._take_factors(tensors, layer, outputs, weight.shape[1])
        if tensors:
            raise InputError(
                f"{path} holds {next(iter(tensors))!r}, which its model {self.config.base} has no layer for"
            )
        if not self.factors and not self.whole:
            raise InputError(f"{path} holds no factors: nothing would be changed")
        self.weights = {
            name: weight for name, weight in weights.items() if any(layer in self.scales for layer in weight.layers)
        }

    def _take_factors(self, tensors: dict[str, Tensor], layer: str, outputs: int, inputs: int) -> None:
        names = factor_names(layer)
        found = [tensors.pop(name, None) for name in names]
        if all(tensor is None for tensor in found):
            return
        if any(tensor is None for tensor in found):
            raise InputError(f"{self.path} has only one of {' and '.join(names)}")
        a, b = (tensor.float() for tensor in found)
        wanted = (len(a), inputs), (outputs, len(a))
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise InputError(
                f"{self.path} is of another model than {self.config.base}: {layer} has factors of shape "
                f"{tuple(a.shape)} and {tuple(b.shape)}, and the model's layer is {outputs} by {inputs}"
            )
        self.factors |= zip(names, (a, b))
        self.scales[layer] = self.config.scale(layer, len(a))

    def _take_whole(self, tensors: dict[str, Tensor], config: ModelConfig, kind: str) -> dict[str, Tensor]:
        """Take embedding and head that were trained whole (`modules_to_save`); a tied head may be stored twice."""
        taken: dict[str, Tensor] = {}
        for name in WHOLE:
            (published,) = weight_map(config, [name], kind)[0].theirs
            found = tensors.pop(published, None)
            if found is None:
                continue
            if found.shape != (config.vocab_size, config.d_model):
                raise InputError(
                    f"{self.path} is of another model than {self.config.base}: {published} has shape "
                    f"{tuple(found.shape)}, the model's has {(config.vocab_size, config.d_model)}"
                )
            taken[name] = found
        if config.tie_embeddings and len(taken) == 2 and not torch.equal(*taken.values()):
            raise InputError(f"{self.path}: head and embedding differ, but {self.config.base} ties them")
        return taken

    def __contains__(self, name: str) -> bool:
        return name in self.weights or name in self.whole

    def check_base(self, base: str | os.PathLike, sample: Sequence[float]) -> None:
        """Refuse a different base model; the same one quantized or fine-tuned further passes."""
        ours, theirs = torch.tensor(self.base_sample), torch.tensor(sample)
        if len(ours) != len(theirs) or torch.cosine_similarity(ours, theirs, 0) < ALIKE:
            raise InputError(
                f"{self.path} was trained on another model than {base}: the sample of base weights saved with it "
                f"differs; use it with the model it was trained on, {self.config.base}"
            )

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The base's weight, in float32, with the adapter merged in."""
        if name in self.whole:
            return self.whole[name].to(weight)
        return weight + self.weights[name].change(self.factors, self.scales).to(weight.device)


def _read_sample(path: Path) -> list[float]:
    """Read the sample of base weights saved with the adapter; empty for adapters saved by PEFT itself."""
    if not path.is_file():
        return []
    try:
        return [float(number) for number in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no list of numbers: {first_line(error)}; without the file, no base is refused"
        ) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}: an adapter is both files, as PEFT saves them")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or cut short: {first_line(error)}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: tensor {name} holds NaN or infinity")
    return tensors
