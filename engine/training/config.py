"""Training configuration: one dataclass that defines the flags, the saved JSON and the defaults.

No torch is imported here, so that `warploom train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..config import ModelConfig, choices_of
from ..errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """Training run. `batch_size` counts the rows of one optimizer step over all micro-batches and processes, so the
    result does not depend on how they are divided."""

    data: str
    """A dataset directory (`warploom data`), a file, folder or glob of texts or of conversations, or 'stdlib'."""
    out: str = "runs/train"
    """Directory of the run: a model directory with its checkpoints, log and curves."""

    model: ModelConfig | dict[str, Any] | None = None
    """The architecture, or the fields in which it differs from `preset`. A vocab_size of 0 or none is the tokenizer's,
    and that of the preset for a tokenizer trained here."""
    preset: str = "llama-tiny"
    """Preset architecture to start from: llama-tiny, llama-characters, llama-15m, llama-110m, llama-1b, llama-8b,
    gpt2-124m, qwen3-0.6b, moe-tiny, mixtral-8x7b."""
    init_from: str | None = None
    """Model directory to fine-tune: the run starts from its weights."""
    tokenizer: str = "bpe"
    """For raw text: bpe, char or word (trained on the training split), or a directory with a tokenizer.json."""
    splits: tuple[float, ...] = (0.9, 0.1)
    """For raw text and conversations: shares of train, validation and test."""

    lora: int | None = None
    """Train an adapter of this rank instead of the weights of init_from (LoRA); out becomes a directory that PEFT
    opens."""
    lora_alpha: float | None = None
    """LoRA's alpha: the adapter's update is multiplied by alpha / rank; None = twice the rank."""
    lora_rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank) instead."""
    lora_targets: tuple[str, ...] = ()
    """Layers to adapt, by the last part of their published names, such as q_proj v_proj; none = all linear layers of
    the blocks except routers and experts."""
    lora_embeddings: bool = False
    """Also train the embedding and the head, whole (PEFT's modules_to_save)."""

    steps: int | None = None
    """Optimizer steps. With none of steps, epochs, tokens, minutes: 1000."""
    epochs: float | None = None
    """Passes over the training split, instead of steps."""
    tokens: int | None = None
    """Training tokens, instead of steps."""
    minutes: float | None = None
    """Wall-clock budget, instead of steps; the schedule stretches to fit. Not exactly reproducible."""
    batch_size: int = 16
    """Rows of one optimizer step, over all micro-batches and processes."""
    grad_accum_steps: int = 1
    """Gradient accumulation steps: micro-batches of one optimizer step; less memory, the same result. 0 = as few as fit
    into free memory."""
    context: int | None = None
    """Tokens a row; None = all the model reads, or with init_from as many as the longest document has, at most 1024."""
    order: Literal["auto", "random", "epochs", "sequential", "packed"] = "auto"
    """random = random windows; epochs, sequential = each window once an epoch, shuffled or in order; packed = whole
    documents that do not attend to each other. auto = packed for conversations, random for other text."""
    stride: int | None = None
    """Distance between windows for epochs and sequential; None = context, less = overlapping."""
    num_workers: int = 1
    """Threads that prefetch batches; does not change their order. 0 = none."""

    loss: Literal["cross_entropy", "dpo", "ipo"] = "cross_entropy"
    """cross_entropy of the next token; dpo or ipo for preference pairs (a row is then a pair)."""
    beta: float = 0.1
    """DPO's and IPO's beta: strength of the pull towards the starting weights."""

    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """adamw; muon (matrices orthogonalized, the rest adamw); sgd with 1/sqrt(t) decay."""
    lr: float = 2e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end; None = a tenth of lr."""
    warmup: int | None = None
    """Steps of linear warm-up from 0; None = a twentieth of the run, at most 500."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors never decay."""
    beta1: float = 0.9
    """AdamW's beta1: decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's beta2: decay of the mean squared gradient."""
    eps: float = 1e-8
    """AdamW's epsilon, added to the root of the mean squared gradient."""
    max_grad_norm: float = 1.0
    """Gradient clipping: maximum global norm of the gradients; 0 = no clipping."""
    label_smoothing: float = 0.0
    """Label smoothing: share of the target's probability that is spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the z-loss, log²Z, which keeps logits from drifting."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated and saved instead of them; 0 = off."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype of weights and activations; master weights stay float32. auto = bfloat16 where it is fast."""
    dp: int | None = None
    """Data-parallel replicas (under torchrun); None = the number of processes divided by fsdp, ep and tp."""
    fsdp: int = 1
    """FSDP: processes over which weights and optimizer state are sharded, each with rows of its own."""
    tp: int = 1
    """Tensor parallelism: processes over which heads, features and vocabulary are sharded, all with the same rows."""
    ep: int = 1
    """Expert parallelism: processes over which experts are sharded, each with rows of its own."""
    compile: bool = False
    """torch.compile each block."""
    activation_checkpointing: bool = False
    """Activation checkpointing: keep only each block's input, recompute the rest in backward; less memory, a third more
    compute."""
    seed: int = 0
    """Seed of initial weights, data order, dropout and samples."""

    save_every: int = 500
    """Steps between checkpoints; 0 = only at the end or when stopped."""
    keep_last: int = 2
    """Checkpoints to keep."""
    eval_every: int = 250
    """Steps between evaluations; 0 = only at the end."""
    eval_batches: int = 20
    """Batches one evaluation reads; 0 = the whole validation split."""
    sample_every: int = 0
    """Steps between samples of text; 0 = only at the end."""
    sample_prompt: str | None = None
    """Prompt of the samples; None = the start of the validation text, or its first conversation up to the answer."""
    sample_tokens: int = 64
    """Tokens of a sample; 0 = no samples."""
    log_every: int = 10
    """Steps between lines of the log."""
    max_nonfinite_steps: int = 10
    """Stop after this many steps in a row with NaN or infinity in loss or gradient; fewer are skipped and counted."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the package tensorboard)."""
    wandb: str | None = None
    """Also report to this Weights & Biases project (needs the package wandb)."""
    resume: bool = False
    """Continue from the last complete checkpoint in `out`; without one, start."""
    overwrite: bool = False
    """Replace a run that is already in `out`."""

    def __post_init__(self) -> None:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        _require(len(budgets) < 2, f"give one of steps, epochs, tokens and minutes, not {' and '.join(budgets)}")
        for words, (holds, names) in RANGES.items():
            for name in names:
                value = getattr(self, name)
                _require(value is None or holds(value), f"{name} must be {words}, not {value}")
        _require((self.min_lr or 0) <= self.lr, f"min_lr={self.min_lr} must be at most lr={self.lr}")
        _require(
            self.batch_size % (self.grad_accum_steps or 1) == 0,
            f"batch_size={self.batch_size} must be a multiple of grad_accum_steps={self.grad_accum_steps}",
        )
        _require(
            self.lora is None or self.init_from is not None,
            f"lora={self.lora} needs init_from (--from): an adapter belongs to a model",
        )
        _require(self.lora is None or self.tp == 1, f"lora={self.lora} cannot be cut by tp={self.tp}: use fsdp or dp")
        given = [name for name in LORA[1:] if getattr(self, name)]
        _require(self.lora is not None or not given, f"{', '.join(given)} is for an adapter: give lora, its rank")
        _require(
            self.loss == "cross_entropy" or self.init_from is not None,
            f"loss={self.loss} needs init_from (--from): the model whose preferences are tuned",
        )
        _require(not (self.resume and self.overwrite), "give one of resume and overwrite, not both")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {choices}, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


BUDGETS = ("steps", "epochs", "tokens", "minutes")
LORA = ("lora", "lora_alpha", "lora_rslora", "lora_targets", "lora_embeddings")
RANGES = {
    "more than 0": (
        lambda x: x > 0,
        (*BUDGETS, "batch_size", "context", "stride", "lr", "dp", "fsdp", "tp", "ep", "keep_last", "log_every",
         "max_nonfinite_steps", "lora", "lora_alpha", "beta"),
    ),
    "at least 0": (
        lambda x: x >= 0, ("grad_accum_steps", "num_workers", "min_lr", "warmup", "weight_decay", "eps",
        "max_grad_norm", "z_loss", "save_every",
         "eval_every", "eval_batches", "sample_every", "sample_tokens"),
    ),
    "in [0, 1)": (lambda x: 0 <= x < 1, ("beta1", "beta2", "label_smoothing", "ema")),
}  # fmt: skip
CHOICES = choices_of(TrainConfig)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)
