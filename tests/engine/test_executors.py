"""Executors compute what they say they do; whatever they do not know falls back to the definition."""

import dataclasses

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.executors import Supported
from warploom.engine.model import Block, Transformer
from warploom.engine.parallel import tensor_parallel
from warploom.engine.serving.execution.gpu_model import PagedAttention, fused_model
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE
from warploom.engine.serving.execution.serving_model import NativeTransformer, serving_model
from warploom.engine.training import fused_block

SHAPE = {"vocab_size": 32, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}


@dataclasses.dataclass(frozen=True)
class Tomorrow(ModelConfig):
    """A configuration with a field that no executor has heard of."""

    twist: float = 1.0


def test_supported_refuses_a_field_it_never_heard_of():
    assert fused_block.is_supported(Tomorrow(**SHAPE))
    assert not fused_block.is_supported(Tomorrow(**SHAPE, twist=2.0))
    assert fused_block.is_supported.refused(Tomorrow(**SHAPE, twist=2.0)) == {"twist": 2.0}


def test_supported_joins_lists_and_conditions():
    even = Supported(SHAPE, {"norm": ("layernorm", "none")}, lambda c: c.n_layers % 2 == 0)
    assert even(ModelConfig(**SHAPE, norm="none"))
    assert not even(ModelConfig(**SHAPE))  # a list says all: the default is not in this one
    assert not even(ModelConfig(**SHAPE | {"n_layers": 3}, norm="none"))


@pytest.mark.skipif(not fused_block.fused_block.HAS_ROWS, reason="needs the C++ extension and a CPU with AVX-512")
def test_fused_block_leaves_replaced_parts_alone():
    model = Transformer(ModelConfig(**SHAPE))
    model.blocks[1].ffn = torch.nn.Identity()
    fused_block.install(model)
    assert [type(block) for block in model.blocks] == [fused_block.FusedBlock, Block]


def test_sharding_refuses_a_field_it_never_heard_of():
    with pytest.raises(ValueError, match=r"tp and ep cannot shard a model with twist=2\.0"):
        tensor_parallel.check(Tomorrow(**SHAPE, twist=2.0), tp=2)
    tensor_parallel.check(Tomorrow(**SHAPE, twist=2.0), tp=1)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_serving_falls_back_from_a_field_it_never_heard_of(quantize):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE)).eval()
    expected = model(torch.arange(8)[None])
    model.config = Tomorrow(**SHAPE, twist=2.0)
    served, head = serving_model(model, quantize)
    assert not isinstance(served, NativeTransformer) and head.needs_padding != HAS_NATIVE
    tolerance = 0.1 if quantize else 1e-4
    torch.testing.assert_close(head(served.hidden(torch.arange(8)[None])), expected, rtol=tolerance, atol=tolerance)
    assert not any(type(m) is PagedAttention for m in fused_model(model, None).modules())
