"""GPT-2's byte alphabet: a printable character for every byte.

`vocab.json`, `merges.txt` and `tokenizer.json` are text, tokens are bytes, and half a character is no text. So each of
the 256 bytes gets a printable character: itself where it is one in Latin-1, otherwise the next one from U+0100 on.
A space becomes Ġ, a newline Ċ.
"""

from .errors import InputError

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))

BYTE_TO_CHAR = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}

# The place of each byte when the alphabet's characters are sorted, as Hugging Face's trainer numbers them.
HF_ORDER = [sorted(BYTE_TO_CHAR.values()).index(BYTE_TO_CHAR[byte]) for byte in range(256)]


def to_text(token: bytes) -> str:
    """Bytes → printable text."""
    return "".join(map(BYTE_TO_CHAR.__getitem__, token))


def to_bytes(text: str) -> bytes:
    """Printable text → bytes."""
    found = from_alphabet(text)
    if found is None:
        alien = next(char for char in text if char not in CHAR_TO_BYTE)
        raise InputError(f"token {text!r} holds {alien!r}, which is not in the byte alphabet")
    return found


def from_alphabet(text: str) -> bytes | None:
    """Printable text → bytes; None for text with other characters."""
    try:
        return bytes(map(CHAR_TO_BYTE.__getitem__, text))
    except KeyError:
        return None
