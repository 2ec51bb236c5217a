"""Ahead-of-time compilation: registers, spills and shared memory of kernels on GPUs that are not present.

Triton's compiler needs no GPU. So: install a driver that only answers "which target?", turn every launch into a
compilation, and call the real op on meta tensors, which have shapes and strides but no memory. What compiles is
exactly what would run: same kernels, same tiles, same specialization. A call that asked the device for a value would
fail on the spot, so this also proves that no op waits for the GPU.

    python -m warploom.kernels.tools.compile_offline [--arch 90] [op ...]        # one line a kernel, then one JSON line

It wants the compiler where `lang.py` would not import it, so it starts its process anew with WARPLOOM_TRITON=1.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..core.lang import HAS_TRITON, INTERPRET, shared_memory
from ..core.op import Budget, Case, Maker, Op, backend, ops
from .clocks import hot_loop_clocks, tensor_share
from .verify import tensors

ARCHITECTURES = (80, 90, 100)
"""Those of the budgets: one of each generation of tensor cores."""
TARGETS = (80, 89, 90, 100, 120)
"""All that can be asked for; sm_89 and sm_120 have 99 KiB of shared memory."""
VECTOR_ACCESS = re.compile(
    r"(?:ld|st)\.global[^;]*\.v(?:4\.[bf]32|8\.[bf]32|[24]\.b64)|cp\.async\.c[ga][^;]*, 0x10|cp\.async\.bulk"
)
SPILL = re.compile(r"\b(?:LDL|STL)\b")
SCALAR_ACCESS = re.compile(r"(?:ld|st)\.global[.\w:]*\.b(?:8|16) ")


@dataclass(slots=True)
class Cost:
    """Resources of one compiled kernel on one architecture."""

    op: str
    case: str
    dtype: str
    arch: int
    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int
    wgmma: bool
    vector_accesses: int
    scalar_accesses: int
    loop_spills: int = 0
    """Accesses to spilled registers inside innermost loops, outside of which spilling costs next to nothing."""
    loops: int = 0
    wgmma_pending: int = 0
    """Products that a warp group has under way at most when it waits inside a loop; 0: each is waited for at once."""
    copies_pending: int = 0
    """Groups of `cp.async` under way at most when a loop waits for one: how far ahead it loads."""
    tensor_clocks: int = 0
    shared_clocks: int = 0
    """What one iteration of the hot loops asks of tensor cores and of shared memory on sm_90 (`clocks.py`)."""
    loop_barriers: int = 0
    """Barriers of a whole program in innermost loops without a product."""
    int32_offset_products: list[str] = field(default_factory=list)
    """32-bit products of run-time values that reach an address: an overflow beyond 2³¹ elements."""
    failure: str = ""
    """The compiler's message if it gave up."""


class _AbsentDevice:
    def __init__(self, arch: int | str):
        self.target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


@contextlib.contextmanager
def compiling_for(arch: int | str) -> Iterator[list]:
    """Context that records, instead of running, the kernels launched inside for sm_<arch> or "gfx942"."""
    found, launch = [], JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        self.device_caches.clear()  # the cache is keyed by device, and ours changes its architecture
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.append(kernel)
        return kernel

    driver.set_active(_AbsentDevice(arch))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch
        driver._active = None  # reset_active() would look for a real driver


def costs(op: Op, case: Case, dtype: torch.dtype, arch: int) -> list[Cost]:
    """Resources of every distinct kernel in the forward and backward of a case."""
    return [_cost(op, case, dtype, arch, kernel) for kernel in compiled(op, case, dtype, arch)]


def compiled(op: Op, case: Case, dtype: torch.dtype, arch: int | str) -> list:
    """Compile every distinct kernel in the forward and backward of a case."""
    with backend("triton"), compiling_for(arch) as kernels:
        args, options = case.build(Maker(dtype, "meta"))
        result = op(*args, **options)
        outputs = [x for x in tensors(result) if x.requires_grad]
        wanted = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
        if outputs and wanted:
            torch.autograd.grad(outputs, wanted, [torch.empty_like(x) for x in outputs], allow_unused=True)
    return list({kernel.hash: kernel for kernel in kernels}.values())


def _cost(op, case, dtype, arch, kernel) -> Cost:
    cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
    registers, stack = _resources(cubin)
    inner, warps = innermost_loops(ptx), kernel.metadata.num_warps
    tensor, shared = hot_loop_clocks(inner, warps, "setmaxnreg" in ptx)
    return Cost(
        op=op.name,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        arch=arch,
        kernel=kernel.metadata.name,
        warps=warps,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        vector_accesses=len(VECTOR_ACCESS.findall(ptx)),
        scalar_accesses=len(SCALAR_ACCESS.findall(ptx)),
        loop_spills=sum(len(SPILL.findall(loop)) for loop in innermost_loops(disassembled(cubin))) if stack else 0,
        loops=len(inner),
        wgmma_pending=_most(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", inner),
        copies_pending=_most(r"cp\.async\.wait_group\s+(\d+)", inner),
        tensor_clocks=tensor,
        shared_clocks=shared,
        loop_barriers=sum(loop.count("bar.sync") for loop in inner if "mma" not in loop),
        int32_offset_products=int32_offset_products(kernel.asm["ttir"]),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", _tool_output("cuobjdump", "-res-usage", cubin)).groups()
    return int(registers), int(stack)


def disassembled(cubin: bytes) -> str:
    """SASS of a kernel (cubin)."""
    return _tool_output("nvdisasm", "-c", cubin)


def _tool_output(tool: str, flag: str, cubin: bytes) -> str:
    """Output of a binary tool that comes with Triton."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True).stdout


def innermost_loops(assembly: str) -> list[str]:
    """Innermost loops of PTX or SASS, as text: from a label to a branch back to it.

    A warp-specialized kernel's warps wait for work in a loop around all they do; it is none of these."""
    lines, labels, found = assembly.splitlines(), {}, []
    for n, line in enumerate(lines):
        label = re.match(r"\s*([$.]L[\w$]+):", line)
        if label:
            labels[label[1]] = n
        target = re.search(r"\b(?:bra|BRA)\b.*?([$.]L[\w$]+)", line)
        if target and labels.get(target[1], n) < n - 1:  # code ends with a branch to itself
            found.append((labels[target[1]], n))
    inner = [one for one in found if not any(one != other and _holds(one, other) for other in found)]
    return ["\n".join(lines[first : last + 1]) for first, last in inner]


def _holds(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop[0] <= other[0] and other[1] <= loop[1] and (loop[0], -loop[1]) != (other[0], -other[1])


def _most(pattern: str, texts: list[str]) -> int:
    return max((int(n) for text in texts for n in re.findall(pattern, text)), default=0)


def int32_offset_products(ttir: str) -> list[str]:
    """Lines of TTIR with 32-bit products used as memory offsets, which would wrap beyond 2³¹ elements.

    An offset is what is added to a pointer, and what sums to that. A 64-bit product is a safe offset, and its factors
    are mere indices (a row, a page), which may be 32-bit. Columns counted from zero need no product at all, and a
    product with a truth value makes nothing larger.
    """
    defined = dict(re.findall(r"^\s*(%[\w#]+)(?::\d+)? = (.*)$", ttir, re.MULTILINE))
    pending = [operand for text in defined.values() if text.startswith("tt.addptr") for operand in _operands(text)[1:2]]
    found, seen = [], set()
    while pending:
        name = pending.pop()
        text = defined.get(name, "tt.load")
        if name in seen or text.startswith(("tt.load", "scf.")):
            continue
        seen.add(name)
        masking = any(re.match(r"arith.extui .*i1>? to", defined.get(factor, "")) for factor in _operands(text))
        if masking or not text.startswith("arith.muli"):
            pending += _operands(text)
        elif re.search(r": (?:tensor<[\dx]*x)?i32", text):
            found.append(f"{name} = {text.split(' loc(')[0]}")
    return found


def _operands(text: str) -> list[str]:
    return re.findall(r"%[\w#]+", text.split(" : ")[0])


def violations(cost: Cost, budget: Budget) -> list[str]:
    """One sentence for each way in which a kernel exceeds its budget."""
    if cost.failure:
        return [f"does not compile: {cost.failure}"]
    found = []
    if cost.registers > budget.registers:
        found.append(f"{cost.registers} registers, budget {budget.registers}")
    if cost.stack > budget.stack:
        found.append(f"{cost.stack} bytes of stack, budget {budget.stack}")
    if cost.loop_spills:
        found.append(f"{cost.loop_spills} accesses to spilled registers inside a loop")
    if cost.arch == 90 and cost.copies_pending < budget.copies:
        found.append(f"loads {cost.copies_pending} tiles ahead, budget {budget.copies}")
    if cost.arch == 90 and cost.wgmma_pending < budget.products:
        found.append(f"{cost.wgmma_pending} products under way in its loop, budget {budget.products}")
    if cost.arch == 90 and tensor_share(cost.tensor_clocks, cost.shared_clocks) < budget.tensor_share:
        found.append(f"{cost.tensor_clocks} clocks of tensor cores wait for {cost.shared_clocks} of shared memory")
    if budget.streams and cost.loop_barriers:
        found.append(f"{cost.loop_barriers} barriers in its loop")
    if cost.shared > min(budget.shared, shared_memory(cost.arch)):
        found.append(f"{cost.shared} bytes of shared memory, budget {min(budget.shared, shared_memory(cost.arch))}")
    if budget.wgmma and cost.arch == 90 and not cost.wgmma:
        found.append("no wgmma instruction on sm_90")
    if budget.vector and not cost.vector_accesses:
        found.append("no 16-byte access to global memory")
    found += [f"32-bit address arithmetic: {line}" for line in cost.int32_offset_products]
    return found


def budget_of(op: Op, kernel: str) -> Budget:
    return op.budget if isinstance(op.budget, Budget) else op.budget.get(kernel, Budget())


def survey(names: list[str], architectures=ARCHITECTURES, dtype=torch.bfloat16, small=False) -> Iterator[Cost]:
    """Resources of every large case (or every small one) of the named ops (of all, without names)."""
    for op in ops():
        if op.fused is None or (names and op.name not in names):
            continue
        for arch in architectures:
            for case in op.cases:
                if case.bench == small:
                    continue
                try:
                    yield from costs(op, case, dtype, arch)
                except Exception as error:  # one kernel that does not compile must not hide the others
                    name = str(dtype).removeprefix("torch.")
                    said = f"{type(error).__name__}: {error}".splitlines()[0]
                    yield Cost(op.name, case.name, name, arch, "(none)", 0, 0, 0, 0, False, 0, 0, failure=said)


def row(cost: Cost) -> str:
    """Format one line of the table."""
    return (
        f"{cost.op:20} {cost.case[:26]:26} sm_{cost.arch:<3} {cost.kernel:30} {cost.warps:2} warps"
        f" {cost.registers:3} registers {cost.stack:3} stack {cost.shared:6} shared {'wgmma' if cost.wgmma else '':5}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="names of ops; all by default")
    parser.add_argument(
        "--arch", type=int, action="append", choices=TARGETS, help="a target; 80, 90 and 100 by default"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--small", action="store_true", help="the small cases of the tests: no budget, but no spills")
    parser.add_argument("--table", action="store_true", help="for people: no JSON line at the end")
    options = parser.parse_args()
    if INTERPRET or not HAS_TRITON:
        os.environ |= {"WARPLOOM_TRITON": "1", "TRITON_INTERPRET": "0"}
        os.execv(sys.executable, sys.orig_argv)
    rows, broken = [], 0
    by_name = {op.name: op for op in ops()}
    if unknown := [name for name in options.ops if name not in by_name]:
        parser.error(f"there is no op {unknown[0]!r}; there are: {', '.join(by_name)}")
    for cost in survey(options.ops, options.arch or ARCHITECTURES, getattr(torch, options.dtype), options.small):
        budget = Budget() if options.small else budget_of(by_name[cost.op], cost.kernel)
        found = violations(cost, budget)
        broken += bool(found)
        rows.append({**asdict(cost), "violations": found})
        print(row(cost), "; ".join(found), flush=True)
    if not options.table:
        print(json.dumps(rows))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
