"""Correctness check of fused and eager implementations against float64; for tests on a CPU and benchmarks on a GPU.

The rule: our largest error is at most twice that of the same formula in eager PyTorch at the same precision, both
measured against float64, plus a floor of a few roundings of the result. Gradients are held to the same.

In a steep case (scores in the hundreds under an exponential) a formula's error is one draw from a wide distribution,
and the order in which this make of CPU takes its sums draws it. There "that of the same formula" is the largest of it
and of what 16 random roundings of the inputs do to the exact result, which is the same everywhere.

    python -m warploom.kernels.tools.verify attention [--dtype float32]      # on the GPU, if there is one

checks one op in a process of its own: a kernel that reads a wrong address costs the whole process its GPU.
"""

import argparse
import inspect
import sys
from collections.abc import Callable

import torch

from ..core.op import Case, Maker, Op, backend, ops


def errors(op: Op, case: Case, dtype: torch.dtype, device: str, path: str = "triton") -> list[str]:
    """One sentence for each wrong result or gradient of a case on backend `path`."""
    exact = call(op, case, op.reference, Maker(dtype), double)
    plain = [call(op, case, op.reference, Maker(dtype, device))]
    if case.steep:
        plain += [call(op, case, op.reference, Maker(dtype), perturbed(seed)) for seed in range(16)]
    with backend(path):
        ours = call(op, case, op, Maker(dtype, device))
    found = []
    for kind, mine, true, *theirs in zip(("result", "gradient"), ours, exact, *plain):
        if len(mine) != len(true):
            found.append(f"{len(mine)} {kind}s instead of {len(true)}")
        for i, (x, y, *others) in enumerate(zip(mine, true, *theirs)):
            wrong = _wrong(x, others, y, dtype)
            found += [f"{kind} {i}: {wrong}"] if wrong else []
    return found


def call(
    op: Op, case: Case, function: Callable, maker: Maker, convert: Callable = lambda x: x
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a case; return its results (or what it writes in place) and the gradients of all inputs that require one."""
    args, options = case.build(maker)
    args, options = [convert(x) for x in args], {name: convert(x) for name, x in options.items()}
    outputs = tensors(function(*args, **options))
    given = {**options, **dict(zip(parameters(op), args))}
    outputs += [given[name] for name in op.mutates if given.get(name) is not None]
    wanted = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    grown = [x for x in outputs if x.requires_grad]
    if not wanted or not grown:
        return outputs, []
    seeds = Maker(maker.dtype, maker.device, seed=1)
    return outputs, list(torch.autograd.grad(grown, wanted, [upstream(seeds, x, case.expanded) for x in grown]))


def upstream(seeds: Maker, x: torch.Tensor, expanded: bool) -> torch.Tensor:
    """Upstream gradient of result x; `expanded` has stride 0, as from `.sum()`."""
    if expanded and x.dim():
        return seeds.normal(1, grad=False).to(x.dtype).expand(x.shape)
    return seeds.normal(*x.shape, grad=False).to(x.dtype)


def tensors(result) -> list[torch.Tensor]:
    """Flatten an op's results to tensors, in order."""
    return [result] if isinstance(result, torch.Tensor) else [x for item in result or () for x in tensors(item)]


def parameters(op: Op) -> list[str]:
    """Parameter names of an op."""
    return list(inspect.signature(op.reference).parameters)


def double(x):
    """A float tensor as float64, requiring a gradient if it did; anything else unchanged."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype.itemsize == 1:
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def perturbed(seed: int) -> Callable:
    """`double` with random perturbations of float32's rounding size: the conditioning of the case."""
    generator, ulp = torch.Generator().manual_seed(seed), torch.finfo(torch.float32).eps

    def convert(x):
        exact = double(x)
        if exact is x:
            return x
        rounding = torch.randn(x.shape, generator=generator, dtype=torch.float64) * ulp / 2
        return (exact.detach() * (1 + rounding)).requires_grad_(exact.requires_grad)

    return convert


def _wrong(ours, formulas, exact, dtype) -> str:
    if ours.shape != exact.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    if not ours.is_floating_point():
        return "" if torch.equal(ours.cpu(), exact.cpu()) else "differs"
    if not exact.numel():
        return ""
    ours, exact, *formulas = (x.detach().double().cpu() for x in (ours, exact, *formulas))
    if exact.isfinite().all() and not ours.isfinite().all():
        return "is not finite"
    floor = 4 * torch.finfo(dtype).eps * exact.abs().max() + 4 * torch.finfo(torch.float32).eps
    mine, theirs = (ours - exact).abs().max(), max((x - exact).abs().max() for x in formulas)
    return "" if mine <= 2 * theirs + floor else f"our error {mine:.3g}, the formula's {theirs:.3g}, floor {floor:.3g}"


def nondeterministic(op: Op, case: Case, dtype: torch.dtype, device: str) -> bool:
    """Return whether two calls on the same inputs differ in any bit."""
    with backend("triton"):
        first, again = (call(op, case, op, Maker(dtype, device)) for _ in range(2))
    return not all(torch.equal(a, b) for a, b in zip([*first[0], *first[1]], [*again[0], *again[1]]))


def synchronizes(op: Op) -> str:
    """Return PyTorch's message if the op's first case synchronizes with the GPU."""
    case = op.cases[0]
    with backend("triton"):
        call(op, case, op, Maker(torch.bfloat16, "cuda"))  # compiles, which may wait
        args, options = case.build(Maker(torch.bfloat16, "cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [x for x in tensors(op(*args, **options)) if x.requires_grad]
            wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
            if results and wanted:
                torch.autograd.grad(results, wanted, [torch.ones_like(x) for x in results])
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ""


def graph_replay_differs(op: Op) -> bool:
    """Return whether replaying a CUDA graph of the op's first case gives other bits than a plain call."""
    with backend("triton"), torch.no_grad():
        args, options = op.cases[0].build(Maker(torch.bfloat16, "cuda"))
        kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        expected = tensors(op(*args, **options)) + [x for x in args if isinstance(x, torch.Tensor)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = tensors(op(*kept, **options))
        graph.replay()
        torch.cuda.synchronize()
        results += [x for x in kept if isinstance(x, torch.Tensor)]
    return not all(torch.equal(a, b) for a, b in zip(results, expected))


def main(argv: list[str] | None = None) -> int:
    """Check all small cases of one op in one dtype; print a line for each error, return their number."""
    parser = argparse.ArgumentParser(prog="python -m warploom.kernels.tools.verify", description=main.__doc__)
    parser.add_argument("op", choices=[op.name for op in ops() if op.fused is not None])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--share", default="1/1", help="2/3: only the second third of the cases")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    op = next(op for op in ops() if op.name == options.op)
    share, shares = map(int, options.share.split("/"))
    cases = [case for case in op.cases if not case.bench][share - 1 :: shares]
    dtype, found = getattr(torch, options.dtype), 0
    for case in cases:
        try:
            wrong = errors(op, case, dtype, options.device)
            wrong += ["two calls differ"] if nondeterministic(op, case, dtype, options.device) else []
        except Exception as error:
            wrong = [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"]
        found += bool(wrong)
        print("".join(f"{op.name} {options.dtype}, {case.name}: {text}\n" for text in wrong), end="", flush=True)
    if options.device == "cuda" and dtype == torch.bfloat16 and share == 1:
        for wrong in (synchronizes(op), "a CUDA graph gives other bits" if graph_replay_differs(op) else ""):
            found += bool(wrong)
            print(f"{op.name}, {op.cases[0].name}: {wrong}\n" if wrong else "", end="", flush=True)
    print(f"{op.name} {options.dtype}: {len(cases)} cases, {found} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
