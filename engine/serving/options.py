"""Options of `LLM` as a dataclass, from which the flags of the CLI and server are made. Imports no torch."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import InputError, refuse_below

if TYPE_CHECKING:
    from ..formats.adapters import Adapter
    from .llm import LLM


COUNTS = ("max_batch", "page_size", "max_batch_tokens", "max_seq_len", "draft_tokens", "tensor_parallel")


@dataclass(frozen=True)
class LLMOptions:
    """Model to serve, and how to run it."""

    model: str
    """Model directory, GGUF file or Hub id."""
    device: str | None = None
    """Device: auto, cpu, cuda, cuda:0, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Dtype of weights and KV cache; by default as stored."""
    max_batch: int | None = None
    """Maximum sequences in a batch; by default as many as memory holds at a quarter of the context, at most 256."""
    kv_memory: int | None = None
    """KV cache size in bytes; by default enough for max_batch full contexts, as far as memory allows."""
    page_size: int = 16
    """Tokens in a page of the KV cache."""
    quantize: Literal["int8", "int4", "fp8"] | None = None
    """Quantize weights to int8, int4 (on a CPU) or fp8 (on a GPU); on a CPU, activations and KV cache are in 8 bits
    too. Without it, quantized files stay as they are."""
    kv_dtype: Literal["float32", "bfloat16", "float16", "int8", "fp8"] | None = None
    """Dtype of the KV cache; by default the model's, or on a CPU with quantize usually int8."""
    max_batch_tokens: int | None = None
    """Token budget of a step (chunked prefill); by default steps that others wait for take at most 200 ms."""
    max_seq_len: int | None = None
    """Maximum sequence length, prompt included; by default the model's own limit."""
    ngram_draft_tokens: int = 0
    """Speculative decoding by n-gram lookup: draft tokens a step; changes the speed, not the output."""
    draft_model: str | None = None
    """Speculative decoding by a smaller model of the same vocabulary (its directory); the output stays the same."""
    draft_tokens: int = 4
    """Draft tokens a step with draft_model."""
    tensor_parallel: int = 1
    """Tensor parallelism: processes to shard the model over, each with its own GPU where there are GPUs."""
    batch_invariant: bool = True
    """Batch invariance: a request's tokens do not depend on other requests; False uses PyTorch's own products."""
    prefix_cache: bool = True
    """Prefix caching: reuse the KV-cache pages of prompts that begin alike."""

    def check(self) -> None:
        """Check what can be checked without the model."""
        refuse_below(1, **{name: getattr(self, name) for name in COUNTS})
        refuse_below(0, ngram_draft_tokens=self.ngram_draft_tokens)
        if self.ngram_draft_tokens and self.draft_model is not None:
            raise InputError("ngram_draft_tokens and draft_model are two ways to guess ahead: give one of them")

    def open(self, adapters: Mapping[str, str | Adapter] | None = None) -> LLM:
        """Load the model with adapters by name."""
        watched = gc.isenabled()
        gc.disable()  # importing PyTorch makes a quarter of a million permanent objects; a tenth of the import
        try:
            from .llm import LLM  # would be spent on garbage collection

            gc.freeze()
        finally:
            if watched:
                gc.enable()
        llm = LLM(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, adapters=adapters)
        if llm.packing:
            print(f"warploom: {llm.packing}", file=sys.stderr)
        return llm
