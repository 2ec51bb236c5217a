"""Claims about the page pool."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from warploom.engine.serving.scheduling.page_pool import PagePool


def compute(pool: PagePool, tokens: list[int], salt=None) -> list[int]:
    """What a sequence does: take the pages that match, compute and publish the others."""
    pages, chain = pool.match(tokens, salt)
    for index in range(len(pages), len(tokens) // pool.page_size):
        pages.append(pool.allocate())
        chain = pool.publish(pages[index], chain, tokens, index)
    return pages


def test_page_pool_released_prefix_found_again():
    """A released prefix is found again and only by the same text."""
    pool = PagePool(8, page_size=2)
    pages = compute(pool, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    assert pool.num_free == 8
    assert pool.match([1, 2, 3, 4, 9, 9])[0] == pages[:2]
    assert pool.match([3, 4, 5, 6])[0] == [], "a page in the middle of a text is not a prefix"
    assert pool.match([1, 2, 3])[0] == pages[:1], "only full pages are shared"


def test_another_salt_never_shares_a_page():
    pool = PagePool(8, page_size=2)
    pool.release(compute(pool, [1, 2, 3, 4], salt="alice"))
    assert pool.match([1, 2, 3, 4], salt="bob")[0] == []
    assert len(pool.match([1, 2, 3, 4], salt="alice")[0]) == 2


def test_colliding_hashes_do_not_share_a_page():
    pool = PagePool(4, page_size=1)
    twin = 2**61 - 1 + 5  # hash(twin) == hash(5)
    assert hash((twin,)) == hash((5,))
    pool.release(compute(pool, [5]))
    assert pool.match([twin])[0] == []


def test_page_pool_evicts_oldest_ends_first():
    """The least recently used pages and the ends of texts are forgotten first."""
    pool = PagePool(6, page_size=1)
    pool.release(compute(pool, [1, 2, 3]))
    pool.release(compute(pool, [4, 5, 6]))
    pool.release(compute(pool, [1, 2, 3]))  # used again: now 4, 5, 6 is the oldest
    taken = [pool.allocate() for _ in range(4)]
    found, _ = pool.match([1, 2, 3])
    assert len(found) == 2 and pool.match([4, 5, 6])[0] == []
    pool.release(found + taken)


def test_page_pool_empty_says_so():
    """An empty pool says so and release returns the page."""
    pool = PagePool(1)
    page = pool.allocate()
    assert pool.allocate() is None
    pool.release([page])
    assert pool.allocate() == page
    with pytest.raises(ValueError, match="num_pages >= 1"):
        PagePool(0)


@settings(max_examples=150)
@given(st.data(), st.integers(1, 12), st.integers(1, 3))
def test_no_order_of_operations_leaks_or_shares_wrongly(data, num_pages, page_size):
    pool = PagePool(num_pages, page_size)
    holders: list[list[int]] = []
    texts = {}  # what each page holds, by our own account
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["start", "fork", "release"]))
        if action == "start":
            tokens = data.draw(st.lists(st.integers(0, 1), max_size=8))
            pages, chain = pool.match(tokens)
            assert [texts[page] for page in pages] == [tuple(tokens[: (i + 1) * page_size]) for i in range(len(pages))]
            for index in range(len(pages), len(tokens) // page_size):
                if (page := pool.allocate()) is None:
                    break
                pages.append(page)
                texts[page] = tuple(tokens[: (index + 1) * page_size])
                chain = pool.publish(page, chain, tokens, index)
            holders.append(pages)
        elif holders:
            holder = data.draw(st.sampled_from(holders))
            if action == "fork":
                pool.retain(holder)
                holders.append(list(holder))
            else:
                pool.release(holder)
                holders.remove(holder)
        pool.check(holders)
    for holder in holders:
        pool.release(holder)
    assert pool.num_free == num_pages
