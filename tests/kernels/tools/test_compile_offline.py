"""What kernels cost on GPUs that are not there, held to each op's budget."""

import json
import os
import subprocess
import sys

import pytest

from warploom.kernels import Budget, ops
from warploom.kernels.core.lang import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs triton's compiler", allow_module_level=True)

import triton

from warploom.bench import gpu_page
from warploom.kernels.tools.clocks import hot_loop_clocks, tensor_share
from warploom.kernels.tools.compile_offline import (
    ARCHITECTURES,
    Cost,
    budget_of,
    innermost_loops,
    int32_offset_products,
    violations,
)  # fmt: skip

pytestmark = pytest.mark.timeout(1800)  # hundreds of kernels are compiled meanwhile, on as many cores as there are


@pytest.fixture(scope="module")
def costs(survey):
    """What every kernel costs, in the large cases and in the small ones."""
    return {name: [cost_of(row) for row in json.loads(survey(name))] for name in ("large", "small")}


def cost_of(row):
    return Cost(**{name: value for name, value in row.items() if name != "violations"})


def has_large_case(op):
    return op.fused is not None and any(case.bench for case in op.cases)


@pytest.mark.parametrize("op", [op for op in ops() if has_large_case(op)], ids=lambda op: op.name)
def test_large_cases_within_budget_everywhere(op, costs):
    """Large cases stay within the budget on every architecture."""
    mine = [cost for cost in costs["large"] if cost.op == op.name]
    assert {cost.arch for cost in mine} == set(ARCHITECTURES)
    broken = {f"{c.kernel} sm_{c.arch}": violations(c, budget_of(op, c.kernel)) for c in mine}
    assert not {kernel: found for kernel, found in broken.items() if found}


def test_gpu_page_is_in_step_with_the_kernels(costs):
    """Bytes, FLOPs and rooflines always; registers where the compiler is the page's."""
    text = gpu_page.PAGE.read_text()
    assert "\n".join(gpu_page.work_rows(gpu_page.measurements())) in text, "python -m warploom.bench.gpu_page"
    rows = list(gpu_page.limit_rows(costs["large"]))
    assert all(row.rpartition("`")[0] in text for row in rows[2:])
    if gpu_page.version_of(text) == triton.__version__:
        assert "\n".join(rows) in text, "python -m warploom.bench.gpu_page"


@pytest.mark.parametrize("op", [op for op in ops() if op.fused is not None], ids=lambda op: op.name)
def test_small_cases_no_spills_64_bit_addresses(op, costs):
    """Small cases compile spill nothing and compute addresses in 64 bits."""
    mine = [cost for cost in costs["small"] if cost.op == op.name]
    assert mine
    broken = {f"{cost.case}, {cost.kernel}": violations(cost, Budget()) for cost in mine}
    assert not {where: found for where, found in broken.items() if found}


FILED = """
import json, sys, pathlib, torch
from warploom.kernels import adamw_step
from warploom.kernels.core import tuned
from warploom.kernels.tools.compile_offline import costs
tuned.FILE = pathlib.Path(sys.argv[1])
print(*(costs(adamw_step, adamw_step.cases[-1], torch.bfloat16, arch)[0].warps for arch in (80, 90)))
"""


def test_budget_is_of_the_settings_on_file(tmp_path):
    """A budget is that of the settings on file for the architecture."""
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"sm_90": {"adamw_step": {"any": {"BLOCK": 1024, "num_warps": 2}}}}))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FILED, str(path)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["8", "2"]


AHEAD = """
import torch
from warploom.kernels import Maker, attention, backend
from warploom.kernels.tools.compile_offline import compiling_for
def hashes(device):
    with compiling_for(90) as kernels:
        args, options = attention.cases[0].build(Maker(torch.bfloat16, device))
        y = attention.fused(*args, **options)
        torch.autograd.grad(y, args, torch.empty_like(y))
    return [kernel.hash for kernel in kernels]
print(*hashes("meta"))
print(*hashes("cpu"))
"""


def test_compiled_ahead_is_what_runs():
    """Kernels compiled for meta tensors have the keys, in Triton's cache, of those that real tensors ask for."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", AHEAD], capture_output=True, text=True, env=environment, check=True)
    ahead, real = done.stdout.splitlines()
    assert len(ahead.split()) == 4 and ahead == real


BATCHES = """
import importlib, torch
from warploom.kernels import Maker, backend, paged_attention
from warploom.kernels.tools.compile_offline import compiling_for

batch = importlib.import_module("warploom.kernels.paged_attention")._batch
batches = ([9], [1]), ([900, 40, 16], [1, 1, 1]), ([7000] * 5, [40, 1, 1, 1, 7]), ([64] * 16, [1] * 16)
with backend("triton"), compiling_for(90) as kernels:
    for contexts, queries in batches:
        *args, options = batch(Maker(torch.bfloat16, "meta"), contexts, queries, 2, 1, 16, 16)
        paged_attention(*args, **options)
print(len({kernel.hash for kernel in kernels}))
"""


def test_a_batch_of_another_size_needs_no_other_kernel():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", BATCHES], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["1"]


DESK = """
import torch
from warploom.kernels import ops
from warploom.kernels.core.lang import shared_memory
from warploom.kernels.tools.compile_offline import costs

for op in ops():
    cases = [case for case in op.cases if case.bench][:1] + [case for case in op.cases if "16 heads of 64" in case.name]
    for case in cases if op.fused else ():
        for arch in (89, 120):
            for cost in costs(op, case, torch.bfloat16, arch):
                if cost.shared > shared_memory(arch) or cost.loop_spills:
                    print(op.name, arch, cost.kernel, cost.shared, cost.loop_spills)
print("done")
"""


def test_every_op_fits_desk_gpus():
    """99 KiB of shared memory: what an accumulator of 128 by 128 and three stages of keys exceed."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", DESK], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "done\n"


EPILOGUE = """
import re, torch
from collections import Counter
from warploom.kernels import Maker, backend, normed_linear
from warploom.kernels.linear_residual import _summed
from warploom.kernels.tools.compile_offline import compiling_for

for arch in (80, 90, 100):
    found = set()
    for rows in (1, 64, 1024):
        with backend("triton"), compiling_for(arch) as kernels:
            normed_linear(*_summed(Maker(torch.bfloat16, "meta"), rows, 4096, 8192), activation="gelu")
        ptx = re.split(r"wgmma|mma[.]sync|tcgen05[.]ld", kernels[-1].asm["ptx"])[-1]
        count = Counter(re.findall(r"(fma|mul|ex2)[.](?:rn|approx|f32)", ptx))
        found.add((count["fma"] / count["ex2"], count["mul"] / count["ex2"]))
    print(arch, len(found))
"""


def test_product_epilogue_same_arithmetic_any_rows():
    """Fused multiply-adds of the epilogue are as many in the tiles of few, some and many rows."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", EPILOGUE], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["80", "1", "90", "1", "100", "1"]


AMD = """
import torch
from warploom.kernels import attention, linear, moe, packed_linear, paged_attention
from warploom.kernels.tools.compile_offline import compiled

for op in (attention, linear, moe, packed_linear, paged_attention):
    case = next(case for case in op.cases if case.bench)
    print(max(kernel.metadata.shared for kernel in compiled(op, case, torch.bfloat16, "gfx942")) <= 64 * 1024)
"""


def test_large_cases_compile_for_amd():
    """Within the 64 KiB of shared memory of gfx942, by Triton's other backend."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", AMD], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["True"] * 5


LARGER = """
import contextlib, torch
from warploom.bench.kernels import LARGER_TILES
from warploom.kernels import attention, moe
from warploom.kernels.core import tuned
from warploom.kernels.tools.clocks import tensor_share
from warploom.kernels.tools.compile_offline import costs

names = "attention_dq_kernel", "attention_dkdv_kernel", "gemm_kernel", "swiglu_bwd_kernel"
for op in (attention, moe):
    case = next(case for case in op.cases if case.name.startswith(("8192 causal, 32", "32768 tokens")))
    with contextlib.ExitStack() as trials:
        for kernel, tile in LARGER_TILES[op.name]:
            trials.enter_context(tuned.trying(kernel, tile))
        for cost in costs(op, case, torch.bfloat16, 90):
            if cost.kernel.endswith(names):
                print(cost.loop_spills, tensor_share(cost.tensor_clocks, cost.shared_clocks) >= 0.79)
"""


def test_larger_tiles_spill_in_no_loop_and_feed_tensor_cores():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", LARGER], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["0 True"] * 5


SEGMENTS = """
import re, torch
from warploom.kernels import paged_attention
from warploom.kernels.tools.compile_offline import compiled, disassembled, innermost_loops

(kernel,) = compiled(paged_attention, next(case for case in paged_attention.cases if case.bench), torch.bfloat16, 90)
loops = innermost_loops(disassembled(kernel.asm["cubin"]))
(loop,) = [loop for loop in loops if "LDG" in loop and "FFMA" in loop and "MMA." not in loop]
first = re.search(r"FFMA|FMUL|MUFU", loop).start()
print(loop[:first].count("LDG"), loop[first:].count("LDG"))
"""


def test_stored_segments_are_fetched_before_any_is_added():
    """No load of the loop that merges 16 of them waits for another: maximum, sum and values of each."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", SEGMENTS], capture_output=True, text=True, env=environment, check=True)
    before, after = map(int, done.stdout.split())
    assert before >= 3 * 16 and after == 0


def test_hot_loop_clocks_count_products_and_copies():
    """Of the expert's sheet: 128 by 128 in two groups, the left side in shared memory once and in registers once."""
    left = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1, %f2}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
    held = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, {%r1, %r2}, %rd2, %p1, 1, 1, 0;"
    copy = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r3;"
    assert hot_loop_clocks([left], warps=8, specialized=False) == (128, 96)
    assert hot_loop_clocks([held, copy], warps=8, specialized=False) == (128, 64 + 32)
    bulk = "mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 32768;"
    assert hot_loop_clocks([bulk, left, left], warps=12, specialized=True) == (128, 96 + 256)
    assert tensor_share(512, 640) == 0.8 and tensor_share(0, 7) == 1


def test_innermost_loops_hold_no_other():
    ptx = """
    $L__outer:
        st.local.u32 [%rd1], %r1;
    $L__inner:
        wgmma.wait_group.sync.aligned 1;
        @%p1 bra $L__inner;
        bra.uni $L__outer;
        bra $L__end;
    $L__end:
    """
    (loop,) = innermost_loops(ptx)
    assert "wait_group" in loop and "st.local" not in loop


def test_address_lint_finds_32_bit_offset():
    """The address lint finds a 32 bit offset and lets a 64 bit one pass."""
    narrow = """
      %pid = tt.get_program_id x : i32
      %range = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
      %offset = arith.muli %pid, %stride : i32
      %0 = tt.splat %offset : i32 -> tensor<64xi32>
      %1 = arith.addi %0, %range : tensor<64xi32>
      %2 = tt.addptr %x, %1 : tensor<64x!tt.ptr<f32>>, tensor<64xi32>
    """
    assert int32_offset_products(narrow) == ["%offset = arith.muli %pid, %stride : i32"]
    assert int32_offset_products(narrow.replace("%stride : i32", "%stride : i64")) == []


def test_a_kernel_over_its_budget_is_told_what_it_exceeds():
    cost = Cost("op", "case", "bfloat16", 90, "kernel", 4, 80, 16, 1000, False, 0, 0, loop_spills=3)
    found = violations(cost, Budget(registers=64, wgmma=True, vector=True))
    assert [sentence.split(",")[0] for sentence in found] == [
        "80 registers",
        "16 bytes of stack",
        "3 accesses to spilled registers inside a loop",
        "no wgmma instruction on sm_90",
        "no 16-byte access to global memory",
    ]


@pytest.mark.parametrize("op", [op for op in ops() if op.fused is not None], ids=lambda op: op.name)
def test_compile_sees_kernels_not_operators(op, survey):
    """A compiler sees the kernels and no opaque operator."""
    kernels, opaque = json.loads(survey("trace"))[op.name]
    assert kernels >= 1 and not opaque
