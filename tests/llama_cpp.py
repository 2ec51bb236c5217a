"""llama.cpp as the judge of the GGUF files we write: the prebuilt one of the package `xllamacpp`."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch


class LlamaCpp:
    """A model file in llama.cpp, its keys and values in float32."""

    def __init__(self, path: Path, context: int = 64) -> None:
        peer = pytest.importorskip("xllamacpp")
        params = peer.CommonParams()
        params.model.path, params.n_ctx, params.warmup, params.verbosity = str(path), context, False, -1
        params.cpuparams.n_threads = 1
        params.cache_type_k = params.cache_type_v = peer.ggml_type.GGML_TYPE_F32
        self.server = peer.Server(params)
        self.generate([0], 0)  # its loop has begun: one that is told to end before that waits for itself forever

    def tokenize(self, text: str) -> list[int]:
        return self._ask("/tokenize", content=text, add_special=False)["tokens"]

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The greedy continuation of a prompt."""
        return self._ask("/completion", prompt=ids, n_predict=count, return_tokens=True)["tokens"]

    def log_probs(self, ids: list[int], vocab_size: int) -> torch.Tensor:
        """Log-probabilities of the token after a prompt; NaN where it tells none."""
        plain = self.tokenize("e")[0]  # chosen in any case: of half a character it tells nothing
        found = self._ask("/completion", prompt=ids, n_predict=1, n_probs=vocab_size, logit_bias=[[plain, 1e4]])
        result = torch.full((vocab_size,), float("nan"))
        for entry in found["completion_probabilities"][0]["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result

    def _ask(self, path: str, **body) -> dict:
        data = json.dumps({"temperature": 0, "cache_prompt": False, **body}).encode()
        request = urllib.request.Request(self.server.listening_address + path, data)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
