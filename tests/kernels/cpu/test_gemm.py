"""Products of our own for training: each number a sum in float32, whatever its company and the number of threads."""

import pytest
import torch

from warploom.engine.training.fused_block import GemmLinear
from warploom.kernels.cpu import gemm
from warploom.kernels.cpu.pointwise import HAS_NATIVE, _native

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="needs the C++ extension")
pairs = pytest.mark.skipif(not (HAS_NATIVE and _native.has_fast_pairs()), reason="needs a CPU of AMD with avx512_bf16")
FORMATS = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pairs)])


def operands(N, O, I, dtype):
    generator = torch.Generator().manual_seed(N)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((N, O), (N, I), (O, I))]


def assert_sums(mine, a, b):
    """Hold numbers to the product a · b in float64: sums in float32, rounded once to their own format."""
    exact, parts = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = len(b) * 2.0**-24 * parts + torch.finfo(mine.dtype).eps / 2 * exact.abs()
    assert ((mine - exact).abs() <= bound).all()


@FORMATS
@pytest.mark.parametrize(("N", "O", "I"), [(1, 32, 64), (37, 96, 32), (300, 160, 1056), (70, 1824, 64)])
def test_products_are_sums_in_float32(N, O, I, dtype):
    """Forward, to inputs and to weights, for rows, blocks and panels of every width, whole and not."""
    dy, x, weight = operands(N, O, I, dtype)
    packed, dx, dw = gemm.Packed(weight), torch.empty_like(x), torch.ones(O, I)
    assert_sums(packed.multiply(x), x, weight.T)
    packed.multiply_back(dy, dx)
    assert_sums(dx, dy, weight)
    packed.add_gradient(dw, dy, x)
    ones = torch.ones(O, 1)
    assert_sums(dw, torch.cat([dy.T, ones], 1), torch.cat([x, torch.ones(1, I)]))


@FORMATS
def test_product_bits_on_any_threads(dtype):
    """The number of threads cuts a gradient into other tasks and changes no bit of it."""
    dy, x, weight = operands(600, 832, 416, dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            packed, dw = gemm.Packed(weight), torch.zeros(832, 416)
            packed.add_gradient(dw, dy, x)
            found.append((dw, packed.multiply(x)))
    finally:
        torch.set_num_threads(threads)
    for dw, y in found[1:]:
        assert torch.equal(dw, found[0][0]) and torch.equal(y, found[0][1])


@pytest.mark.skipif(not gemm.is_fast(torch.float32), reason="PyTorch's products are the faster ones")
@pytest.mark.parametrize("bias", [False, True])
def test_trained_linear_equals_pytorch(bias, monkeypatch):
    """A layer outside fused blocks, a bias and a stream of two dimensions included."""
    seen = []
    multiply = gemm.Packed.multiply
    monkeypatch.setattr(gemm.Packed, "multiply", lambda *args: seen.append(1) or multiply(*args))
    x, upstream = torch.randn(3, 50, 64), torch.randn(3, 50, 96)

    def results(layer):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(upstream)
        return y.detach(), leaf.grad, *(p.grad for p in layer.parameters())

    layer, exact = GemmLinear(64, 96, bias), torch.nn.Linear(64, 96, bias)
    layer.load_state_dict(exact.state_dict())
    theirs = results(exact)
    assert not seen
    for mine, other in zip(results(layer), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
    assert seen


def test_product_of_odd_widths_is_refused():
    x = torch.zeros(4, 24)
    with pytest.raises(ValueError, match="24 terms and 16 columns"):
        _native.pack(torch.zeros(16, 24), False, torch.zeros(16, 24))
    with pytest.raises(ValueError, match="left must have 4096 numbers"):
        _native.multiply_tokens(x, x, 4, torch.zeros(16, 16), False, 1)
