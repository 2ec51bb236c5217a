"""BPE, character and word tokenizers; their file formats; streaming decode. Knows no torch.

tok = BPETokenizer.train("novel.txt", vocab_size=8_000)
ids = tok.encode("Call me Ishmael.")
assert tok.decode(ids) == "Call me Ishmael."
tok.save("model/")                     # tokenizer.json, which Hugging Face tools open too
tok = load_tokenizer("model/")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Tokenizer
    from .bpe import BPETokenizer
    from .errors import InputError
    from .files import load_tokenizer
    from .patterns import PATTERNS
    from .stream import StreamDecoder
    from .words import CharTokenizer, WordTokenizer

__all__ = [
    "PATTERNS",
    "BPETokenizer",
    "CharTokenizer",
    "InputError",
    "StreamDecoder",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
]

_HOMES = {
    "PATTERNS": "patterns",
    "BPETokenizer": "bpe",
    "CharTokenizer": "words",
    "InputError": "errors",
    "StreamDecoder": "stream",
    "Tokenizer": "base",
    "WordTokenizer": "words",
    "load_tokenizer": "files",
}


def __getattr__(name: str) -> Any:
    """Lazy import of public names: `errors` is imported where loading NumPy would take too long."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
