"""GPU profile of decoding steps: share of each kernel, and gaps in which the device waits for the host.

python -m warploom.bench.decode_profile [--batch 1 32]
"""

import argparse
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from ..engine.config import ModelConfig
from .random_model import save_random
from .serve import Job, Server, ours, workload

PROMPT, OUTPUT = 128, 64


def main(argv: list[str] | None = None) -> int:
    """Serve batches under PyTorch's profiler and print the device's timeline."""
    parser = argparse.ArgumentParser(prog="python -m warploom.bench.decode_profile", description=main.__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 32))
    batches = parser.parse_args(argv).batch
    config = ModelConfig.preset("qwen3-0.6b")
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_random(config, "bfloat16", "cuda", directory, None)
        for batch in batches:
            server = ours(Job(directory, "bfloat16", "cuda", batch, (PROMPT + OUTPUT,) * batch))
            work = workload(batch, (PROMPT, PROMPT), (OUTPUT, OUTPUT), config.vocab_size)
            lines = table(profiled(server, work), OUTPUT)
            print("\n".join([f"batch {batch}: {lines[0]}", *lines[1:]]), flush=True)
    return 0


def profiled(server: Server, work: list) -> list[tuple]:
    """Kernel names and times of a workload's second run (the first compiles and captures graphs)."""
    server(work)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        server(work)
        torch.cuda.synchronize()
    return [(x.name, x.time_range) for x in found.events() or () if x.device_type.name == "CUDA"]


def table(spans: list[tuple], steps: int) -> list[str]:
    """Format device spans, in microseconds: the busiest kernels, and the gaps between all."""
    if not spans:
        return ["the profiler saw nothing on the device"]
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    end, busy = 0.0, 0.0
    for name, span in sorted(spans, key=lambda one: one[1].start):
        total[name] += span.end - span.start
        count[name] += 1
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    whole = end - min(span.start for _, span in spans)
    lines = [f"{whole / steps:.0f} µs a step, {100 * busy / whole:.0f} % of it busy, {len(spans) / steps:.0f} launches"]
    return lines + [
        f"{us / steps:8.1f} µs {count[name] / steps:6.1f} × {name[:80]}" for name, us in total.most_common(25)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
