"""One of two processes that load their shares of models: how much more memory that took than the files, which are
mapped and shared; beside it, what loading the whole takes.
"""

import torch
import torch.distributed as dist

from tests.processes import give_memory_back, join_run
from warploom.engine.formats.model_directory import load_model
from warploom.engine.memory import PeakMemory


def growth(place, group):
    with PeakMemory("cpu") as peak:
        model = load_model(place, "cpu", tp=group)[0]
    assert not any(p.is_meta for p in model.parameters())
    return peak.bytes - sum(file.stat().st_size for file in place.glob("*.safetensors"))


def main(rank, port, places):
    join_run(rank, 2, port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    give_memory_back()
    first, *others = places
    growth(first, dist.group.WORLD)  # loads the libraries
    for place in others:
        size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        share, whole = growth(place, dist.group.WORLD), growth(place, None)
        assert whole > 0.8 * size, f"{place.name}: the whole of {size} bytes in {whole}?"
        assert share < 0.75 * size, f"{place.name}: a half of {size} bytes took {share}"
    dist.destroy_process_group()
