"""Reference BPE in pure Python: test oracle and fallback of the C++ extension.

Training: count the distinct words; look at every word as a sequence of bytes; find the most frequent pair of
neighbors; make it a token; replace it everywhere; repeat. Two ideas keep that from being quadratic. An index from each
pair to the words that hold it means that a merge touches only those words. And a lazy heap finds the next pair: entries
are allowed to go stale, and one that is popped with an outdated count is pushed back with the true one. (A pair's count
grows only in the step that creates its newer half; after that it only falls, so no entry is ever too low.)

Encoding: start from a word's bytes and apply the earliest learned merge that fits, leftmost first, until none does.
With the candidates in a heap and the pieces in a linked list that is n log n in the length of the word.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from .byte_alphabet import HF_ORDER
from .patterns import Pattern, safe_cut, split
from .sources import Corpus, documents, read_pieces, size_of
from .specials import SpecialTokens, cut_stream, finder

Merges = list[tuple[bytes, bytes]]
WordCounts = dict[bytes, int]
Progress = Callable[[int, int], None]

_CACHE_LIMIT = 1 << 16


def count_words(
    corpus: Corpus, pattern: Pattern, specials: Iterable[str] = (), reading: Progress | None = None
) -> WordCounts:
    """Count the distinct pieces of a corpus: all that BPE training needs to know about it."""
    done, total = 0, size_of(corpus) if reading else 0
    cut = partial(safe_cut, pattern=pattern)
    special = SpecialTokens({token: number for number, token in enumerate(dict.fromkeys(specials))})
    find = finder(frozenset(special.ids))
    counts: Counter[str] = Counter()
    for document in documents(corpus):
        pieces = read_pieces(document) if isinstance(document, Path) else [document]
        for block, _ in cut_stream(pieces, special, special.ids, cut, 1 << 20):
            for stretch in find.split(block):
                counts.update(split(stretch, pattern))
            done += len(block.encode()) if reading else 0
            if reading:
                reading(done, total)
    return {word.encode(): count for word, count in counts.items()}


def tie_key(ties: str) -> Callable[[bytes, int], object]:
    """Tie-break among equally frequent pairs: a key of each half (its bytes, its id); the smallest pair of keys wins.

    `bytes` prefers the lexicographically greatest bytes, `ids` the smallest ids, and `hf` the smallest ids too, with
    single bytes in the order in which Hugging Face's byte alphabet lists them.
    """
    if ties == "bytes":
        return lambda token, _: (*(255 - byte for byte in token), 256)
    if ties == "ids":
        return lambda _, token_id: token_id
    if ties == "hf":
        return lambda _, token_id: HF_ORDER[token_id] if token_id < 256 else token_id
    raise ValueError(f'ties is {ties!r}; it must be "bytes", "hf" or "ids"')


class PairCounts:
    """Frequencies of adjacent token pairs over all words, updated as pairs are merged."""

    def __init__(self, counts: WordCounts) -> None:
        self.words, self.weights = [list(word) for word in counts], list(counts.values())
        self.counts: Counter[tuple[int, int]] = Counter()
        self.words_of: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for index, word in enumerate(self.words):
            for pair in itertools.pairwise(word):
                self.counts[pair] += self.weights[index]
                self.words_of[pair].add(index)

    def merge(self, pair: tuple[int, int], new: int) -> set[tuple[int, int]]:
        """Replace a pair by a new token in every word; return the pairs that this creates."""
        made: set[tuple[int, int]] = set()
        for index in self.words_of.pop(pair):
            before, after = self.words[index], merge_pair(self.words[index], pair, new)
            self.words[index] = after
            for old in itertools.pairwise(before):
                self.counts[old] -= self.weights[index]
            for fresh in itertools.pairwise(after):
                self.counts[fresh] += self.weights[index]
                if new in fresh:
                    made.add(fresh)
                    self.words_of[fresh].add(index)
        self.counts[pair] = 0
        return made


def train_merges(
    counts: WordCounts,
    num_merges: int,
    ties: str = "bytes",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    progress: Progress | None = None,
) -> Merges:
    """Train BPE: learn merges from word counts, in order."""
    rank = tie_key(ties)
    tokens = [bytes([byte]) for byte in range(256)]
    pairs = PairCounts(counts)

    def entry(pair: tuple[int, int]) -> tuple:
        left, right = pair
        return -pairs.counts[pair], rank(tokens[left], left), rank(tokens[right], right), pair

    heap = [entry(pair) for pair in pairs.counts]
    heapq.heapify(heap)
    merges: Merges = []
    while heap and len(merges) < num_merges:
        negative, *_, pair = heapq.heappop(heap)
        count = pairs.counts[pair]
        if count < max(min_frequency, 1):
            continue
        if count != -negative:
            heapq.heappush(heap, entry(pair))
            continue
        left, right = tokens[pair[0]], tokens[pair[1]]
        if max_token_length is not None and len(left) + len(right) > max_token_length:
            continue
        tokens.append(left + right)
        merges.append((left, right))
        for made in pairs.merge(pair, len(tokens) - 1):
            heapq.heappush(heap, entry(made))
        if progress:
            progress(len(merges), num_merges)
    return merges


def merge_pair(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace each occurrence of the pair in a word, leftmost first, by `new`."""
    out: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


class PythonBPE:
    """Pure-Python BPE encoder and decoder, equal to `warploom._tokenizer.BPE`."""

    def __init__(
        self,
        vocab: dict[bytes, int],
        merges: Merges,
        pattern: Pattern,
        whole_words: bool,
        byte_tokens: dict[int, int] | None = None,
    ) -> None:
        """With `byte_tokens`, words start from characters, and from these for characters that are no tokens."""
        self.pattern = pattern
        self.whole_words = vocab if whole_words else {}
        self.characters = None if byte_tokens is None else vocab
        self.byte_ids = [vocab.get(bytes([byte])) for byte in range(256)]
        if byte_tokens is not None:
            self.byte_ids = [byte_tokens.get(byte) for byte in range(256)]
        self.ranks: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (left, right) in enumerate(merges):
            self.ranks.setdefault((vocab[left], vocab[right]), (rank, vocab[left + right]))
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text."""
        text.encode()  # a lone surrogate is an error
        ids: list[int] = []
        cache = self._cache
        for piece in split(text, self.pattern):
            word = cache.get(piece)
            if word is None:
                word = self.encode_word(piece.encode())
                if len(cache) >= _CACHE_LIMIT:
                    cache.clear()
                if len(piece) < 64:
                    cache[piece] = word
            ids += word
        return ids

    def encode_word(self, word: bytes) -> list[int]:
        """Encode one pretokenizer piece."""
        if word in self.whole_words:
            return [self.whole_words[word]]
        ids = self._first_ids(word)
        after = list(range(1, len(ids) + 1))  # a linked list over positions; a merged position holds id -1
        before = list(range(-1, len(ids) - 1))
        ranks = self.ranks
        heap = [(ranks[pair][0], i, pair) for i, pair in enumerate(itertools.pairwise(ids)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = after[i]
            if j == len(ids) or (ids[i], ids[j]) != pair:
                continue
            ids[i], ids[j] = ranks[pair][1], -1
            after[i] = after[j]
            if after[i] < len(ids):
                before[after[i]] = i
                self._offer(heap, i, (ids[i], ids[after[i]]))
            if before[i] >= 0:
                self._offer(heap, before[i], (ids[before[i]], ids[i]))
        return [token_id for token_id in ids if token_id >= 0]

    def _first_ids(self, word: bytes) -> list[int]:
        """Initial symbols of a word: its bytes or its characters."""
        if self.characters is None:
            return [token_id for byte in word if (token_id := self.byte_ids[byte]) is not None]
        ids: list[int] = []
        for character in map(str.encode, word.decode()):
            whole = self.characters.get(character)
            spelled = [self.byte_ids[byte] for byte in character] if whole is None else [whole]
            ids += [token_id for token_id in spelled if token_id is not None]
        return ids

    def _offer(self, heap: list, position: int, pair: tuple[int, int]) -> None:
        if pair in self.ranks:
            heapq.heappush(heap, (self.ranks[pair][0], position, pair))
