"""Inference engine: requests, continuous batching, paged KV cache, sampling, and the `LLM` facade.

`scheduling/`, `sampling_params` and `detokenizer` import no torch; the names below are loaded on first use.
"""

from .outputs import EngineError, Metrics, Output, Piece
from .sampling_params import SamplingParams

__all__ = ["LLM", "EngineError", "Metrics", "Output", "Piece", "SamplingParams"]


def __getattr__(name: str):
    if name == "LLM":
        from .llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
