"""A layer's rows in tiles, held to the formulas of its ops in float64, and the layers that go that way."""

import pytest
import torch

from warploom import kernels
from warploom.engine.config import ModelConfig
from warploom.engine.model import Rotation, Transformer, dense_attention
from warploom.engine.training import fused_block as rows
from warploom.kernels.cpu import fused_block

pytestmark = pytest.mark.skipif(
    not fused_block.HAS_FUSED_BLOCK, reason="needs the C++ extension and a CPU with AVX-512"
)
EPS = 1e-6
pairs = pytest.mark.skipif(
    torch.bfloat16 not in fused_block._PASSES, reason="bfloat16 goes by its ops: needs a CPU of AMD with avx512_bf16"
)
FORMATS = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pairs)])


def by_ops(x, H, K, D, positions):
    heads, stream = kernels.add_rms_norm.reference(x["delta"], x["stream"], x["norm"], EPS)
    q, k, v = (heads @ x["qkv"].T).unflatten(-1, (-1, D)).split((H, K, K), -2)
    if "cos" in x:
        q, k = kernels.rope.reference(q, k, x["cos"], x["sin"], positions)
    joined, stream = kernels.add_rms_norm.reference(mix(q, k, v).flatten(-2) @ x["output"].T, stream, x["between"], EPS)
    return kernels.swiglu_packed.reference(joined @ x["gate_up"].T) @ x["down"].T, stream


def by_rows(x, H, K, D, positions):
    weights = [x[name] for name in ("norm", "qkv", "output", "between", "gate_up", "down")]
    assert fused_block.is_supported(x["stream"], *weights)
    norm, qkv, *others = weights
    tables = x.get("cos"), x.get("sin"), positions
    q, k, v, stream = fused_block.norm_qkv_rope(x["delta"], x["stream"], norm, EPS, qkv, (H, K), *tables)
    output, between, gate_up, down = others
    return fused_block.out_proj_mlp(mix(q, k, v), stream, output, between, EPS, gate_up, down)


def mix(q, k, v):
    """Any function of all three, in place of attention."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    return 1.5 * q + k * v


def results(way, inputs, upstream, dtype, *sizes):
    wide = torch.promote_types(dtype, torch.float32)
    x = {name: t.to(wide if name in ("cos", "sin") else dtype).clone() for name, t in inputs.items()}
    leaves = [t.requires_grad_() for name, t in x.items() if name not in ("cos", "sin")]
    out = way(x, *sizes)
    torch.autograd.backward(out, [u.to(dtype) for u in upstream])
    return [*(t.detach() for t in out), *(t.grad for t in leaves)]


def draw(B, T, C, H, K, D, F, turned):
    generator = torch.Generator().manual_seed(T)
    J = (H + 2 * K) * D
    shapes = {
        "delta": (B, T, C), "stream": (B, T, C), "norm": (C,), "qkv": (J, C), "output": (C, H * D), "between": (C,),
        "gate_up": (2 * F, C), "down": (C, F),
    }  # fmt: skip
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs |= {name: inputs[name] * inputs[name].shape[1] ** -0.5 for name in ("qkv", "output", "gate_up", "down")}
    if turned:
        inputs |= dict(zip(("cos", "sin"), kernels.rope_tables(D, 2 * T)))
    return inputs, [torch.randn(B, T, C, generator=generator) for _ in range(2)]


SIZES = [(2, 37, 48, 3, 1, 16, 80, True), (1, 130, 128, 4, 4, 32, 384, False), (3, 50, 96, 2, 2, 48, 208, True)]
PAIRED = [(1, 77, 64, 4, 2, 16, 160, True), (1, 130, 128, 4, 4, 32, 384, False), (5, 64, 96, 2, 1, 48, 224, True)]


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float32, sizes) for sizes in SIZES]
    + [pytest.param(torch.bfloat16, sizes, marks=pairs) for sizes in PAIRED],
)
@pytest.mark.parametrize("packed", [False, True])
def test_fused_rows_as_exact_as_their_ops(dtype, sizes, packed):
    """Rows in tiles are as exact as the formulas of their ops in the same format."""
    B, T, C, H, K, D, F, turned = sizes
    inputs, upstream = draw(B, T, C, H, K, D, F, turned)
    inputs = {name: t.to(dtype).float() if name not in ("cos", "sin") else t for name, t in inputs.items()}
    upstream = [u.to(dtype).float() for u in upstream]
    positions = torch.arange(T).flip(0).repeat(B, 1) if packed else None
    sizes = H, K, D, positions
    exact = results(by_ops, inputs, upstream, torch.float64, *sizes)
    formulas = results(by_ops, inputs, upstream, dtype, *sizes)
    ours = results(by_rows, inputs, upstream, dtype, *sizes)
    for truth, theirs, mine in zip(exact, formulas, ours):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + torch.finfo(dtype).eps * truth.norm()


@FORMATS
def test_row_bits_alone_and_on_any_threads(dtype):
    """A row has the same bits alone and among others on any number of threads."""
    H, K, D = 4, 2, 32
    inputs, _ = draw(3, 70, 128, H, K, D, 192, False)
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = by_rows(inputs, H, K, D, None)
        torch.set_num_threads(2)
        two = by_rows(inputs, H, K, D, None)
        alone = by_rows(inputs | {name: inputs[name][1:2, 5:6] for name in ("delta", "stream")}, H, K, D, None)
    finally:
        torch.set_num_threads(threads)
    for a, b, row in zip(one, two, alone):
        assert torch.equal(a, b) and torch.equal(a[1, 5], row[0, 0])


LLAMA = {"vocab_size": 32, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 16}


@FORMATS
def test_fused_block_gradients_equal_ops(dtype, monkeypatch):
    """Training goes by rows and finds the gradients of the ops."""
    model = Transformer(ModelConfig(**LLAMA)).to(dtype)
    rows.install(model)
    tokens = torch.randint(32, (2, 16))
    seen = []
    whole = fused_block.out_proj_mlp
    monkeypatch.setattr(fused_block, "out_proj_mlp", lambda *args: seen.append(1) or whole(*args))

    def gradients():
        model.zero_grad()
        loss = model.loss(tokens, tokens)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    ours = gradients()
    assert seen
    monkeypatch.setattr(fused_block, "HAS_FUSED_BLOCK", False)
    for mine, theirs in zip(ours, gradients()):
        assert (mine - theirs).norm() <= 16 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize(
    "change", [{"dropout": 0.1}, {"bias": True}, {"norm": "layernorm"}, {"norm_place": "both"}, {"d_ff": 40}]
)
def test_a_layer_with_more_in_it_goes_by_its_ops(change, monkeypatch):
    monkeypatch.delattr(fused_block, "norm_qkv_rope")
    model = Transformer(ModelConfig(**LLAMA | change))
    rows.install(model)
    stream = torch.randn(1, 8, 32)
    assert model.blocks[0](stream, stream, Rotation(), dense_attention)[0].requires_grad
