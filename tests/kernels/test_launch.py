"""Every fused twin against the float64 oracle, forward and backward, in the Triton interpreter or on a GPU."""

import sys
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.kernels import Maker, backend, paged_attention, rms_norm, sample
from warploom.kernels.core.lang import INTERPRET
from warploom.kernels.tools import verify

from .device import DEVICE, pytestmark  # noqa: F401
from .test_oracles import small_cases


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
    assert not verify.nondeterministic(op, case, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("kind", ["spread", "flat", "tied", "masked"])
def test_sample_without_sort_equals_with(kind):
    """Sampling without a sort draws the tokens of sampling with one."""
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


ODD = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0, 1.0, 2.5]
ODD_SETTINGS = {
    "temperature": st.sampled_from([0.0, 5e-324, 1e-45, 1e-40, 1e-30, 9e-5, 1e-4, 0.5, 1.0, 2.0, 100.0]),
    "top_k": st.integers(0, 12),
    "top_p": st.sampled_from([1e-45, 1e-3, 0.5, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 1e-45, 0.1, 1.0]),
    "seeds": st.integers(-(2**63), 2**63 - 1),
    "positions": st.integers(0, 2**40),
}


def largest_first(row, temperature):
    """The rule of `sample` for greedy rows and rows that are not finite, one logit at a time; None for others."""
    temperature = torch.tensor(temperature)
    greedy = bool(temperature < 1e-4)
    scaled = [float(x if greedy else x * (1 / temperature)) for x in row]
    scaled = [x if x == x else -float("inf") for x in scaled]
    return scaled.index(max(scaled)) if greedy or abs(max(scaled)) == float("inf") else None


@pytest.mark.parametrize("by", ["triton", "eager", "native"])
@given(
    st.lists(st.lists(st.sampled_from(ODD), min_size=9, max_size=9), min_size=1, max_size=4),
    st.fixed_dictionaries(ODD_SETTINGS),
)
@settings(max_examples=40)
def test_sample_survives_any_row(by, rows, options):
    """A draw is a token whose logit is a number, or the first of the largest, whatever the logits and settings."""
    logits = torch.tensor(rows, device=DEVICE)
    dtypes = {"top_k": torch.int32, "seeds": torch.int64, "positions": torch.int64}
    chosen = [torch.tensor([options[name]] * len(rows), dtype=dtypes.get(name), device=DEVICE) for name in ODD_SETTINGS]
    if by == "native":
        sampling = pytest.importorskip("warploom.engine.serving.execution.sampler")
        if not sampling.HAS_NATIVE:
            pytest.skip("needs the C++ extension")
        index = torch.arange(len(rows))
        drawn = sampling._sample_native(logits.cpu(), index, *(x.cpu() for x in chosen))
    else:
        with backend(by):
            drawn = sample(logits, *chosen)
    for row, token in zip(rows, drawn.tolist()):
        expected = largest_first(row, options["temperature"])
        assert 0 <= token < len(row) and (expected in (None, token)), (row, options)
        assert expected is not None or row[token] > -float("inf"), (row, options)


@pytest.mark.skipif(not INTERPRET, reason="a GPU's programs know their own place")
def test_threads_that_interpret_at_once_take_turns():
    """They share what the interpreter knows of its place in the grid, and would write wherever the other one stands."""
    calls = [(op, *case.build(Maker(torch.float32))) for op, case in
             ((rms_norm, rms_norm.cases[0]), (paged_attention, paged_attention.cases[2]))]  # fmt: skip
    found = [[], []]

    def work(op, args, options, results):
        with torch.no_grad():
            results += [op(*args, **options) for _ in range(4)]

    interval = sys.getswitchinterval()
    # The backend holds for the process: a thread that chose its own would undo it under the other.
    with backend("triton"):
        sys.setswitchinterval(1e-6)
        try:
            threads = [Thread(target=work, args=(*call, results)) for call, results in zip(calls, found)]
            for step in (Thread.start, Thread.join):
                for thread in threads:
                    step(thread)
        finally:
            sys.setswitchinterval(interval)
        for (op, args, options), results in zip(calls, found):
            with torch.no_grad():
                assert len(results) == 4 and all(torch.equal(x, op(*args, **options)) for x in results)


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
    from warploom.kernels.core.lang import tl, triton

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
