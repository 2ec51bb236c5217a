"""The output layer and its loss in tiles of rows, in bfloat16, held to the formula in float64."""

import pytest
import torch

from warploom import kernels
from warploom.kernels.cpu import head_loss
from warploom.kernels.cpu.pointwise import _native

SHAPE = torch.empty(600, 64, dtype=torch.bfloat16), torch.empty(160, 64, dtype=torch.bfloat16)
pytestmark = pytest.mark.skipif(not head_loss.fits(*SHAPE), reason="needs a CPU of AMD with avx512_bf16")


@pytest.fixture(autouse=True)
def slabs_of_256_rows(monkeypatch):
    monkeypatch.setattr(head_loss, "SLAB", 1)


def results(loss_of, dtype, options):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(x.shape, generator=generator).bfloat16().to(dtype) for x in SHAPE)
    weight *= 0.25
    targets = torch.randint(160, (600,), generator=generator)
    targets[5:9] = -100
    options = {name: x[:600] if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = loss_of(*leaves, targets, **options)
    loss.sum().backward()
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"},
        {"reduction": "none", "weights": torch.linspace(-1, 2, 600)},
    ],
    ids=["mean", "sum with all options", "a weighted loss a row"],
)
def test_head_loss_as_exact_as_its_formula(options, monkeypatch):
    seen = []
    walk = head_loss.walk
    monkeypatch.setattr(head_loss, "walk", lambda *args: seen.append(1) or walk(*args))
    exact = results(kernels.linear_cross_entropy.reference, torch.float64, options)
    formula = results(kernels.linear_cross_entropy.reference, torch.bfloat16, options)
    assert not seen
    ours = results(kernels.linear_cross_entropy, torch.bfloat16, options)
    assert seen
    for truth, theirs, mine in zip(exact, formula, ours):
        assert (mine - truth).norm() <= (theirs - truth).norm() + torch.finfo(torch.bfloat16).eps * truth.norm()


def test_head_loss_bits_on_any_threads():
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(kernels.linear_cross_entropy, torch.bfloat16, {}))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others))


def test_head_loss_refuses_wrong_operands():
    hidden, weight = (torch.zeros_like(x) for x in SHAPE)
    targets, losses = torch.full((600,), 160), torch.empty(600)
    with pytest.raises(IndexError, match="target"):
        _native.head_loss(-100, 0.0, 0.0, hidden, weight, None, targets, None, losses, None, None, None)
    with pytest.raises(ValueError, match="upstream is None"):
        _native.head_loss(-100, 0.0, 0.0, hidden, weight, weight, targets, None, losses, hidden, None, None)
