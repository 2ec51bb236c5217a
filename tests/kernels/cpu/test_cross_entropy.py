"""Cross-entropy of given logits in C++, where a few rows go through each step together."""

import pytest
import torch

from warploom import kernels
from warploom.kernels.cpu import pointwise

pytestmark = pytest.mark.skipif(not pointwise.HAS_NATIVE, reason="needs the C++ extension")


def both_ways(logits, targets, loss_of=kernels.cross_entropy):
    """Each row's loss, and the gradient of their sum."""
    logits = logits.detach().requires_grad_()
    losses = loss_of(logits, targets, reduction="none")
    losses.sum().backward()
    return losses.detach(), logits.grad


def rows_of(classes, dtype=torch.float32, count=37):
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(count, classes, generator=generator)
    return logits.to(dtype), torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [7, 64, 300, 5000])
def test_row_has_the_same_bits_among_any_others(classes, dtype):
    logits, targets = rows_of(classes, dtype)
    targets[3:20:5] = -100
    losses, gradient = both_ways(logits, targets)
    for row in range(len(logits)):
        alone = both_ways(logits[row : row + 1], targets[row : row + 1])
        assert torch.equal(losses[row : row + 1], alone[0]) and torch.equal(gradient[row : row + 1], alone[1])


@pytest.mark.parametrize("scale", [1, 20])
@pytest.mark.parametrize("classes", [40, 64, 1000, 50257])
def test_as_exact_as_its_formula(classes, scale):
    """At most twice the error of the formula in PyTorch, and a unit in the last place."""
    logits, targets = rows_of(classes)
    logits *= scale
    reference = kernels.cross_entropy.reference
    exact, formula = both_ways(logits.double(), targets, reference), both_ways(logits, targets, reference)
    for truth, theirs, mine in zip(exact, formula, both_ways(logits, targets)):
        eps = torch.finfo(torch.float32).eps
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + eps * truth.norm()


@pytest.mark.parametrize("column", [5, 66])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFFFFFFF, 0x7F800000])
def test_nan_or_infinite_logit_spoils_its_row_alone(bits, column):
    logits, targets = rows_of(67)
    expected = both_ways(logits, targets)
    logits.view(torch.int32)[9, column] = bits - (bits >> 31 << 32)
    others = torch.arange(len(logits)) != 9
    losses, gradient = both_ways(logits, targets)
    assert losses[9].isnan() and gradient[9].isnan().all()
    assert torch.equal(losses[others], expected[0][others]) and torch.equal(gradient[others], expected[1][others])


def test_excluded_class_has_no_gradient():
    logits, targets = rows_of(64)
    targets.fill_(1)
    logits[:, 10:20] = -torch.inf
    losses, gradient = both_ways(logits, targets)
    assert losses.isfinite().all() and (gradient[:, 10:20] == 0).all()
