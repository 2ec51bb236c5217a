"""BPE, character and word tokenizers; their file formats; streaming decode. Knows no torch.

tok = BPETokenizer.train("novel.txt", vocab_size=8_000)
ids = tok.encode("Call me Ishmael.")
assert tok.decode(ids) == "Call me Ishmael."
tok.save("model/")                     # tokenizer.json, which Hugging Face tools open too
tok = load_tokenizer("model/")
"""

from .base import Tokenizer
from .bpe import BPETokenizer
from .files import load_tokenizer
from .patterns import PATTERNS
from .stream import StreamDecoder
from .words import CharTokenizer, WordTokenizer

__all__ = [
    "PATTERNS",
    "BPETokenizer",
    "CharTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
]
