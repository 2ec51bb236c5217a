"""Page pool: allocator of KV-cache pages with reference counts, copy-on-write and a prefix cache (LRU).

The cache of a sequence is cut into pages of `page_size` tokens, and a sequence holds a list of page numbers. That one
indirection buys four things:

* no fragmentation: any free page serves any sequence, and a sequence wastes at most one page;
* sharing: a page has a reference count, so forks (`n`, beams) hold the same pages and copy one only when they are about
  to write into it (copy-on-write);
* prefix caching: a full page is *published* under the exact text it holds. A later request that starts with the same
  text takes the page instead of computing it. A released page stays published until its memory is needed;
* LRU eviction: released pages form a doubly linked list threaded through the records themselves. The front is the least
  recently used; taking a page out of the middle (a prefix hit) is O(1).

A published page is found by its chain: its key is (the chain number of the page before it, its own tokens), and the
predecessor of a first page is the salt. Hashing that key costs one page whatever the length of the text before it, and
since a dict compares keys on a hit, and chain numbers are never reused, a hit is exact: no crafted hash collision can
hand one tenant another tenant's cache. A sequence releases its pages last to first, so children are forgotten before
their parents. Every operation is O(1) a page. Nothing here knows torch: pages are numbers.
"""

from collections.abc import Hashable, Iterable, Sequence
from itertools import count

Key = tuple[Hashable, tuple[int, ...]]


class _Page:
    """Record of a page, and its links in the list of free pages."""

    __slots__ = ("chain", "key", "newer", "number", "older", "references")

    def __init__(self, number: int):
        self.number = number
        self.references = 0
        self.key: Key | None = None  # under which it is published
        self.chain = 0
        self.older: _Page = self
        self.newer: _Page = self


class PagePool:
    """Pool of `num_pages` pages of `page_size` tokens, with reference counts and a prefix cache."""

    def __init__(self, num_pages: int, page_size: int = 16, cache_prefixes: bool = True):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool needs num_pages >= 1 and page_size >= 1, got {num_pages} and {page_size}")
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_free = 0
        self._cache_prefixes = cache_prefixes
        self._published: dict[Key, _Page] = {}
        self._chains = count(1)
        self._ring = _Page(-1)  # ring.newer is the oldest free page, ring.older the most recently freed
        self._pages = [_Page(number) for number in range(num_pages)]
        for page in self._pages:
            self._append_free(page)

    def pages_for(self, tokens: int) -> int:
        """Number of pages that `tokens` tokens need."""
        return -(-tokens // self.page_size)

    def allocate(self) -> int | None:
        """Allocate a page (evicting the least recently used cached one); None if all are in use."""
        if not self.num_free:
            return None
        page = self._ring.newer
        self._unlink_free(page)
        self._forget(page)
        page.references = 1
        return page.number

    def retain(self, pages: Iterable[int]) -> None:
        """Add a reference to each of these pages."""
        for number in pages:
            page = self._pages[number]
            assert page.references > 0, f"page {number} is free and cannot be shared"
            page.references += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference to each of these pages; free ones stay in the prefix cache until evicted."""
        for number in reversed(pages):
            page = self._pages[number]
            assert page.references > 0, f"page {number} was released more often than held"
            page.references -= 1
            if not page.references:
                self._append_free(page)

    def make_writable(self, number: int) -> bool:
        """Return whether the caller holds the only reference and may write into the page; if so, it leaves the prefix
        cache. Otherwise copy it (copy-on-write)."""
        page = self._pages[number]
        if page.references > 1:
            return False
        self._forget(page)
        return True

    def forget(self) -> None:
        """Clear the prefix cache, after weights have changed."""
        for page in list(self._published.values()):
            self._forget(page)

    def match(self, tokens: Sequence[int], salt: Hashable = None) -> tuple[list[int], Hashable]:
        """Prefix lookup: the longest run of cached pages that `tokens` starts with (retained), and their chain."""
        found: list[int] = []
        chain = self.root(salt)
        wanted = len(tokens) // self.page_size
        while len(found) < wanted and (page := self._published.get(self._key(chain, tokens, len(found)))):
            if not page.references:
                self._unlink_free(page)
            page.references += 1
            found.append(page.number)
            chain = page.chain
        return found, chain

    def publish(self, number: int, chain: Hashable, tokens: Sequence[int], index: int) -> Hashable:
        """Put a computed page, the `index`-th of `tokens`, into the prefix cache behind `chain`; return its chain."""
        key = self._key(chain, tokens, index)
        if known := self._published.get(key):
            return known.chain  # another sequence published the same text first: its page stays the cached one
        page = self._pages[number]
        assert page.references > 0 and page.key is None, f"page {number} cannot be published"
        page.chain = next(self._chains)
        if self._cache_prefixes:
            page.key = key
            self._published[key] = page
        return page.chain

    def published(self) -> list[tuple[int, Hashable, Key]]:
        """Cached pages without a reference, most recently used first (parents first): (number, chain, key)."""
        found, page = [], self._ring.older
        while page is not self._ring:
            if page.key is not None:
                found.append((page.number, page.chain, page.key))
            page = page.older
        return found

    def root(self, salt: Hashable = None) -> Hashable:
        """Chain of the empty prefix for a salt."""
        return ("salt", salt)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given the page lists of everyone who holds pages. For tests; O(pool)."""
        expected = [0] * self.num_pages
        for pages in holders:
            for number in pages:
                expected[number] += 1
        assert [page.references for page in self._pages] == expected, "reference counts disagree with the holders"
        free, page = [], self._ring.newer
        while page is not self._ring:
            free.append(page.number)
            assert page.newer.older is page and page.older.newer is page
            page = page.newer
        assert sorted(free) == [number for number, references in enumerate(expected) if not references]
        assert len(free) == self.num_free
        assert all(self._published[key] is page and page.key == key for key, page in self._published.items())

    def _key(self, chain: Hashable, tokens: Sequence[int], index: int) -> Key:
        return chain, tuple(tokens[index * self.page_size : (index + 1) * self.page_size])

    def _forget(self, page: _Page) -> None:
        if page.key is not None:
            del self._published[page.key]
            page.key = None

    def _append_free(self, page: _Page) -> None:
        newest = self._ring.older
        page.older, page.newer = newest, self._ring
        newest.newer = self._ring.older = page
        self.num_free += 1

    def _unlink_free(self, page: _Page) -> None:
        page.older.newer, page.newer.older = page.newer, page.older
        page.older = page.newer = page
        self.num_free -= 1
