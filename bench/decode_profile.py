"""Profile of a decoding step on a GPU: each kernel's share, and how long the device waits for the host.

python -m warploom.bench.decode_profile [--batch 32]
"""

import argparse
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from ..engine.config import ModelConfig
from .random_model import save_random
from .serve import Job, ours, workload

PROMPT, OUTPUT = 128, 64


def main(argv: list[str] | None = None) -> int:
    """Serve a few requests under PyTorch's profiler, and print what the device did."""
    parser = argparse.ArgumentParser(prog="python -m warploom.bench.decode_profile", description=main.__doc__)
    parser.add_argument("--batch", type=int, default=1)
    batch = parser.parse_args(argv).batch
    config = ModelConfig.preset("qwen3-0.6b")
    work = workload(batch, (PROMPT, PROMPT), (OUTPUT, OUTPUT), config.vocab_size)
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_random(config, "bfloat16", "cuda", directory, None)
        server = ours(Job(directory, "bfloat16", "cuda", batch, (PROMPT + OUTPUT,) * batch))
        server(work)  # compiles, and records graphs
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            server(work)
            torch.cuda.synchronize()
    spans = [(x.name, x.time_range) for x in profiled.events() or () if x.device_type.name == "CUDA"]
    print("\n".join(table(spans, OUTPUT)))
    return 0


def table(spans: list[tuple], steps: int) -> list[str]:
    """Lines of a table from what ran on the device, in microseconds: the busiest kernels, and the gaps between all."""
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
