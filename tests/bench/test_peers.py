"""A peer is a module with a function named after the task; one that is absent or broken costs nothing but a row."""

import subprocess
import sys

import pytest

from warploom.bench import peers


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of peers: one works, others are not installed, break, decline, or know another task."""
    folder = tmp_path / "fakepeers"
    folder.mkdir()
    sources = {
        "__init__": "",
        "_helper": "def race(n): raise AssertionError('not a peer')",
        "works": "def race(n, fast=False): return {'works': lambda: n, 'works too': lambda: fast}",
        "absent": "NEEDS = ('no_such.package',)\ndef race(n): raise AssertionError('must not be called')",
        "broken": "def race(n, fast=False): return 1 / 0",
        "declines": "from warploom.bench.peers import *\ndef race(n, fast=False): raise Unavailable('needs a GPU')",
        "torn": "import no_such_package",
        "elsewhere": "def swim(n): return {'elsewhere': n}",
    }
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "fakepeers"


def test_nothing_compiled_where_peers_are_named(monkeypatch):
    monkeypatch.setenv("WARPLOOM_PEERS", "torch_ops")
    assert isinstance(peers.compiled(abs), peers.Missing)
    monkeypatch.delenv("WARPLOOM_PEERS")
    assert peers.compiled(abs) is not abs and callable(peers.compiled(abs))


def test_every_module_that_knows_the_task_takes_part(package):
    built = peers.build("race", 7, package=package, fast=True)
    assert set(built) == {"works", "works too", "absent", "broken", "declines", "torn"}
    assert (built["works"](), built["works too"]()) == (7, True)
    assert built["absent"] == peers.Missing("no_such.package not installed")
    assert built["broken"] == peers.Missing("ZeroDivisionError: division by zero")
    assert built["torn"] == peers.Missing("ModuleNotFoundError: No module named 'no_such_package'")
    assert built["declines"] == peers.Missing("needs a GPU")


def test_only_chooses_and_an_unknown_task_has_no_peers(package):
    assert set(peers.build("race", 7, package=package, only=["absent"])) == {"absent"}
    assert set(peers.build("fly", package=package)) == {"torn"}


def test_peers_are_listed_without_loading():
    """The peers here can be listed without loading what they wrap."""
    listing = "import sys; from warploom.bench import peers; print(*peers.names()); sys.exit('torch' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers"} <= set(listed)
