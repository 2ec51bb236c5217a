"""Is a fused twin, or an eager one, right? Tests ask it on a CPU, benchmarks on a GPU before they time anything.

The rule: our largest error is at most twice that of the same formula in eager PyTorch at the same precision, both
measured against float64, plus a floor of a few roundings of the result. Gradients are held to the same.
"""

import inspect
from collections.abc import Callable

import torch

from .op import Case, Maker, Op, backend


def errors(op: Op, case: Case, dtype: torch.dtype, device: str, path: str = "triton") -> list[str]:
    """Sentences, one for each result or gradient of a case that is wrong on backend `path`; none if all is well."""
    exact = call(op, case, op.reference, Maker(dtype), double)
    eager = call(op, case, op.reference, Maker(dtype, device))
    with backend(path):
        ours = call(op, case, op, Maker(dtype, device))
    found = []
    for kind, mine, plain, true in zip(("result", "gradient"), ours, eager, exact):
        if len(mine) != len(true):
            found.append(f"{len(mine)} {kind}s instead of {len(true)}")
        for i, three in enumerate(zip(mine, plain, true)):
            wrong = _wrong(*three, dtype)
            found += [f"{kind} {i}: {wrong}"] if wrong else []
    return found


def call(
    op: Op, case: Case, function: Callable, maker: Maker, convert: Callable = lambda x: x
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a case returns or writes in place, and the gradients of all inputs that want one."""
    args, options = case.build(maker)
    args, options = [convert(x) for x in args], {name: convert(x) for name, x in options.items()}
    outputs = tensors(function(*args, **options))
    given = {**options, **dict(zip(parameters(op), args))}
    outputs += [given[name] for name in op.mutates if given.get(name) is not None]
    wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    grown = [x for x in outputs if x.requires_grad]
    if not wanted or not grown:
        return outputs, []
    seeds = Maker(maker.dtype, maker.device, seed=1)
    return outputs, list(torch.autograd.grad(grown, wanted, [upstream(seeds, x, case.expanded) for x in grown]))


def upstream(seeds: Maker, x: torch.Tensor, expanded: bool) -> torch.Tensor:
    """A gradient to send back from the result x; `expanded` has stride 0, as from `.sum()`."""
    if expanded and x.dim():
        return seeds.normal(1, grad=False).to(x.dtype).expand(x.shape)
    return seeds.normal(*x.shape, grad=False).to(x.dtype)


def tensors(result) -> list[torch.Tensor]:
    """The tensors of whatever an op returned, in order."""
    return [result] if isinstance(result, torch.Tensor) else [x for item in result or () for x in tensors(item)]


def parameters(op: Op) -> list[str]:
    """The names of an op's parameters."""
    return list(inspect.signature(op.reference).parameters)


def double(x):
    """A floating-point tensor as float64, with a gradient if it wants one; anything else as it is."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype.itemsize == 1:
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def _wrong(ours, eager, exact, dtype) -> str:
    if ours.shape != exact.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    if not ours.is_floating_point():
        return "" if torch.equal(ours.cpu(), exact.cpu()) else "differs"
    if not exact.numel():
        return ""
    ours, eager, exact = (x.detach().double().cpu() for x in (ours, eager, exact))
    if exact.isfinite().all() and not ours.isfinite().all():
        return "is not finite"
    floor = 4 * torch.finfo(dtype).eps * exact.abs().max() + 4 * torch.finfo(torch.float32).eps
    mine, theirs = (ours - exact).abs().max(), (eager - exact).abs().max()
    return "" if mine <= 2 * theirs + floor else f"our error {mine:.3g}, eager's {theirs:.3g}, floor {floor:.3g}"
