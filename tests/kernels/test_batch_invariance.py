"""Batch invariance of paged attention: a row has the same bits however its sequence was cut and whoever is beside it.

Interpreted, this proves the arithmetic and its order; on a GPU, that one instruction does it.
"""

import random

import pytest
import torch

from warploom.kernels import Maker, backend, latent_attention, linear, linear_residual, paged_attention
from warploom.kernels.linear import SEGMENT, arrival_counters, segment_length
from warploom.kernels.paged_attention import filled_pages

from .device import DEVICE, pytestmark  # noqa: F401

PAGE = 16
ROWS = 9  # newest rows of a context that are compared


def sequences(contexts, K, G, D, dtype, kept=None):
    """Queries of the last ROWS tokens of each context, and the pages of all, in random order, and scales if they have
    8 bits."""
    generator = torch.Generator().manual_seed(sum(contexts))
    counts = [-(-c // PAGE) for c in contexts]
    order = torch.randperm(sum(counts), generator=generator).int().split(counts)
    table = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    for row, pages in zip(table, order):
        row[: len(pages)] = pages
    (k, v), scales = filled_pages(Maker(dtype, DEVICE, sum(contexts)), sum(counts), PAGE, K, (D, D), kept)
    queries = [torch.randn(min(ROWS, c), K * G, D, generator=generator).to(dtype) for c in contexts]
    return [q.to(DEVICE) for q in queries], k, v, table.to(DEVICE), scales


def attend(batch, q, k, v, table, scales, options, op=paged_attention):
    """One call for a batch of (sequence, first row, last row, context before its rows)."""
    rows = torch.cat([q[s][a:b] for s, a, b, _ in batch])
    lens = [[before + b for _, _, b, before in batch], [b - a for _, a, b, _ in batch]]
    lens = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in lens)
    with backend("triton"):
        out = op(rows, k, v, table[[s for s, *_ in batch]], *lens, **scales, **options)
    return out.split([b - a for _, a, b, _ in batch])


def drawn(seed):
    """The options and shapes of one trial."""
    r = random.Random(seed)
    options = {"window": r.choice([None, None, 1, 33, 100, 300, 700]), "softcap": r.choice([None, 3.0])}
    heads = r.choice([(1, 1), (1, 2), (2, 3)])
    if r.random() < 0.4:
        options["sinks"] = torch.randn(heads[0] * heads[1], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    contexts = [r.choice([r.randint(1, 40), r.randint(1, 2000), 256 * r.randint(1, 7) + r.randint(-1, 5)])]
    return r, options, heads, [*contexts, r.randint(1, 600), r.randint(1, 40)]


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.gpu
def test_row_any_cut_same_bits(seed):
    r, options, (K, G), contexts = drawn(seed)
    dtype = r.choice([torch.bfloat16, torch.bfloat16, torch.float32])
    width = 16 if DEVICE == "cpu" else r.choice([64, 128, 256])
    q, *cache = sequences(contexts, K, G, width, dtype, r.choice([None, None, torch.int8, torch.float8_e5m2]))
    n, before = len(q[0]), contexts[0] - len(q[0])
    (whole,) = attend([(0, 0, n, before)], q, *cache, options)

    cut = r.randint(0, n)
    pieces = [attend([(0, a, b, before)], q, *cache, options)[0] for a, b in ((0, cut), (cut, n)) if b > a]
    assert torch.equal(torch.cat(pieces), whole)

    some = sorted({0, n // 2, n - 1})
    decodes = [attend([(0, i, i + 1, before)], q, *cache, options)[0] for i in some]
    assert torch.equal(torch.cat(decodes), whole[some])

    company = [(s, 0, len(q[s]), contexts[s] - len(q[s])) for s in (1, 2)]
    for first in (0, n - 1):  # as a chunk and as a decode, in the middle of others
        batch = [company[0], (0, first, n, before), company[1]]
        assert torch.equal(attend(batch, q, *cache, options)[1], whole[first:])


def latents(rows, k, v, *lengths, **options):
    """Latent attention of 16 latent and 8 rotated columns."""
    return latent_attention(rows, rows[..., :8], k, v[..., :8], *lengths, scale=0.2, **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.gpu
def test_latent_row_any_cut_same_bits(seed):
    r = random.Random(seed)
    contexts, dtype = [r.choice([700, 257, 40]), 300], r.choice([torch.bfloat16, torch.float32])
    q, *cache = sequences(contexts, 1, r.choice([2, 16, 20]), 16, dtype, r.choice([None, torch.int8]))
    n, before, options = len(q[0]), contexts[0] - len(q[0]), {"window": r.choice([None, 33])}
    (whole,) = attend([(0, 0, n, before)], q, *cache, options, latents)
    beside = attend([(1, 0, 9, 291), (0, 0, 4, before), (0, 4, n, before)], q, *cache, options, latents)
    assert torch.equal(torch.cat(beside[1:]), whole)
    decodes = [attend([(0, i, i + 1, before)], q, *cache, options, latents)[0] for i in (0, n - 1)]
    assert torch.equal(torch.cat(decodes), whole[[0, n - 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.gpu
def test_split_channels_any_rows_same_bits(dtype):
    """A program for each segment or one for all, with a stream and without, and counters left as they were."""
    generator = torch.Generator().manual_seed(0)
    C, F = 2 * SEGMENT + 72, 40
    x, weight, bias, stream, norm = (
        torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
        for shape in ((257, C), (F, C), (F,), (257, F), (F,))
    )
    arrivals = arrival_counters(weight)

    def results(rows):
        own = stream[:rows].clone()
        joined = linear_residual(x[:rows], weight, own, norm, bias, arrivals=arrivals)
        return linear(x[:rows], weight, bias, arrivals=arrivals), own, *joined

    with backend("triton"):
        whole = results(257)
        assert torch.equal(linear(x[:3], weight, bias), whole[0][:3]), "with counters of its own"
        for rows in (1, 16, 17, 256):
            assert all(torch.equal(some, all_[:rows]) for some, all_ in zip(results(rows), whole))
    assert not arrivals.any()


def test_segment_length_follows_the_shape_alone():
    """64 programs where there would be few, and none of less than 256 channels; a wide weight is one sum."""
    assert [-(-C // segment_length(F, C)) for F, C in ((1024, 2048), (1024, 3072), (2048, 8192), (576, 1536))] == [
        4,
        4,
        2,
        6,
    ]
    assert segment_length(4096, 14336) == 14336 and segment_length(40, 300) == 512 and segment_length(0, 0) == SEGMENT
