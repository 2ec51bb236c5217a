"""GPU smoke test: one line for each prerequisite of the session, in its first seconds.

python -m warploom.bench.smoke
"""

import hashlib
import time
from collections.abc import Callable

import torch

from .. import kernels
from ..kernels.gpu import attention_hopper
from ..kernels.tools import verify


def toolchain() -> str:
    """Key of the toolchain that compiled kernels depend on: a cache made with the same key is valid here."""
    import triton
    from triton.runtime.cache import triton_key

    key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, key {key}"


def addmm_float32() -> str:
    """Mixed-dtype products of `linear_cross_entropy`, which older PyTorch versions refuse; the first writes to
    uninitialized memory."""
    a, b = (torch.randn(shape, device="cuda").bfloat16() for shape in ((64, 16), (16, 32)))
    total = torch.full((64, 32), torch.nan, device="cuda")
    for beta in (0, 1):
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    return f"off by {(total - 2 * a.float() @ b.float()).abs().max().item():.1e}"


def small(op: kernels.Op) -> str:
    """Check the op's first small case against its oracle, forward and backward."""
    return "; ".join(verify.errors(op, op.cases[0], torch.bfloat16, "cuda")) or "right"


def portable() -> str:
    """Check attention without Hopper's kernels."""
    chosen, attention_hopper.hopper_kernels = attention_hopper.hopper_kernels, set()
    try:
        return small(kernels.attention)
    finally:
        attention_hopper.hopper_kernels = chosen


def graph() -> str:
    """Capture and replay a CUDA graph of paged attention."""
    return "other bits" if verify.graph_replay_differs(kernels.paged_attention) else "same bits"


STEPS: dict[str, Callable[[], str]] = {
    "toolchain": toolchain,
    "addmm into float32": addmm_float32,
    "rms_norm": lambda: small(kernels.rms_norm),
    "attention, portable": portable,
    "moe": lambda: small(kernels.moe),
    "paged_attention": lambda: small(kernels.paged_attention),
    "a graph of paged_attention": graph,
    "attention": lambda: small(kernels.attention),
}
"""Checks in order: those most likely to hang, or to cost the process its GPU, come last."""


def main() -> int:
    """Run every step even if others fail; return the number of failures."""
    failed = 0
    for name, step in STEPS.items():
        begin = time.perf_counter()
        try:
            said = step()
            torch.cuda.synchronize()
        except Exception as error:
            said = f"FAILED {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        failed += said.startswith("FAILED")
        print(f"{name:28} {time.perf_counter() - begin:6.2f} s  {said}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
