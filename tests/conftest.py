"""What is decided before torch and triton are first imported, and before any test starts a process.

Tests compute tiny things, many at once: one thread each is fastest, and keeps float32 sums repeatable. Where there is
no GPU, Triton kernels run in their interpreter. Ctrl-C must mean Ctrl-C: a suite that was started in the background
inherits an ignored SIGINT, and would hand it on to every process it starts. And what is drawn, by Hypothesis too, is
the same on any machine, whichever tests ran before; `--hypothesis-profile=default` and WARPLOOM_TEST_SEED draw others.
"""

import os
import random
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # not even a question whether somebody is there
for name in ("no_proxy", "NO_PROXY"):  # clients here ask servers of this machine, which a proxy cannot see
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
for name in ("COLUMNS", "FORCE_COLOR"):  # of a terminal: lines would break elsewhere, words hold colors
    os.environ.pop(name, None)
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch

SEED = int(os.environ.get("WARPLOOM_TEST_SEED", "0"))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Files of slow tests come first: of what processes share, the last should be short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item):
    """`make sanitize` runs the very tests of `make test`, but for what AddressSanitizer's allocator makes untrue."""
    mark = item.get_closest_marker("unsanitized")
    if mark and "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip(f"sanitized: {mark.args[0]}")


def draw_from_the_seed():
    """Which files a process has run before differs from run to run: no test's numbers may depend on it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup():
    draw_from_the_seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    draw_from_the_seed()


try:
    from hypothesis import HealthCheck, settings
except ImportError:  # on a GPU machine, where nothing can be installed
    pass
else:
    settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("same")
