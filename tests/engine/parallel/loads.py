"""One of two processes that load their shares of models: how much more memory that took than the files, which are
mapped and shared; beside it, what loading the whole takes. The C library gives freed tensors back, as it does by itself
with those of a large model.
"""

import ctypes
import os

import torch
import torch.distributed as dist

from warploom.engine.formats.model_directory import load_model
from warploom.engine.memory import PeakMemory

os.environ |= {"RANK": str(RANK), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}  # noqa: F821
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the test's, as it is torchrun's elsewhere
torch.set_num_threads(1)
dist.init_process_group("gloo")
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h
for setting in (MMAP_THRESHOLD, TRIM_THRESHOLD):
    ctypes.CDLL(None).mallopt(setting, 1 << 16)


def growth(place, group):
    with PeakMemory("cpu") as peak:
        model = load_model(place, "cpu", tp=group)[0]
    assert not any(p.is_meta for p in model.parameters())
    return peak.bytes - sum(file.stat().st_size for file in place.glob("*.safetensors"))


first, *others = PLACES  # noqa: F821
growth(first, dist.group.WORLD)  # loads the libraries
for place in others:
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    share, whole = growth(place, dist.group.WORLD), growth(place, None)
    assert whole > 0.8 * size, f"{place.name}: the whole of {size} bytes in {whole}?"
    assert share < 0.75 * size, f"{place.name}: a half of {size} bytes took {share}"
dist.destroy_process_group()
