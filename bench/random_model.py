"""Random-weight model for speed measurements."""

from pathlib import Path
from typing import Any


def save_random(config: Any, dtype: str, device: str, directory: Path, tokenizer: Any = None) -> None:
    """Write a model directory of random weights, the same for every contestant."""
    import torch

    from ..engine.formats.model_writer import save_model
    from ..engine.model import Transformer

    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config)
    save_model(model.to(getattr(torch, dtype)), directory, tokenizer)


def printable_tokenizer(config: Any) -> Any:
    """Tokenizer in which every token has printable text (pairs of characters), so that streams show each."""
    from ..tokenizer import BPETokenizer

    pairs = [(bytes([a]), bytes([b])) for a in range(33, 127) for b in range(33, 127)][: config.vocab_size - 256]
    tokens = [*(bytes([byte]) for byte in range(256)), *(a + b for a, b in pairs)]
    return BPETokenizer({token: number for number, token in enumerate(tokens)}, pairs, None, "gpt2")
