"""Every fused twin against the float64 oracle, forward and backward, in the Triton interpreter or on a GPU."""

import pytest
import torch

from warploom.kernels import Maker, backend, rms_norm, sample, verify
from warploom.kernels.lang import HAS_TRITON, INTERPRET

from .test_oracles import small_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        not HAS_TRITON or (DEVICE == "cpu" and not INTERPRET), reason="needs triton and TRITON_INTERPRET=1 or a GPU"
    ),
    pytest.mark.filterwarnings("ignore:.* encountered in (exp|log|subtract|matmul):RuntimeWarning"),  # log(0) is meant
]


def fused_cases():
    return small_cases(lambda op, case: op.fused is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@fused_cases()
def test_errors_are_at_most_twice_those_of_eager(op, case, dtype):
    assert not verify.errors(op, case, dtype, DEVICE)


@small_cases(lambda op, case: op.fused is not None and case is op.cases[0])
def test_so_they_are_in_float16(op, case):
    assert not verify.errors(op, case, torch.float16, DEVICE)


@fused_cases()
def test_the_same_call_gives_the_same_bits(op, case):
    with backend("triton"):
        first, second = (verify.call(op, case, op, Maker(torch.bfloat16, DEVICE)) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["spread", "flat", "tied", "masked"])
def test_sampling_without_a_sort_draws_the_tokens_of_sampling_with_one(kind):
    random = torch.Generator().manual_seed(len(kind))
    B, V = 6, 333
    logits = torch.randn(B, V, generator=random) * (0.2 if kind == "flat" else 3)
    logits = logits.round() if kind == "tied" else logits
    if kind == "masked":
        logits[:, ::3] = -float("inf")
    temperature, top_p, min_p = torch.rand(3, B, generator=random) * torch.tensor([2.0, 1.0, 0.1])[:, None]
    top_k, seeds, positions = (torch.randint(0, high, (B,), generator=random) for high in (80, 2**62, 1000))
    settings = [x.to(DEVICE) for x in (logits, temperature, top_k, top_p, min_p, seeds, positions)]
    with backend("triton"):
        assert torch.equal(sample(*settings), sample.reference(*settings))


def test_a_wrong_twin_is_caught():
    case = rms_norm.cases[0]
    right = rms_norm.fused
    try:
        rms_norm.fused = lambda x, weight, eps=1e-6: right(x, weight, eps) * 1.001
        found = verify.errors(rms_norm, case, torch.float32, DEVICE)
    finally:
        rms_norm.fused = right
    assert [text.split(":")[0] for text in found] == ["result 0", "gradient 0", "gradient 1"]


@pytest.mark.skipif(not INTERPRET, reason="on a GPU this is compute-sanitizer's work")
@pytest.mark.parametrize(("reach", "says"), [(0, None), (1, "reads outside"), (2, "writes outside")])
def test_an_access_outside_a_kernels_arguments_is_caught(reach, says):
    """So every test here also proves that its kernels touch nothing else, in tails and odd strides too."""
    from warploom.kernels.lang import tl, triton

    @triton.jit
    def copy(x, y, length, READ: tl.constexpr, WRITE: tl.constexpr):
        lane = tl.arange(0, 16)
        tl.store(y + lane, tl.load(x + lane, mask=lane < length + READ, other=0.0), mask=lane < length + WRITE)

    x, y = torch.arange(40.0)[10:23], torch.empty(13)

    def run():
        copy[(1,)](x, y, 13, READ=int(reach == 1), WRITE=int(reach == 2))

    if says is None:
        run()
        assert torch.equal(x, y)
    else:
        with pytest.raises(Exception, match="copy") as found:
            run()
        assert says in str(found.value.__cause__ or found.value)
