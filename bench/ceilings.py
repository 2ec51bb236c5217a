"""Measured ceilings of the machine (bandwidth, matmul FLOP/s): denominators of all utilization figures.

A datasheet's peak is rarely reached. These are rates this machine reached minutes ago, under the same load and clocks
as the contestants: `copy` (bytes read plus bytes written), `read` (bytes read), and
`matmul <dtype>` (a large square product by the vendor's library, or by training's own where that is faster; FLOPs, two
a multiply-add).
"""

from functools import partial

from .timing import Call, Timer, interleave

RATES = ("copy", "read", "matmul float32", "matmul bfloat16", "matmul float16", "matmul int8")


def measure(name: str, device: str, timer: Timer, *, rounds: int = 7, seconds: float = 3.0) -> float:
    """Measure the rate `name` on `device`, in bytes or FLOPs a second: the best median of several implementations."""
    if name not in RATES:
        raise ValueError(f"ceiling is {name!r}; known are {', '.join(RATES)}")
    amount, ways = _matmul(name.split()[1], device, timer) if name.startswith("matmul") else _stream(name, device)
    samples = interleave(ways, timer, rounds=rounds, seconds=seconds)
    return amount / min(sorted(times)[len(times) // 2] for times in samples.values())


def _stream(name: str, device: str) -> tuple[float, dict[str, Call]]:
    import torch

    source = torch.ones((2**30 if device == "cuda" else 2**28) // 4, device=device)
    if name == "read":
        wide = source.view(torch.int64)
        return source.nbytes, {"sum": source.sum, "max": source.max, "sum int64": wide.sum}
    target = torch.empty_like(source)
    return 2 * source.nbytes, {"copy": lambda: target.copy_(source)}


def _matmul(dtype: str, device: str, timer: Timer) -> tuple[float, dict[str, Call]]:
    """Square matrix product, grown until one call takes some 20 ms or the size amortizes everything.

    Where a dtype is slow (float16 on most CPUs), growing keeps the probe itself from taking minutes."""
    import torch

    size, largest = 256, 8192 if device == "cuda" else 2048
    while True:
        product = _product(torch, dtype, device, size)
        timer.sample(product, 1)
        if size >= largest or timer.sample(product, 1) > 0.02:
            return 2 * size**3, {"matmul": product} | _ours(torch, dtype, device, size)
        size *= 2


def _product(torch, dtype: str, device: str, size: int) -> Call:
    if dtype == "int8":
        a, b = (torch.randint(-127, 127, (size, size), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b.t()


def _ours(torch, dtype: str, device: str, size: int) -> dict[str, Call]:
    """The same product by our GEMM, on CPUs where training uses it: the ceiling must not be lower than that."""
    from ..kernels.cpu import gemm

    if device != "cpu" or dtype == "int8":
        return {}
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    return {"ours": partial(gemm.Packed(b, both=False).multiply, a)} if gemm.fits(a, b) else {}
