"""Data pipeline: raw text or conversations → token files → batches."""

from .corpus import Corpus
from .loader import Batch, Epochs, PackedDocuments, RandomWindows, get_batch, open_loader, prefetch
from .sources import open_corpus
from .tokens import TokenData, TokenSplit, text_of, write_token_data

__all__ = [
    "Batch",
    "Corpus",
    "Epochs",
    "PackedDocuments",
    "RandomWindows",
    "TokenData",
    "TokenSplit",
    "get_batch",
    "open_corpus",
    "open_loader",
    "prefetch",
    "text_of",
    "write_token_data",
]
