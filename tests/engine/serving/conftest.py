"""Small models and tokenizers for the tests of serving."""

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.model import Transformer
from warploom.tokenizer import CharTokenizer

VOCABULARY = 97
SHAPES = {
    "llama": {"n_kv_heads": 2},
    "qwen3": {"n_kv_heads": 2, "head_dim": 24, "qk_norm": True, "tie_embeddings": False},
    "mixtral": {"n_kv_heads": 2, "n_experts": 4, "d_ff": 64, "tie_embeddings": False},
    "gpt2": {"norm": "layernorm", "norm_eps": 1e-5, "position": "learned", "ffn": "gelu", "bias": True, "d_ff": 256},
}


def make_model(shape: str = "llama", dtype=torch.float32, seed: int = 0, **changes) -> Transformer:
    """A small model with random weights that is opinionated enough for its choices not to be ties."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}
    model = Transformer(ModelConfig(**{**sizes, **SHAPES[shape], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def model() -> Transformer:
    return make_model()


@pytest.fixture(scope="session")
def tiny_model():
    return make_model


@pytest.fixture(scope="session")
def tokenizer():
    letters = "".join(map(chr, range(32, 126)))
    return CharTokenizer.train([letters])
