"""A model in two processes is the model in one: logits, losses, gradients, what it generates."""

import pytest
import torch

from tests.engine.parallel import loads, shards
from tests.processes import run_processes
from warploom.engine.config import ModelConfig
from warploom.engine.formats.model_writer import save_model
from warploom.engine.memory import RESET
from warploom.engine.model import Transformer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def in_two(monkeypatch):
    """Runs a function in two processes, and returns how they ended."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return in_two_processes


def in_two_processes(main, **given):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet
    return run_processes(main, port=store.port, **given)


def test_pieces_compute_what_the_whole_computes(in_two):
    assert in_two(shards.main) == [0, 0]


@pytest.mark.skipif(not RESET.exists(), reason="only Linux tells the peak memory of a process")
def test_who_loads_a_share_never_holds_much_more(in_two, tmp_path):
    shape = {"vocab_size": 4096, "d_model": 256, "n_layers": 12, "n_heads": 4}
    experts = {"n_layers": 6, "n_experts": 4, "d_ff": 512}
    configs = [{"n_layers": 1}, {}, {"tie_embeddings": False}, experts]
    places = [tmp_path / f"model {number}" for number in range(len(configs))]
    for place, changes in zip(places, configs):
        save_model(Transformer(ModelConfig(**shape | changes)), place)
    assert in_two(loads.main, places=places) == [0, 0]


@pytest.mark.parametrize(
    "changes, pieces, reason",
    [
        ({"n_kv_heads": 1}, (2, 1), "tp=2 does not divide n_kv_heads=1"),
        ({"n_heads": 9, "d_model": 63}, (2, 1), "tp=2 does not divide n_heads=9"),
        ({"d_ff": 65}, (2, 1), "tp=2 does not divide d_ff=65"),
        ({}, (1, 2), "ep=2 does not divide n_experts=0"),
        ({"n_experts": 3}, (1, 2), "ep=2 does not divide n_experts=3"),
    ],
)
def test_tp_uneven_split_refused(changes, pieces, reason):
    """What cannot be cut evenly is refused in one sentence."""
    from warploom.engine.parallel.tensor_parallel import check

    config = ModelConfig(**{"vocab_size": 50, "d_model": 64, "position": "none", **changes})
    with pytest.raises(ValueError, match=reason):
        check(config, *pieces)
