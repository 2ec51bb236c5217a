"""Evaluation of language modeling: loss, perplexity, bits per byte.

    loss            mean negative log-likelihood of a token, in nats
    perplexity      e^loss: as unsure as if choosing evenly among so many tokens
    bits per byte   loss in bits, spread over the bytes of text that the tokens stand for

Only bits per byte compares across tokenizers: a larger vocabulary makes tokens fewer and each harder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ... import kernels
from ..data.loader import IGNORE, Batch, Epochs, PackedDocuments, join
from ..data.pairs import PairBatch
from ..data.tokens import TokenData, TokenSplit
from ..errors import InputError
from ..generation import generate
from ..model import Transformer
from .preferences import preference_losses


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Evaluation result: mean loss and what follows from it."""

    loss: float
    bits_per_byte: float | None
    """None where tokens do not stand for bytes (a word tokenizer that drops what it does not know)."""
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def figures(self) -> dict[str, float | None]:
        """Metrics by name, as logged."""
        return {"val_loss": self.loss, "bits_per_byte": self.bits_per_byte}

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits}"


def token_bytes(tokenizer: Any) -> np.ndarray | None:
    """UTF-8 bytes of each token (0 for special tokens), for bits per byte; None if tokens are no pieces of bytes."""
    if tokenizer is None or not hasattr(tokenizer, "token_bytes"):
        return None
    special = set(getattr(tokenizer, "special_tokens", {}).values())
    try:
        return np.array([0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    except (NotImplementedError, ValueError, KeyError, AttributeError):
        return None


@torch.no_grad()
def evaluate(
    model: Transformer, batches: Iterable[Batch], bytes_of: np.ndarray | None = None, rows: int | None = None
) -> Evaluation:
    """Mean loss over every target of `batches`, in micro-batches of `rows`."""
    was_training = model.training
    model.eval()
    total, tokens, size = 0.0, 0, 0
    for batch in batches:
        counted = batch.targets_BT != IGNORE
        count = int(counted.sum())
        for start in range(0, len(batch.tokens_BT), rows or len(batch.tokens_BT)):
            part = batch.rows(start, start + (rows or len(batch.tokens_BT)))
            here = int((part.targets_BT != IGNORE).sum())
            total += float(losses(model, part.to(model.device)).cross_entropy) * here
        tokens += count
        if bytes_of is not None:
            size += int(bytes_of[batch.targets_BT[counted].numpy()].sum())
    model.train(was_training)
    if not tokens:
        raise InputError("there is nothing to evaluate: the text has no token with a successor")
    mean = total / tokens
    return Evaluation(mean, total / math.log(2) / size if size else None, tokens)


def losses(model: Transformer, batch: Batch, **options: float):
    """Losses of the model on a batch; packed documents do not attend to each other."""
    if isinstance(batch, PairBatch):
        return preference_losses(model, batch)
    if batch.cu_seqlens is None:
        return model.losses(batch.tokens_BT, batch.targets_BT, **options)
    flat = (1, batch.tokens_BT.numel())
    return model.losses(
        batch.tokens_BT.view(flat),
        batch.targets_BT.view(flat),
        positions=batch.positions_BT.view(flat),
        attend=within_documents(batch.cu_seqlens, batch.tokens_BT.shape[1]),
        **options,
    )


def within_documents(cu_seqlens: torch.Tensor, longest: int):
    """Variable-length causal `attend` for packed documents (block-diagonal mask by `cu_seqlens`)."""

    def attend(q_1NHD, k_1NKD, v_1NKD, layer):
        o_NHD = kernels.attention(
            q_1NHD[0], k_1NKD[0], v_1NKD[0], window=layer.window, softcap=layer.softcap, scale=layer.scale,
            cu_seqlens=cu_seqlens, max_seqlen=longest,
        )  # fmt: skip
        return o_NHD[None]

    return attend


def validation_split(data: TokenData) -> TokenSplit | None:
    """The validation split, or None if there is none to evaluate on."""
    split = data.split("val") if "val" in data.meta.splits else None
    return split if split is not None and len(split) >= 2 else None


def sample_prompt(split: TokenSplit) -> list[int]:
    """Prompt for samples: the start of a split; for conversations, the first one up to its first answer."""
    if split.learn is None:
        return [int(token) for token in np.asarray(split.tokens[:16])]
    first = np.asarray(split.learn[: split.starts[1] if len(split.starts) > 1 else len(split)])
    return [int(token) for token in np.asarray(split.tokens[: max(1, int(first.argmax()))])]


def write_sample(
    model: Transformer, tokenizer: Any, prompt: list[int], tokens: int, seed: int, stop: Sequence[int] = ()
) -> tuple[str, str]:
    """Generate a sample at temperature 0.8: (text of the prompt, text of the continuation)."""
    was_training = model.training
    model.eval()
    drawn = generate(model, prompt, tokens, temperature=0.8, seed=seed, stop=stop)
    drawn = [
        token for token in drawn if token < tokenizer.vocab_size
    ]  # a table may have more rows than there are tokens
    model.train(was_training)
    return tokenizer.decode(prompt), tokenizer.decode(drawn)


def validation_batches(split: TokenSplit, batch_size: int, context: int, limit: int = 0) -> Iterable[Batch]:
    """Every window of a split in order, or `limit` batches spread evenly over it; the last one may be short.

    Conversations are packed instead, as in training.
    """
    packed = split.learn is not None
    context = context if packed else min(context, len(split) - 1)
    if context < 1:
        return
    windows = (PackedDocuments if packed else Epochs)(split, 1, context, shuffle=False)
    count = windows.count(0)
    numbers = np.arange(count)
    if limit and count > limit * batch_size:
        numbers = np.linspace(0, count - 1, limit * batch_size).astype(int)
    for start in range(0, len(numbers), batch_size):
        yield join([windows.batch(int(number)) for number in numbers[start : start + batch_size]])
    rest = count * context
    if not limit and not packed and rest < len(split) - 1:
        tail = torch.from_numpy(np.asarray(split.tokens[rest:], np.int64))[None]
        yield Batch(tail[:, :-1], tail[:, 1:])
