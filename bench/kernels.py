"""Kernel benchmark: correctness first, then time against peers and the roofline.

On a GPU, each op is first held to its oracle on the device, then timed at its large shapes, forward, and forward with
backward, against PyTorch eager, `torch.compile`, and whatever peers know the op. A memory-bound op is measured against
the copy bandwidth of this very run, a product against its matmul rate. At these sizes too the result has to be that of
eager PyTorch, and the same twice: races and offsets that overflow show nowhere else.

Without a GPU nothing is timed. What can be known is printed: registers, spills and shared memory of every kernel on
three architectures, from a compiler that needs no device.
"""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .. import kernels
from ..engine.errors import InputError
from ..kernels.core import tuned
from ..kernels.core.lang import architecture
from ..kernels.core.op import Case, Maker, Op, backend, ops
from ..kernels.gpu import attention_hopper
from ..kernels.tools import tuning, verify
from . import environment, harness, peers
from .harness import Machine, Part, chosen
from .schema import Row
from .timing import WallTimer, synchronize

ROOMS = ("kernels",)
IMPORTANCE = (
    "attention",
    "linear_cross_entropy",
    "moe",
    "paged_attention",
    "linear",
    "rms_norm",
    "swiglu_packed",
    "rope",
    "adamw_step",
    "sample",
)


CHECKS = 6
"""Small cases that an op must pass on the device before it is timed."""
MAX_RELATIVE_ERROR = 0.03
"""More than a few roundings of bfloat16, relative to the whole tensor."""
EAGER_IS_ORACLE_AT_SIZE = {"attention", "linear", "moe", "paged_attention"}
"""Ops whose reference is too slow at full size: eager PyTorch's best implementation stands in for it."""
POINTWISE = {"rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "rope", "cross_entropy", "adamw_step"}
"""Ops that `torch.compile` can fuse; for the others it would only cost minutes."""

LARGER_TILES = {
    "attention": (("attention_hopper_dkdv", {"BLOCK_M": 64}), ("attention_hopper_dq", {"BLOCK_N": 128})),
    "moe": (("moe_down", {"BLOCK_N": 256}), ("moe_dx", {"BLOCK_N": 256}), ("moe_gate_backward", {"BLOCK_N": 128})),
}
"""Tiles for Hopper that put less load on shared memory, and spill outside of the loop if at all: by the static model
attention's backward at a head size of 128 gains 10 to 25 %, and tensor cores are busy for 100 % of experts' products
instead of 80. Only a GPU decides."""


@dataclass(frozen=True)
class Options(harness.Options):
    """Options of `warploom bench kernels`."""

    budgets: bool = field(default=False, metadata={"help": "print what each kernel costs, compiled for absent GPUs"})
    tune: bool = field(default=False, metadata={"help": "search launch settings on this GPU and file the best"})
    dtype: str = field(default="bfloat16", metadata={"help": "precision of the inputs"})
    skip: str = field(default="", metadata={"help": "ops to leave out, separated by commas"})


def parts(options: Options) -> list[Part]:
    """Parts for every op, most important first: correctness, then speed."""
    device = options.device or environment.find_device()
    if options.budgets or device != "cuda":
        if device != "cuda":
            print("no GPU here: nothing is timed; these are static budgets, by the compiler alone", file=sys.stderr)
        named = chosen([part for op in fused_ops() for part in _parts_of(op, options.dtype)], options.only)
        print_budgets(dict.fromkeys(str(part.config["op"]) for part in named))
        return []
    fused = [op for op in fused_ops() if op.name not in options.skip.split(",")]
    if options.tune:
        return [Part(f"tune {op.name}", tune, {"op": op.name, "dtype": options.dtype}, 2) for op in fused if _large(op)]
    return [part for op in fused for part in _parts_of(op, options.dtype)]


def fused_ops() -> list[Op]:
    """Ops that have kernels, most important first."""
    return sorted((op for op in ops() if op.fused is not None), key=_rank)


def _parts_of(op: Op, dtype: str) -> list[Part]:
    parts = [Part(f"right: {op.name}", check, {"op": op.name}, 0.5)]
    for pass_ in ("forward", "both") if _trains(op) else ("forward",):
        config = {"op": op.name, "pass_": pass_, "dtype": dtype}
        parts += [Part(f"{op.name} {pass_}", compare, config, 0.5)] if _large(op) else []
    return parts


def print_budgets(names: Iterable[str]) -> None:
    """Print the resource table of `warploom.kernels.tools.compile_offline`, in an environment of its own."""
    command = [sys.executable, "-m", f"{kernels.__name__}.tools.compile_offline", "--table"]
    subprocess.run([*command, *names], check=False)


def check(machine: Machine, op: str) -> list[Row]:
    """Raise unless the op's first small cases are as accurate on this device as eager PyTorch.

    A handful, since each compiles kernels of its own and minutes are few; the tests go through all of them.
    """
    cases = [case for case in _op(op).cases if not case.bench][:CHECKS]
    found = [f"{c.name}: {text}" for c in cases for text in verify.errors(_op(op), c, torch.bfloat16, machine.device)]
    if found:
        raise AssertionError(f"{op} is wrong: " + "; ".join(found[:5]))
    return [Row(case="small cases", who="ours", extra={"checks": len(cases), "wrong": 0})]


def compare(machine: Machine, op: str, pass_: str, dtype: str) -> list[Row]:
    """Time the op's large cases, ours and peers."""
    rows = []
    for case in _large(_op(op)):
        args, options = case.build(Maker(getattr(torch, dtype), machine.device))
        moved, done = _work(_op(op), args, options, pass_)
        intense = done > 100 * moved
        contestants = _contestants(_op(op), args, options, pass_)
        difference = check_at_size(_op(op), args, options, pass_)
        rows += machine.compare(
            case.name,
            contestants,
            amount=done if intense else moved,
            unit="FLOP" if intense else "B",
            limits={f"matmul {dtype}": done} if intense else {"copy": moved},
            extra={"ours": {"host_us": host_microseconds(_op(op), machine), "difference": difference}},
        )
        del contestants, args
        if machine.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def check_at_size(op: Op, args: list, options: dict, pass_: str) -> float:
    """Error of our results against eager PyTorch at full size; raise if it is large, or if two runs differ.

    The distance is ‖ours − eager‖ / ‖eager‖, the largest over results and gradients; of whole numbers, the share that
    differs (two draws may fall on either side of a rounding)."""
    if op.mutates:
        return 0.0  # another call starts from other values
    with backend("triton"):
        first, again = (_results(op, args, options, pass_) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, again)):
        raise AssertionError(f"{op.name}: two runs on the same inputs differ")
    del again
    eager = _results(op.eager if op.name in EAGER_IS_ORACLE_AT_SIZE else op.reference, args, options, pass_)
    difference = max(map(_distance, first, eager), default=0.0)
    if not difference < MAX_RELATIVE_ERROR:
        raise AssertionError(f"{op.name}: {difference:.3g} away from eager PyTorch")
    return difference


def _results(function, args: list, options: dict, pass_: str) -> list[torch.Tensor]:
    """Results of a call, and for "both" its gradients."""
    with torch.set_grad_enabled(pass_ == "both"):
        results = verify.tensors(function(*args, **options))
        out = [x for x in results if x.requires_grad]
        wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
        seeds = [torch.ones_like(x) for x in out]
        return [x.detach() for x in results] + list(torch.autograd.grad(out, wanted, seeds) if out else ())


def _distance(ours: torch.Tensor, eager: torch.Tensor) -> float:
    if not ours.is_floating_point():
        return (ours != eager).float().mean().item()
    size = torch.linalg.vector_norm(eager, dtype=torch.float32)
    return (torch.linalg.vector_norm(ours - eager, dtype=torch.float32) / size.clamp(min=1e-30)).item()


def _contestants(op: Op, args: list, options: dict, pass_: str) -> peers.Contestants:
    def on(name):
        def call(*args, **options):
            with backend(name):
                return op(*args, **options)

        return call

    eager = (op.eager if op.name in EAGER_IS_ORACLE_AT_SIZE else None) or op.reference
    calls: peers.Contestants = {"ours": on("triton"), "torch eager": eager}
    if op.name in POINTWISE:
        calls["torch.compile"] = peers.compiled(eager)
    if op.name == "attention":
        calls["ours, portable"] = _portable(on("triton"))
    for kernel, tile in LARGER_TILES.get(op.name, ()) if pass_ == "both" and _hopper(args) else ():
        calls[f"ours, larger {kernel}"] = _trying(on("triton"), kernel, tile)
    calls |= peers.build("kernel", op.name, args, options)
    return {
        who: call if isinstance(call, peers.Missing) else _step(call, args, options, pass_)
        for who, call in calls.items()
    }


def _hopper(args: list) -> bool:
    return architecture(args[0].device) == 90


def _trying(call, kernel: str, settings: dict):
    """Variant of a call with other tile settings."""

    def tried(*args, **options):
        with tuned.trying(kernel, settings):
            return call(*args, **options)

    return tried


def _portable(call):
    """Variant of a call without Hopper's kernels."""

    def portable(*args, **options):
        chosen, attention_hopper.hopper_kernels = attention_hopper.hopper_kernels, set()
        try:
            return call(*args, **options)
        finally:
            attention_hopper.hopper_kernels = chosen

    return portable


def _step(function, args: list, options: dict, pass_: str):
    """The call to time: forward alone without autograd, or forward and backward."""
    wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]

    def forward():
        with torch.no_grad():
            return function(*args, **options)

    def both():
        out = [x for x in verify.tensors(function(*args, **options)) if x.requires_grad]
        torch.autograd.grad(out, wanted, [ones(x) for x in out])

    ones = _remembered(torch.ones_like)
    return forward if pass_ == "forward" else both


def _remembered(make):
    """Make the upstream gradient once, so that filling it is not timed."""
    made = {}

    def get(x):
        key = tuple(x.shape), x.dtype
        if key not in made:
            made[key] = make(x.detach())
        return made[key]

    return get


def host_microseconds(op: Op, machine: Machine, calls: int = 200) -> float:
    """Host time of a call: enqueueing it, on inputs too small to keep the device busy."""
    args, options = op.cases[0].build(Maker(torch.bfloat16, machine.device))
    step = _step(op, args, options, "forward")
    with backend("triton"):
        step()
        synchronize(machine.device)
        seconds = WallTimer().sample(step, calls)
        synchronize(machine.device)
    return seconds * 1e6


def tune(machine: Machine, op: str, dtype: str) -> list[Row]:
    """Search launch settings of the op's kernels at its large cases, and save faster ones."""
    rows, done = [], set()
    for case in _large(_op(op)):
        args, options = case.build(Maker(getattr(torch, dtype), machine.device))
        step = _step(_op(op), args, options, "both" if _trains(_op(op)) else "forward")
        prune = tuning.pruned_by_compiler(op, case.name, dtype, architecture(args[0].device))
        with backend("triton"):
            for kernel, seconds, best, settings in tuning.search(step, machine.timer, args[0].device, prune, done):
                extra = {"default_seconds": seconds, "best_seconds": best, "settings": str(settings)}
                rows.append(Row(f"{case.name}: {kernel}", "ours", extra=extra))
    return rows


def draw(record, path) -> None:
    """Draw a roofline of every timed case."""
    from .plots import roofline

    points, ceilings = [], {}
    for name, part in record.parts.items():
        ceilings |= part.ceilings
        op, _, pass_ = name.partition(" ")
        for row in part.rows:
            if row.seconds and row.who in ("ours", "torch.compile"):
                case = next(case for case in _op(op).cases if case.name == row.case)
                moved, done = _work(_op(op), *case.build(Maker(torch.bfloat16, "meta")), pass_)
                points.append((f"{row.who}: {op}", max(done, 1) / moved, max(done, 1) / row.seconds.median))
    peak = ceilings.get("matmul bfloat16", 0.0)
    if not points or not peak or "copy" not in ceilings:
        raise InputError("a roofline needs a memory-bound op and a product on record; run the bench without --only")
    roofline(points, bandwidth=ceilings["copy"], peak=peak, path=path, title=f"warploom kernels, {record.device}")


def _op(name: str) -> Op:
    return getattr(kernels, name)


def _large(op: Op) -> list[Case]:
    return [case for case in op.cases if case.bench]


def _trains(op: Op) -> bool:
    args, _ = op.cases[0].build(Maker())
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)


def _rank(op: Op) -> tuple:
    return IMPORTANCE.index(op.name) if op.name in IMPORTANCE else len(IMPORTANCE), op.name


def _work(op: Op, args: list, options: dict, pass_: str) -> tuple[float, float]:
    """(bytes moved at least, FLOPs) of a call."""
    both = [work(*args, **options) if work else (0, 0) for work in (op.traffic, op.flops)]
    return tuple(pair[0] + (pair[1] if pass_ == "both" else 0) for pair in both)
