"""What must be refused, taken another way or left alone, so that no kernel meets what it cannot do."""

import contextlib
import importlib
import os
import subprocess
import sys

import pytest
import torch

from warploom.kernels import Maker, attention, backend, paged_attention
from warploom.kernels.core import lang
from warploom.kernels.core.lang import AMD, HAS_TRITON, INTERPRET
from warploom.kernels.gpu import attention_hopper, attention_launch

write_pages_file = importlib.import_module("warploom.kernels.write_pages")
interpreted = pytest.mark.skipif(not (HAS_TRITON and INTERPRET), reason="needs triton and TRITON_INTERPRET=1")


@pytest.mark.parametrize("scale", [0, -0.3, float("nan")])
@pytest.mark.parametrize("op", [attention, paged_attention], ids=lambda op: op.name)
def test_attention_scale_not_positive_refused(op, scale):
    args, _ = op.cases[0].build(Maker())
    backends = ["eager", "triton"] if HAS_TRITON and INTERPRET else ["eager"]
    for name in backends:
        with backend(name), pytest.raises(ValueError, match=r"scale is .*; it must be greater than 0"):
            op(*args, scale=scale)


@pytest.mark.parametrize("arch", [0, 80, 89])
def test_float8_pages_of_older_gpus_refused(monkeypatch, arch):
    """Triton would say that a type is not supported, in the middle of a kernel."""
    pages = torch.zeros(1, 4, 1, 16, dtype=torch.float8_e4m3fn)
    monkeypatch.setattr(write_pages_file, "architecture", lambda device: arch)
    told = pytest.raises(ValueError, match="converts no float8_e4m3fn; make the pages int8")
    with told if arch == 80 else contextlib.nullcontext():
        write_pages_file.check_pages("write_pages", pages, pages, torch.zeros(1, 1, 4))
    write_pages_file.check_pages("write_pages", *[pages.view(torch.float8_e5m2)] * 2, torch.zeros(1, 1, 4))


@pytest.fixture
def hopper(monkeypatch):
    """Its choice of kernels, without one."""
    monkeypatch.setattr(attention_hopper, "architecture", lambda device: 90)
    monkeypatch.setattr(attention_hopper, "hopper_kernels", set(attention_hopper.NAMES))
    monkeypatch.setattr(attention_hopper, "_proven", set())


def test_tma_expanded_or_misaligned_not_addressed(hopper):
    def addressed(x):
        return attention_hopper.tma_can_address("dq", x)

    half = {"dtype": torch.bfloat16}
    whole = torch.empty(2, 16, 4, 64, **half)
    assert addressed(whole) and addressed(whole[:, 8:]) and addressed(whole[:1].expand(2, 16, 4, 64))
    assert not addressed(torch.empty(2, 1, 4, 64, **half).expand(2, 16, 4, 64)), "over tokens"
    assert not addressed(torch.empty(2, 16, 1, 64, **half).expand(2, 16, 4, 64)), "over heads"
    assert not addressed(torch.empty(2, 16, 4, 66, **half)[..., :64]), "rows of 132 bytes"
    assert not addressed(torch.empty(2, 16, 4, 128, **half)[..., ::2])
    assert not addressed(torch.empty(8 * 1024 + 1, **half)[1:].view(2, 16, 4, 64))
    foreign = torch.frombuffer(bytearray(2 * whole.numel() + 16), dtype=torch.uint8)[2 : 2 + whole.nbytes]
    assert not addressed(foreign.view(torch.bfloat16).view(whole.shape)), "memory that another made"
    assert addressed(whole.to("meta"))


@interpreted
@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_hopper_first_launch_fails_portable_serves(hopper, monkeypatch, name):
    class Refuses:
        def __getitem__(self, grid):
            def run(*args, TMA, **options):
                if TMA:
                    raise RuntimeError("PassManager::run failed\nmore")
                kernel[grid](*args, TMA=TMA, **options)

            return run

    kernel = getattr(attention_launch, f"attention_{name}_kernel")
    monkeypatch.setattr(attention_launch, f"attention_{name}_kernel", Refuses())
    monkeypatch.setattr(attention_hopper, "tile_of", lambda *a: attention_launch.tile_of(*a) | {"TMA": True})

    def both():
        q, k, v = (
            x.clone().requires_grad_() for x in torch.randn(3, 1, 24, 2, 16, generator=torch.manual_seed(0)).bfloat16()
        )
        o = attention(q, k, v)
        return o, *torch.autograd.grad(o.float().square().sum(), (q, k, v))

    with backend("triton"):
        with pytest.warns(UserWarning, match=f"Hopper kernel '{name}' could not be launched .*PassManager") as said:
            first = both()
        again = both()
        attention_hopper.hopper_kernels.clear()
        portable = both()
    assert len([each for each in said if each.category is UserWarning]) == 1
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, portable))


def test_hopper_failure_after_success_is_an_error(hopper):
    attention_hopper.mark_working("dq")
    assert not attention_hopper.disable_after_first_failure("dq", RuntimeError("an illegal memory access"))
    assert not attention_hopper.disable_after_first_failure(
        "forward", torch.OutOfMemoryError("no room for descriptors")
    )
    assert {"dq", "forward"} <= attention_hopper.hopper_kernels


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_allocator_of_others_is_kept():
    import contextvars

    import triton
    from triton.runtime import _allocation

    def theirs(size, alignment, stream):
        raise AssertionError

    def ask():
        attention_hopper.tile_of("forward", 64, torch.bfloat16, torch.device("cpu"))
        return _allocation._allocator.get()

    assert contextvars.Context().run(ask) is attention_hopper._scratch
    assert contextvars.Context().run(lambda: (triton.set_allocator(theirs), ask())[1]) is theirs


def test_hopper_setting_names_kernels():
    assert attention_hopper._chosen("1") == set(attention_hopper.NAMES)
    assert attention_hopper._chosen("0") == set()
    assert attention_hopper._chosen("forward,dq") == {"forward", "dq"}
    with pytest.raises(ValueError, match="WARPLOOM_HOPPER is 'all'; valid are 0, 1 and names out of forward,dq,dkdv"):
        attention_hopper._chosen("all")


def test_generation_of_every_architecture():
    known = {75: 80, 80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 103: 100, 110: 100, 120: 80, 121: 80, AMD: AMD, 0: 0}
    assert {arch: lang.generation_of(arch) for arch in known} == known
    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, AMD: 64}
    assert {arch: lang.shared_memory(arch) // 1024 for arch in limits} == limits


DEBUGGED = """
import torch
from warploom.kernels import attention
from warploom.kernels.tools.compile_offline import costs
print(*sorted({f"{cost.kernel}:{cost.warps}" for cost in costs(attention, attention.cases[0], torch.bfloat16, 90)}))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton's compiler")
def test_hopper_kernels_compile_with_triton_debug():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "WARPLOOM_TRITON": "1", "TRITON_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", DEBUGGED], capture_output=True, text=True, env=environment)
    expected = {"delta": 8, "dkdv": 12, "dq": 12, "forward": 12}
    assert done.stdout.split() == [f"attention_{name}_kernel:{n}" for name, n in expected.items()], done.stderr[-1000:]
