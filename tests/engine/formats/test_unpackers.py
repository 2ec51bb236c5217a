"""Unpackers held to their vendors' own code: any codes, any bits of a scale, odd numbers of rows.

`gguf`, `mlx`, `bitsandbytes`, `compressed_tensors` and `transformers` judge, and for AWQ and GPTQ the PyTorch parts of
`autoawq` and `auto_gptq`. Those two cannot be imported whole beside a PyTorch of today, so one file is taken from each.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from warploom.engine.config import ModelConfig
from warploom.engine.errors import InputError
from warploom.engine.formats.gguf import save_gguf
from warploom.engine.formats.gguf_blocks import TYPES
from warploom.engine.formats.gguf_packed import COMPUTED_SCALES, PACKED, pack_blocks
from warploom.engine.formats.gguf_reader import GGUFFile
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_packed
from warploom.engine.formats.packed_weight import PackedWeight, Segment
from warploom.engine.formats.weights import Weights, fp8_block, mxfp4
from warploom.engine.model import Transformer
from warploom.engine.serving.calibrate import quantize
from warploom.engine.serving.scheme import INT8

HALF = 2.0**-11  # of rounding to half precision


def lone_module(package, path):
    """A file of an installed package, without what the package imports."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    name = f"lone_{package}_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(found.submodule_search_locations[0]) / path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


class Draw:
    """Random tensors of a seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def words(self, *shape):
        return torch.randint(-(2**31), 2**31, shape, generator=self.generator).int()

    def bytes(self, *shape):
        return torch.randint(256, shape, generator=self.generator).to(torch.uint8)

    def halves(self, *shape, wild=False):
        """Half-precision numbers over a factor of 4,096, in float32; `wild` of any bits but infinity and NaN."""
        if wild:
            bits = torch.randint(-(2**15), 2**15, shape, generator=self.generator).short()
            return torch.where(bits.view(torch.half).isfinite(), bits.view(torch.half), 0).float()
        powers = torch.randint(-12, 0, shape, generator=self.generator)
        return (torch.rand(shape, generator=self.generator) + 0.5).half().float().ldexp(powers)

    def zeros(self, words, even, bits):
        """Words of zero points; all in the middle if `even`."""
        middle = sum((1 << bits - 1) << at for at in range(0, 32, bits))
        return torch.full_like(words, middle - (1 << 32) if middle >> 31 else middle) if even else words


def awq(draw, rows, groups, group, bits, even):
    vendor = lone_module("awq", "utils/packing_utils.py")
    bits, rows = 4, 8 * rows
    tensors = {
        "qweight": draw.words(groups * group, rows // 8),
        "qzeros": draw.zeros(draw.words(groups, rows // 8), even, bits),
        "scales": draw.halves(groups, rows, wild=even),
    }
    return tensors, {"quant_method": "awq", "bits": 4}, vendor.dequantize_gemm(**tensors, bits=4, group_size=group).T


def gptq(draw, rows, groups, group, bits, even, order=None):
    vendor = lone_module("auto_gptq", f"nn_modules/qlinear/qlinear_cuda{'_old' if order is None else ''}.py")
    each, columns = 32 // bits, groups * group
    rows *= each
    zeros = draw.words(groups, rows // each)
    if order is not None:
        zeros &= 0x77777777  # of all ones that file says 2 ** bits, the other and gptqmodel 0
    if even:
        zeros = draw.zeros(zeros, True, bits) - sum(1 << at for at in range(0, 32, bits))  # stored less one
    tensors = {
        "qweight": draw.words(columns // each, rows),
        "qzeros": zeros,
        "scales": draw.halves(groups, rows, wild=even),
    }
    if order is not None:
        tensors["g_idx"] = order.int()
    layer = vendor.QuantLinear(bits, group, columns, 32 * rows, False)
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    layer.outfeatures = rows
    return tensors, {"quant_method": "gptq", "bits": bits}, layer(torch.eye(columns)).T


def compressed(draw, rows, groups, group, bits, even):
    vendor = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    compressor = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    each, columns = 32 // bits, groups * group
    tensors = {
        "weight_packed": draw.words(rows, columns // each),
        "weight_scale": draw.halves(rows, groups, wild=even),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not even:
        tensors["weight_zero_point"] = draw.words(groups, math.ceil(rows / each)).T  # it reads no other strides
    about = {"num_bits": bits, "type": "int", "symmetric": even, "strategy": "group", "group_size": group}
    scheme = vendor.quantization.QuantizationScheme(targets=["Linear"], weights=about)
    said = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": about}},
    }
    return tensors, said, compressor.decompress(tensors, scheme)["weight"]


def mlx(draw, rows, groups, group, bits, even):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    group = max(32, group)
    words, scales = draw.words(rows, groups * group * bits // 32), draw.halves(rows, groups)
    biases = -draw.halves(rows, groups)
    parts = (mx.array(words.numpy().view(np.uint32)), mx.array(scales.numpy()), mx.array(biases.numpy()))
    exact = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=group, bits=bits)))
    tensors = {"weight": words.view(torch.uint32), "scales": scales, "biases": biases}
    return tensors, {"quant_method": "mlx", "bits": bits}, exact


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("case", [awq, gptq, compressed, mlx])
def test_words_unpack_as_their_vendors(case, data):
    """In every bit where zero points are in the middle and where MLX says minima; else -z · s is rounded to half."""
    rows, groups, seed = (data.draw(st.integers(*ends)) for ends in ((1, 9), (1, 5), (0, 2**31)))
    group, bits, even = (data.draw(st.sampled_from(some)) for some in ((16, 32, 64, 128), (4, 8), (False, True)))
    tensors, said, exact = case(Draw(seed), rows, groups, group, bits, even)
    weights = Weights({f"w.{part}": tensor for part, tensor in tensors.items()}, Path("model"), said)
    segment = weights.packed("w.weight")
    assert isinstance(segment, Segment) and torch.equal(weights("w.weight"), segment.dequantize())
    found, wanted = segment.dequantize(), exact.float()
    if even or case is mlx:
        assert segment.minima is None or case is mlx
        assert torch.equal(found, wanted)
        return
    reach = segment.minima.float().abs() * segment.units[:, None]
    assert ((found - wanted).abs() <= HALF * reach.repeat_interleave(segment.layout.group, 1)).all()


@settings(max_examples=15)
@given(st.sampled_from([4, 8]), st.integers(1, 4), st.integers(2, 4), st.integers(0, 2**31))
def test_gptq_in_order_of_activation_as_its_vendors(bits, rows, groups, seed):
    draw = Draw(seed)
    order = (torch.arange(groups * 32) // 32)[torch.randperm(groups * 32, generator=draw.generator)]
    tensors, said, exact = gptq(draw, rows, groups, 32, bits, False, order)
    weights = Weights({f"w.{part}": tensor for part, tensor in tensors.items()}, Path("model"), said)
    assert weights.packed("w.weight") is None and torch.equal(weights("w.weight"), exact)


@settings(max_examples=15)
@given(st.integers(1, 150), st.integers(1, 70), st.sampled_from(["int8", "fp8"]), st.booleans(), st.integers(0, 2**31))
def test_compressed_tensors_of_8_bits_are_its_own(rows, columns, kind, a_row, seed):
    """Whole numbers and FP8 with a scale a row or a matrix; NaN is NaN."""
    vendor = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    compressor = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base").NaiveQuantizationCompressor
    draw = Draw(seed)
    codes = draw.bytes(rows, columns if kind == "fp8" else 16 * columns)
    weight = codes.view(torch.float8_e4m3fn if kind == "fp8" else torch.int8)
    scale = draw.halves(rows if a_row or kind == "int8" else 1, 1).bfloat16()
    about = {"num_bits": 8, "type": "float" if kind == "fp8" else "int", "symmetric": True,
             "strategy": "channel" if len(scale) > 1 or rows == 1 else "tensor"}  # fmt: skip
    scheme = vendor.quantization.QuantizationScheme(targets=["Linear"], weights=about)
    exact = compressor.decompress({"weight": weight, "weight_scale": scale.float()}, scheme)["weight"]
    said = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": about}}}
    found = Weights({"w.weight": weight, "w.weight_scale": scale}, Path("model"), said)("w.weight")
    assert torch.equal(found.nan_to_num(7e7), exact.to(found.dtype).nan_to_num(7e7))


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from(["nf4", "fp4"]), st.booleans(), st.integers(0, 2**31))
def test_bitsandbytes_unpacks_as_its_own(rows, half, kind, nested, seed):
    """By its portable code; that for AVX-512 begins a block with each row that ends within one."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    portable = pytest.importorskip("bitsandbytes.backends.default.ops")
    draw = Draw(seed)
    plain = torch.randn(rows, 2 * half, generator=draw.generator)
    codes, state = functional.quantize_4bit(plain, quant_type=kind, compress_statistics=nested)
    codes = draw.bytes(*codes.shape)
    state.absmax = draw.bytes(len(state.absmax)) if nested else draw.halves(len(state.absmax))
    parts = {f"w.weight.{part}": x for part, x in state.as_dict(packed=True).items()}
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found = Weights({"w.weight": codes, **parts}, Path("model"), said)("w.weight")
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    about = scales, state.code, state.blocksize, plain.shape, torch.float32
    assert torch.equal(found, portable._dequantize_4bit_compute(codes.flatten(), *about))


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_bitsandbytes_rows_are_its_own(rows, groups, seed):
    """8 bits, scales within half precision."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    draw = Draw(seed)
    codes, scale = draw.bytes(rows, 16 * groups).view(torch.int8), draw.halves(rows)
    exact = functional.int8_vectorwise_dequant(codes, scale)
    found = Weights({"w.weight": codes, "w.SCB": scale}, Path("model"), {"quant_method": "bitsandbytes"})("w.weight")
    torch.testing.assert_close(found, exact, rtol=1.01 * HALF, atol=0)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_mxfp4_unpacks_as_transformers(experts, rows, groups, seed):
    """Any byte, of scales too."""
    vendor = pytest.importorskip("transformers.integrations.mxfp4")
    draw = Draw(seed)
    blocks, scales = draw.bytes(experts, rows, groups, 16), draw.bytes(experts, rows, groups)
    found, exact = mxfp4(blocks, scales), vendor.convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(found.nan_to_num(7e7), exact.nan_to_num(7e7))


@settings(max_examples=15)
@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([(128, 128), (64, 128), (1, 32), (16, 48), (256, 8)]),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_fp8_blocks_unpack_as_transformers(rows, columns, block, exponents, seed):
    """Any byte, NaN among them, in blocks as config.json says; scales that are bytes are exponents (MXFP8)."""
    vendor = pytest.importorskip("transformers.integrations.finegrained_fp8")
    draw = Draw(seed)
    weight = draw.bytes(block[0] * rows, block[1] * columns).view(torch.float8_e4m3fn)
    scales = draw.bytes(rows, columns) % 255 if exponents else torch.randn(rows, columns, generator=draw.generator)
    exact = vendor.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    said = {"quant_method": "fp8", "weight_block_size": list(block)}
    found = Weights({"w.weight": weight, "w.weight_scale_inv": scales}, Path("model"), said)("w.weight")
    assert torch.equal(found.nan_to_num(7e7), exact.nan_to_num(7e7))


@settings(max_examples=15)
@given(
    st.integers(1, 200), st.sampled_from([64, 96, 208, 384]),
    st.sampled_from(["tensor", "row", (128, 128), (64, 96), (1, 32)]), st.integers(0, 2**31),
)  # fmt: skip
def test_fp8_for_a_gpu_stays_packed(rows, columns, scaled, seed):
    """Its codes, and scales within 2⁻¹¹, of whatever part of the matrix has one; a CPU does not keep it."""
    draw = Draw(seed)
    codes = draw.bytes(rows, columns)
    codes[codes & 127 == 127] = 0
    block = (128, 128) if isinstance(scaled, str) else scaled
    shape = {"tensor": (), "row": (rows, 1)}.get(scaled, (-(-rows // block[0]), -(-columns // block[1])))
    scale = torch.rand(shape, generator=draw.generator) + 0.01
    said = {"quant_method": "fp8", "weight_block_size": list(block)}
    weights = Weights({"w.weight": codes.view(torch.float8_e4m3fn), "w.weight_scale": scale}, Path("model"), said)
    assert weights.packed("w.weight") is None
    weights.keeps_fp8 = True
    segment = weights.packed("w.weight")
    assert segment.layout.float8 and torch.equal(segment.codes, codes)
    torch.testing.assert_close(segment.dequantize(), weights("w.weight").float(), rtol=2**-8 + 2**-10, atol=0)
    codes[0, 0] = 255
    assert weights.packed("w.weight") is None


@pytest.mark.parametrize("block", [[0, 128], [128], "0x128", [128, 1.5], [True, 4], 7])
def test_fp8_block_that_is_none_is_refused(block):
    for said in ({"weight_block_size": block}, {"config_groups": {"g": {"weights": {"block_structure": block}}}}):
        with pytest.raises(InputError, match="a block of FP8 is two numbers of at least 1, got"):
            fp8_block(said)


def blocks_of(number, draw, count, finite):
    """Random blocks of a type; with `finite`, their half-precision numbers are of a usual size."""
    _, _, size, _ = TYPES[number]
    blocks = draw.bytes(count, size).numpy()
    if finite and number == 39:
        blocks[:, 0] = 100 + blocks[:, 0] % 30
    elif finite:
        places = {14: (208,), 3: (0, 2), 7: (0, 2), 12: (0, 2), 13: (0, 2)}.get(number, (0,))
        for place in places:
            halves = draw.halves(count).numpy().astype(np.float16)
            blocks[:, place : place + 2] = halves.view(np.uint8).reshape(count, 2)
    return blocks


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(PACKED)), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 3), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_packed_gguf_is_as_ggml_has_it(parts, spans, finite, seed):
    """Types mixed in one matrix, rows in another order: in every bit, or within half precision of a made scale."""
    gguf = pytest.importorskip("gguf")
    draw, columns = Draw(seed), 256 * spans
    segments, exact, reach = [], [], []
    for number, rows in parts:
        finite_here = finite or number in COMPUTED_SCALES
        blocks = blocks_of(number, draw, rows * columns // TYPES[number][1], finite_here)
        with np.errstate(all="ignore"):
            segment = pack_blocks(number, blocks, rows)
            values = gguf.dequantize(blocks, gguf.GGMLQuantizationType(number)).reshape(rows, columns)
        assert segment is not None
        order = torch.randperm(rows, generator=draw.generator)
        segments.append(segment.at(order))
        exact.append(torch.from_numpy(np.ascontiguousarray(values, np.float32))[order])
        each = segments[-1].scales.float().abs() * 2 ** (segment.layout.bits - (segment.minima is None))
        each = each if segment.minima is None else each + segments[-1].minima.float().abs()
        each = (each * segments[-1].units[:, None]).repeat_interleave(segment.layout.group, 1)
        rounded = number in COMPUTED_SCALES and number != 39
        reach.append(each * (16 if segment.layout.table else 1) * (HALF if rounded else 0))
    found, exact, reach = PackedWeight.joined(segments, columns).dequantize(), torch.cat(exact), torch.cat(reach)
    same = (found == exact) | (found.isnan() & exact.isnan())
    assert (same | ((found - exact).abs() <= reach) & (reach > 0)).all()


def read(tensors, said):
    weights = Weights({f"w.{part}": x for part, x in tensors.items() if x is not None}, Path("model"), said)
    packed = weights.packed("w.weight")
    return weights("w.weight") if packed is None else packed.dequantize()


DAMAGE = {
    "cut rows": lambda x: x[:-1],
    "cut columns": lambda x: x[..., :-1],
    "other numbers": lambda x: x.double() * math.nan,
    "missing": lambda x: None,
}
SPARE = ("weight_zero_point", "missing"), ("weight_shape", "missing")  # may be left out


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("case", [awq, gptq, compressed, mlx])
def test_damaged_words_are_refused_in_a_sentence(case, damage):
    tensors, said, _ = case(Draw(0), 3, 2, 64, 4, False)
    assert read(tensors, said).isfinite().all()
    for part, tensor in tensors.items():
        if (part, damage) not in SPARE:
            with pytest.raises(InputError, match="w") as found:
                read({**tensors, part: DAMAGE[damage](tensor)}, said)
            assert "\n" not in str(found.value)


def fuzzed(case):
    """Tensors and settings of a small matrix in each way of packing."""
    draw, block = Draw(0), {"weight_block_size": [32, 32]}
    state = {"shape": [4, 64], "blocksize": 64, "dtype": "float32", "nested_blocksize": 2, "nested_offset": 0.5}
    words = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    nested = {"absmax": draw.bytes(4), "nested_absmax": draw.halves(2).float(), "nested_quant_map": torch.rand(256),
              "quant_map": torch.rand(16), "quant_state.bitsandbytes__nf4": words}  # fmt: skip
    rest = {
        "int8": ({"weight": draw.bytes(5, 64).view(torch.int8), "weight_scale": draw.halves(5, 1)},
                 {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}}),
        "fp8": ({"weight": torch.ones(64, 96).to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(2, 3)}, block),
        "bitsandbytes": ({"weight": draw.bytes(128, 1)} | {f"weight.{part}": x for part, x in nested.items()},
                         {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "mxfp4": ({"weight_blocks": draw.bytes(2, 3, 2, 16), "weight_scales": draw.bytes(2, 3, 2) % 200}, {}),
    }  # fmt: skip
    return rest[case] if isinstance(case, str) else case(draw, 3, 2, 64, 4, False)[:2]


OTHER = torch.float16, torch.uint8, torch.int64, torch.bool, torch.float8_e5m2
RESHAPED = [
    lambda x: None, lambda x: x[:0], lambda x: x[:-1], lambda x: x[..., :-1], lambda x: x.flatten(), lambda x: x[None],
    lambda x: x.flatten()[0], lambda x: torch.cat([x, x]), lambda x: torch.cat([x, x], -1),
    *(lambda x, kind=kind: x.float().to(kind) for kind in OTHER), lambda x: x.mT,
]  # fmt: skip
ODD = [None, -1, 0, 3, 48, True, "x", "4", [], {}, [1, 2], {"a": 1}, 0.5, 2**40]


def places(value, path=()):
    """Paths to everything inside settings."""
    yield path
    for key in value if isinstance(value, dict) else ():
        yield from places(value[key], (*path, key))


def changed(value, path, new):
    return {**value, path[0]: changed(value[path[0]], path[1:], new)} if path else new


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_damage_is_refused_in_a_sentence(data):
    """Tensors of other shapes and types, settings of other values: read, or refused with one line."""
    kinds = [awq, gptq, compressed, mlx, "int8", "fp8", "bitsandbytes", "mxfp4"]
    tensors, said = fuzzed(data.draw(st.sampled_from(kinds)))
    assert read(tensors, said).numel()
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            part = data.draw(st.sampled_from(sorted(tensors)))
            if (x := tensors[part]) is not None and x.ndim and x.numel():
                tensors |= {part: data.draw(st.sampled_from(RESHAPED if x.ndim > 1 else RESHAPED[:-1]))(x)}
        else:
            path, odd = data.draw(st.sampled_from(list(places(said)))), data.draw(st.sampled_from(ODD))
            said = changed(said, path, odd) if path else said
    try:
        read(tensors, said)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 400


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not read; pack-quantized and"),
        ({"config_groups": {"g": {"weights": {"num_bits": 3}}}}, "num_bits is 3; 4 and 8 are read"),
        ({"quant_method": "bitsandbytes"}, "tensor w.weight is int8: packed, and without the scales"),
        ({"quant_method": "mxfp4"}, r"w.weight_blocks and its scales are uint8 \(2, 3, 1, 16\) and uint8 \(2, 3, 2\)"),
    ],
)
def test_settings_and_tensors_that_disagree_are_refused(said, says):
    sources = {"w.weight": torch.zeros(3, 32, dtype=torch.int8)}
    if "format" in said or "config_groups" in said:
        sources = {"w.weight_packed": torch.zeros(3, 4).int(), "w.weight_scale": torch.ones(3, 1)}
    if said.get("quant_method") == "mxfp4":
        blocks, scales = (torch.zeros(*shape, dtype=torch.uint8) for shape in ((2, 3, 1, 16), (2, 3, 2)))
        sources = {"w.weight_blocks": blocks, "w.weight_scales": scales}
    with pytest.raises(InputError, match=says):
        Weights(sources, Path("model"), {"quant_method": "compressed-tensors", **said})("w.weight")


def test_gguf_scales_without_a_number_are_refused(tmp_path):
    """In every type, packed and not: of a NaN the tensor's name is told."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, d_model=256, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=256, max_seq_len=32)
    for kind in ("q8_0", "q4_0", "q4_k_m"):
        save_gguf(Transformer(config), tmp_path / "model.gguf", None, kind)
        data = bytearray((tmp_path / "model.gguf").read_bytes())
        entry = GGUFFile(tmp_path / "model.gguf").tensors["blk.0.attn_q.weight"]
        data[entry.start : entry.start + 2] = b"\x00\x7e"
        (tmp_path / "broken.gguf").write_bytes(data)
        for packed in (True, False):
            with pytest.raises(InputError, match=r"q_proj|attn_q"):
                load_model(tmp_path / "broken.gguf", "cpu", packed=packed)


def test_layouts_of_a_directory_must_be_of_its_matrices(tmp_path):
    """Of a matrix that no model has, and tensors of a block that this one has not."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=4, d_ff=64, max_seq_len=32))
    quantize(model, INT8)
    save_packed(model, tmp_path)
    whole = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(whole.replace('"ffn.up"', '"ffn.side"'))
    with pytest.raises(InputError, match=r"layouts names no matrix by 'ffn\.side'; there are: attention\.qkv"):
        load_model(tmp_path, "cpu")
    (tmp_path / "config.json").write_text(whole.replace('"n_layers": 2', '"n_layers": 1'))
    with pytest.raises(InputError, match=r"holds tensor 'blocks\.1\.\S*', which config.json does not account for"):
        load_model(tmp_path, "cpu")
