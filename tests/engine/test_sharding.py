"""A model in two processes is the model in one: logits, losses, gradients, what it generates."""

import multiprocessing
import runpy
from pathlib import Path

import pytest
import torch

from warploom.engine.config import ModelConfig

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def test_pieces_compute_what_the_whole_computes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warploom.engine.sharding", "torch.distributed"])
    script = str(Path(__file__).with_name("shards.py"))
    given = [{"RANK": rank, "PORT": store.port} for rank in range(2)]
    team = [context.Process(target=runpy.run_path, args=(script, names), daemon=True) for names in given]
    for process in team:
        process.start()
    for process in team:
        process.join()
    assert [process.exitcode for process in team] == [0, 0]


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
def test_what_cannot_be_cut_evenly_is_refused_in_one_sentence(changes, pieces, reason):
    from warploom.engine.sharding import check

    config = ModelConfig(**{"vocab_size": 50, "d_model": 64, "position": "none", **changes})
    with pytest.raises(ValueError, match=reason):
        check(config, *pieces)
