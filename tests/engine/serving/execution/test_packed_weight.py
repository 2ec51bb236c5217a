"""Claims about packed weights: what they are, and that every loop gives their products, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.engine.formats.packed_weight import Layout, PackedWeight, Segment
from warploom.engine.formats.rounding import nearest
from warploom.engine.serving import LLM
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE, _native
from warploom.engine.serving.execution.native_matrix import pack, packed_matrix
from warploom.engine.serving.scheme import Scheme
from warploom.kernels.packed_linear import hadamard

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built")
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # IQ4_NL's
KINDS = [(8, False, ()), (8, True, ()), (4, False, ()), (4, True, ()), (4, False, TABLE)]
LOOPS = "avx512", "avxvnni", "avx2", "neon", "plain"


def random_rows(generator, layout, rows, columns):
    """Any codes whatever, the last among them, and numbers of several sizes."""
    groups = layout.groups(columns)
    draw = {"generator": generator}
    codes = torch.randint(0, 256, (rows, groups * layout.group * layout.bits // 8), dtype=torch.uint8, **draw)
    scales = (torch.rand(rows, groups, **draw) * 2.0 ** torch.randint(-12, 2, (rows, groups), **draw)).half()
    minima = torch.randn(rows, groups, **draw).half() if layout.minimum else None
    return Segment(layout, codes, scales, minima, torch.rand(rows, **draw) + 0.5)


def product(matrix, x, outputs):
    y = torch.empty(len(x), outputs)
    matrix.multiply(x, y)
    return y


@settings(max_examples=60)
@given(
    st.sampled_from([16, 32, 64]), st.booleans(), st.booleans(),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 140)), min_size=1, max_size=3),
    st.integers(1, 200), st.integers(1, 7), st.integers(0, 2**31),
)  # fmt: skip
def test_packed_product_is_same_by_every_loop(group, rotate, wide, parts, columns, rows, seed):
    """Segments of mixed kinds: as near to the definition as rounded activations allow, a row the same in any batch."""
    generator = torch.Generator().manual_seed(seed)
    layouts = [(Layout(bits, group, minimum, table, rotate), n) for (bits, minimum, table), n in parts]
    weight = PackedWeight(tuple(random_rows(generator, layout, n, columns) for layout, n in layouts), columns)
    outputs = sum(n for _, n in layouts)
    x, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, columns), (outputs,)))
    matrix = packed_matrix(weight, bias, wide)
    found = {}
    for name in LOOPS:
        if _native.use_packed_loops(name):
            found[name] = product(matrix, x, outputs)
    _native.use_packed_loops("best")
    assert all(torch.equal(y, found["plain"]) for y in found.values())
    assert torch.equal(product(matrix, x[-1:].contiguous(), outputs), found["plain"][-1:])
    exact, w = x.double() @ weight.dequantize().double().T + bias.double(), weight.dequantize().double().abs()
    reach = x.double().norm(dim=-1, keepdim=True) / (127 * 128 if wide else 127)  # of a rotated activation at most
    assert ((found["plain"] - exact).abs() <= reach * 8 * w.norm(dim=-1) + 1e-5 * (1 + exact.abs().amax())).all()


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("minimum", [False, True])
def test_pack_loses_what_its_bits_must(rotate, bits, minimum):
    """In weights of any size, of each group a step over √12 (root mean square), and a seventh for chance."""
    weight = torch.randn(70, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 3, 70)[:, None]
    layout = Layout(bits, 64, minimum, (), rotate)
    lost_N = (pack(weight, layout).dequantize().double() - weight.double()).norm(dim=-1)
    turned_NGC = weight.double().unflatten(-1, (-1, 64)) @ (hadamard(64) if rotate else torch.eye(64)).double()
    low_NG, high_NG = turned_NGC.aminmax(dim=-1)
    whole = (high_NG - low_NG) / (2**bits - 1), turned_NGC.abs().amax(-1) / (2 ** (bits - 1) - 1)
    step_NG = whole[0] if minimum else whole[1]
    assert (lost_N <= 8 / 7 * (64 / 12 * step_NG.square().sum(-1)).sqrt()).all()
    assert not pack(torch.zeros(3, 64), layout).dequantize().any()


def test_serving_by_scheme_is_as_fine_as_it_says(tiny_model):
    """4 bits lose most, finer activations less than 8 bits, and a kept matrix gives something back."""
    model, text = tiny_model("llama", vocab_size=500, tie_embeddings=False), [i * i % 487 for i in range(250)]
    exact = torch.tensor(LLM(model).score(text))

    def lost(scheme):
        return (torch.tensor(LLM(model, quantize=scheme, kv_dtype="float32").score(text)) - exact).norm().item()

    eight, four = lost("int8"), lost(Scheme(4, symmetric=False))
    assert 0 < lost(Scheme(activations=16)) < eight < lost("int4") < four < lost(Scheme(4, rotate=False, head=4))
    assert lost(Scheme(group=16)) < 1.05 * eight


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 5}, "bits must be 4 or 8, got 5"),
        ({"group": 48}, "group must be 16, 32 or 64, got 48"),
        ({"bits": 4, "float8": True}, "float8 must be of 8 bits and without a minimum, got 4 bits"),
        ({"activations": 4}, "activations must be 8 or 16, got 4"),
        ({"keep": {"*.gate": 8}}, r"keep names no matrix by '\*.gate'; there are: attention.qkv"),
    ],
)
def test_scheme_refuses_what_cannot_be(change, says):
    with pytest.raises(ValueError, match=says):
        Scheme(**change)


def test_fp8_weights_are_refused_on_a_cpu(tiny_model):
    says = "fp8 weights are for a GPU; on a CPU int8 is as small and loses less"
    for quantize in ("fp8", Scheme(float8=True)):
        with pytest.raises(ValueError, match=says):
            LLM(tiny_model("llama"), quantize=quantize)
    with pytest.raises(ValueError, match=says):
        packed_matrix(nearest(torch.randn(3, 64), Layout(8, rotate=False, float8=True)))


def test_float8_is_off_by_half_a_digit():
    """Of four binary digits, the first implied: 1/16 at most, of the smallest in a group half their step."""
    weight = torch.randn(9, 150) * torch.logspace(-30, 3, 9)[:, None]
    weight[3] = 0
    packed = nearest(weight, Layout(8, 32, rotate=False, float8=True))
    (found,) = packed.segments
    step = (found.scales.float() * found.units[:, None]).repeat_interleave(32, 1)[:, :150]
    assert ((packed.dequantize() - weight).abs() <= (weight.abs() * 1.001 / 16).maximum(step * 2**-9)).all()


@settings(max_examples=30)
@given(st.sampled_from([4, 8]), st.sampled_from([16, 32, 64]), st.integers(1, 200), st.integers(0, 2**31))
def test_nearest_codes_are_those_of_cpp(bits, group, columns, seed):
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(seed))
    layout = Layout(bits, group, rotate=False)
    (ours,), (native,) = nearest(weight, layout).segments, pack(weight, layout).segments
    assert all(torch.equal(getattr(ours, part), getattr(native, part)) for part in ("codes", "scales", "units"))


@pytest.mark.parametrize("layout", [Layout(8), Layout(4), Layout(4, 32, True), Layout(8, 16, True, rotate=False)])
def test_nearest_codes_err_by_half_a_step(layout):
    weight = torch.randn(9, 150) * torch.logspace(-3, 3, 9)[:, None]
    packed = nearest(weight, layout)
    (segment,) = packed.segments
    steps = (segment.scales.float() * segment.units[:, None]).amax(1)
    assert ((weight - packed.dequantize()).square().mean(1).sqrt() <= 0.6 * steps).all()
