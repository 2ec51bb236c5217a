import json
from pathlib import Path

import numpy as np
import pytest


class ByteTokenizer:
    """The least a tokenizer can be: a token is a byte, and 256 ends a document."""

    vocab_size = 257

    def __init__(self):
        self.special_tokens = {"<|endoftext|>": 256}

    def save(self, directory):
        Path(directory, "tokenizer.json").write_text(json.dumps({"bytes": True}))

    def encode(self, text):
        return list(text.encode())

    def encode_batch_array(self, texts, threads=None):
        pieces = [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]
        return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])


@pytest.fixture
def byte_tokenizer():
    return ByteTokenizer()
