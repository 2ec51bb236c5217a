"""The settings of an `LLM` as a dataclass: what the command line and the server show as flags. Imports no torch."""

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
    """Options of a model to load, and how to run it."""

    model: str
    """The model directory."""
    device: str | None = None
    """Device: auto, cpu, cuda, cuda:0, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Number format of weights and cache; by default as stored."""
    max_batch: int | None = None
    """Most sequences computed together; by default 256 at most, as memory holds a quarter of the context for each."""
    kv_memory: int | None = None
    """Bytes for keys and values; by default what max_batch full contexts need, as far as memory goes."""
    page_size: int = 16
    """Tokens a page of the cache."""
    quantize: Literal["int8", "int4", "fp8"] | None = None
    """Keep weights in 8 bits, 4 (on a CPU) or fp8 (on a GPU); on a CPU, activations, keys and values are rounded to 8
    bits too. Without it, files that are quantized stay as they are."""
    kv_dtype: Literal["float32", "bfloat16", "float16", "int8", "fp8"] | None = None
    """Number format of keys and values; by default the model's, or as a rule int8 on a CPU with quantize."""
    max_batch_tokens: int | None = None
    """Most tokens computed in one step; by default so that nobody waits longer than 200 ms for the next token."""
    max_seq_len: int | None = None
    """Longest sequence to serve; by default the model's own limit."""
    ngram_draft_tokens: int = 0
    """Tokens to guess ahead by n-gram lookup; changes the speed, not the output."""
    draft_model: str | None = None
    """The directory of a smaller model of the same vocabulary that guesses ahead; changes the speed, not the output."""
    draft_tokens: int = 4
    """Tokens the draft model guesses ahead."""
    tensor_parallel: int = 1
    """Processes to spread the model over, each with a GPU of its own where there are GPUs."""
    batch_invariant: bool = True
    """A request's tokens do not depend on its company; False lets PyTorch multiply as it likes."""
    prefix_cache: bool = True
    """Reuse what is already computed of a prompt's beginning."""

    def check(self) -> None:
        """Refuse what is wrong whatever the model is."""
        refuse_below(1, **{name: getattr(self, name) for name in COUNTS})
        refuse_below(0, ngram_draft_tokens=self.ngram_draft_tokens)
        if self.ngram_draft_tokens and self.draft_model is not None:
            raise InputError("ngram_draft_tokens and draft_model are two ways to guess ahead: give one of them")

    def open(self, adapters: Mapping[str, str | Adapter] | None = None) -> LLM:
        """Load the model, and adapters of it by name."""
        watched = gc.isenabled()
        gc.disable()  # PyTorch brings a quarter of a million objects to stay: a tenth of its import is looking among
        try:
            from .llm import LLM  # them for garbage

            gc.freeze()
        finally:
            if watched:
                gc.enable()
        llm = LLM(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, adapters=adapters)
        if llm.packing:
            print(f"warploom: {llm.packing}", file=sys.stderr)
        return llm
