"""Executors compute what they say they do; whatever they do not know falls back to the definition."""

import dataclasses

import pytest
import torch

from warploom.engine import rows
from warploom.engine.config import ModelConfig
from warploom.engine.executors import Supported
from warploom.engine.model import Block, Transformer

SHAPE = {"vocab_size": 32, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}


@dataclasses.dataclass(frozen=True)
class Tomorrow(ModelConfig):
    """A configuration with a field that no executor has heard of."""

    twist: float = 1.0


def test_supported_refuses_a_field_it_never_heard_of():
    assert rows.is_supported(Tomorrow(**SHAPE))
    assert not rows.is_supported(Tomorrow(**SHAPE, twist=2.0))
    assert rows.is_supported.refused(Tomorrow(**SHAPE, twist=2.0)) == {"twist": 2.0}


def test_supported_joins_lists_and_conditions():
    even = Supported(SHAPE, {"norm": ("layernorm", "none")}, lambda c: c.n_layers % 2 == 0)
    assert even(ModelConfig(**SHAPE, norm="none"))
    assert not even(ModelConfig(**SHAPE))  # a list says all: the default is not in this one
    assert not even(ModelConfig(**SHAPE | {"n_layers": 3}, norm="none"))


@pytest.mark.skipif(not rows.rows_cpu.HAS_ROWS, reason="needs the C++ extension and a CPU with AVX-512")
def test_fused_block_leaves_replaced_parts_alone():
    model = Transformer(ModelConfig(**SHAPE))
    model.blocks[1].ffn = torch.nn.Identity()
    rows.install(model)
    assert [type(block) for block in model.blocks] == [rows.FusedBlock, Block]
