"""SentencePiece BPE expressed as byte-level BPE.

A byte-level vocabulary starts from bytes; a SentencePiece one starts from characters, and from bytes (`<0x0A>`) for
characters it lacks. That is the same if *a character is a merge of its bytes that comes before all others*, so the
merge engine need not know the difference. Beginnings of characters that are left over, where the character itself is no
token, are written out as the bytes they are.

▁ (U+2581) stands for a space in its files. Here tokens hold the space, and a ▁ in a text is one too, as it is there.
There is no pre-tokenizer: a document would be one word. But hardly any merge joins a space to what stands before it,
and where none does, cutting before spaces changes nothing; the pattern "spaces" does.
"""

from dataclasses import dataclass
from typing import Literal

from .patterns import Pattern
from .reference import Merges

SPACE = "▁"
Symbol = int | None  # of a byte that has no token, None
Strip = Literal["never", "space", "token"]
WHOLE_TEXT = r"(?s:.)+"


@dataclass(frozen=True, slots=True)
class Metaspace:
    """SentencePiece's options beyond tokens and merges."""

    byte_tokens: dict[int, int]
    """The id of each byte's own token, by which a character that is no token is spelled."""
    prefix: Literal["never", "first", "always"] = "never"
    """Places that get a space in front: no text, of the text alone, or of what stands behind added tokens too."""
    if_missing: bool = False
    """Put the space only where there is none."""
    strip: Strip = "never"
    """Spaces that decoding takes away again: a leading space, or all spaces of the first token."""
    replaces: tuple[tuple[str, str], ...] = ()
    """Strings that are replaced in a text first, with what takes their place (ChatGLM)."""

    def puts_space(self, text: str, follows: str) -> bool:
        """Return whether a stretch of text gets a space in front (dummy prefix)."""
        if not text or self.prefix == "never" or follows == "text" or (self.prefix == "first" and follows == "added"):
            return False
        return not (self.if_missing and text[0] in (SPACE, " "))

    def normalize(self, text: str) -> str:
        """Apply the normalizer: spaces for ▁, and other replacements."""
        for old, new in self.replaces:
            text = text.replace(old, new)
        return text.replace(SPACE, " ")

    def opening(self, token: bytes) -> bytes:
        """Decode the first token of a text, which may lose its dummy-prefix space."""
        if self.strip == "token":
            return token.replace(b" ", b"")
        return token.removeprefix(b" ") if self.strip == "space" else token


def spell_piece(token: bytes) -> str:
    """A token as SentencePiece spells it (▁ for spaces)."""
    return token.decode().replace(" ", SPACE)


def bytes_of(vocab: dict[bytes, int], metaspace: Metaspace | None) -> list[int | None]:
    """Initial id of each byte, or None where it has none."""
    fallback = metaspace.byte_tokens if metaspace else {}
    own = 0x80 if metaspace else 0x100  # from there on a byte is no character
    return [vocab.get(bytes([byte]), fallback.get(byte)) if byte < own else fallback.get(byte) for byte in range(256)]


def character_merges(
    vocab: dict[bytes, int], byte_ids: list[int | None], first_id: int
) -> list[tuple[Symbol, Symbol, int]]:
    """Merges (left, right, result) that build every character of the vocabulary from its bytes.

    Beginnings of characters get ids from `first_id` on.
    """
    beginnings: dict[bytes, int] = {}
    merges: dict[tuple[Symbol, Symbol], int] = {}
    for token, token_id in vocab.items():
        if not 1 < len(token) <= 4 or not 0xC2 <= token[0] < 0xF5 or any(byte & 0xC0 != 0x80 for byte in token[1:]):
            continue
        left = byte_ids[token[0]]
        for end in range(2, len(token) + 1):
            whole = end == len(token)
            result = token_id if whole else beginnings.setdefault(token[:end], first_id + len(beginnings))
            merges[left, byte_ids[token[end - 1]]] = result
            left = result
    return [(left, right, result) for (left, right), result in merges.items()]


def pattern_for(merges: Merges, whole_words: bool) -> Pattern:
    """Pretokenizer pattern that may cut text without changing what these merges make of it."""
    before = {left[-1:] for left, right in merges if right[:1] == b" " and left.strip(b" ")}
    return "spaces" if before <= {b">"} and not whole_words else WHOLE_TEXT
