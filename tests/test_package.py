"""The package as others will get it, and the rules of the house that imports can break."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("engine", "kernels", "tokenizer", "bench")
FLOORS = [  # from the ground up; a module imports from its own floor or below
    ("tokenizer.errors",),
    ("tokenizer", "kernels"),
    (
        *("engine.config", "engine.device", "engine.model", "engine.generation", "engine.attention_maps"),
        *("engine.formats", "engine.parallel", "engine.executors"),
    ),
    ("engine.data", "engine.tasks", "engine.training", "engine.serving"),
    ("engine.server", "engine.rl"),
    ("engine.cli", "bench"),
]
STRANGERS = {("engine.training", "engine.serving"), ("tokenizer", "kernels")}  # on one floor, but never of each other
ASIDE = (".*", "__pycache__", "build", "*.egg-info", "*.so", "runs", "results")  # of a checkout in use
TORCHLESS = (
    "tokenizer",
    "engine.config",
    "engine.serving.scheduling.page_pool",
    "engine.serving.scheduling.scheduler",
    "engine.cli.__init__",
    "engine.tasks",
)


def modules() -> dict[str, Path]:
    paths = (path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports(name: str, path: Path) -> set[str]:
    """Modules of ours that a module imports, at its top or anywhere inside."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = name.split(".")[: -node.level]
            target = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*target, alias.name]) for alias in node.names} | {".".join(target)}
    return found


def import_graph() -> dict[str, set[str]]:
    """Imports among our modules, those inside functions included; imports for types alone are left out."""
    paths = modules()
    graph = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
        skipped = {id(inner) for node in typed for inner in ast.walk(node)}
        graph[name] = set()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in skipped:
                continue
            base = ".".join([*name.split(".")[: -node.level], *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                candidates = (f"{base}.{alias.name}", f"{base}.{alias.name}.__init__", base, f"{base}.__init__")
                graph[name].add(next((target for target in candidates if target in paths), name))
        graph[name].discard(name)
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that `start` imports, directly or not."""
    found, waiting = set(), [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def floor(name: str) -> int | None:
    return next((level for level, rooms in enumerate(FLOORS) if room(name, rooms)), None)


def room(name: str, rooms: tuple[str, ...]) -> str | None:
    return next((room for room in rooms if name == room or name.startswith(room + ".")), None)


def test_a_room_imports_only_from_its_own_floor_or_below():
    everything = tuple(room for rooms in FLOORS for room in rooms)
    for name, path in modules().items():
        for target in imports(name, path):
            here, there = floor(name), floor(target)
            if here is None or there is None:
                continue
            assert there <= here, f"{name} imports {target}, which is on a floor above"
            pair = (room(name, everything), room(target, everything))
            assert not {pair, pair[::-1]} & STRANGERS, f"{name} imports {target}; these rooms do not know each other"


def test_no_module_imports_itself_by_a_detour():
    """A circle is a circle in a function too: `import` inside `def` only hides it."""
    graph = import_graph()
    assert len(graph) > 150 and sum(map(len, graph.values())) > 500
    circles = {name for name in graph if name in reachable(graph, name)}
    assert not circles, f"these import each other: {sorted(circles)}"


@pytest.mark.parametrize("name", TORCHLESS)
def test_what_must_not_know_torch_does_not_import_it(name):
    code = f"import sys, importlib; importlib.import_module('warploom.{name}'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code.replace(".__init__", "")], check=True)


def test_everything_runs_without_extensions():
    """Everything runs without triton and without the extension."""
    code = """
import sys
extensions = ["_native_avx512", "_native_avx2", "_native", "_tokenizer"]
sys.modules.update({"triton": None, **{f"warploom.{name}": None for name in extensions}})  # as if not installed
import torch
from warploom import kernels
from warploom.engine import ModelConfig, Transformer, generate
from warploom.tokenizer import BPETokenizer
tokenizer = BPETokenizer.train(["low lower lowest"] * 9, vocab_size=262)
model = Transformer(ModelConfig(vocab_size=262, d_model=32, n_layers=1, n_heads=2, n_experts=2))
model.loss(torch.arange(8)[None], torch.arange(8)[None]).backward()
assert tokenizer.decode(list(generate(model, tokenizer.encode("low"), 3))) is not None
with kernels.backend("triton"):
    try:
        model(torch.arange(8)[None])
    except ValueError as error:
        assert "triton is not installed" in str(error), error
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "a path with spaces"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ASIDE))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, source]
    subprocess.run(build, check=True, env={**os.environ, "WARPLOOM_PURE": "1"}, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"warploom"}
    assert "warploom/setup.py" not in names
    shipped = {name.removeprefix("warploom/") for name in names if name.endswith(".py")}
    assert shipped == {"__init__.py", *(f"{name.replace('.', '/')}.py" for name in modules())}
    assert "warploom/py.typed" in names


def test_root_exports_are_lazy():
    code = "import sys, warploom; assert 'torch' not in sys.modules; [getattr(warploom, x) for x in warploom.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True)
    import warploom

    assert f'version = "{warploom.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("broken, whole", [("cpu", "_tokenizer"), ("tokenizer", "_native")])
def test_extension_that_fails_leaves_the_other(tmp_path, broken, whole):
    """A build that fails is said in a line of its own, and the other extension is there."""
    for path in (ROOT / "csrc").rglob("*.hpp"):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
    for name in ("cpu", "tokenizer"):
        module = f"PYBIND11_MODULE({'_native' if name == 'cpu' else '_tokenizer'}, module) {{}}"
        text = "#error broken" if name == broken else f"#include <pybind11/pybind11.h>\n{module}"
        (tmp_path / "csrc" / name / "module.cpp").write_text(text)
    shutil.copy(ROOT / "setup.py", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "WARPLOOM_REQUIRE_NATIVE"} | {
        "WARPLOOM_LEVELS": "baseline"
    }
    build = [sys.executable, "setup.py", "-q", "build_ext", "-b", "out"]
    shown = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert [path.name.split(".")[0] for path in (tmp_path / "out" / "warploom").iterdir()] == [whole]
    assert shown.stderr.count("could not be built") == 1


def build_elsewhere(folder: Path, pretend: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py's build on a platform that `pretend` makes of this one."""
    (folder / "csrc").mkdir(exist_ok=True)
    shutil.copy(ROOT / "setup.py", folder)
    code = f"""
import platform, runpy, sys, sysconfig, setuptools
sysconfig.get_config_vars()  # this platform's
from distutils.command import build_ext
{pretend}
sys.argv = ["setup.py", "-q", "build_ext", "-b", "out"]
runpy.run_path("setup.py")
"""
    aside = "WARPLOOM_REQUIRE_NATIVE", "WARPLOOM_LEVELS"
    environment = {k: v for k, v in os.environ.items() if k not in aside} | more
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


MSVC = """
real = build_ext.new_compiler
def msvc(**options):
    compiler = real()
    compiler.compiler_type = "msvc"
    return compiler
build_ext.new_compiler = msvc
"""


def test_build_under_msvc_says_why_not(tmp_path):
    """The package is installed without its extensions, and the reason is one sentence for all of them."""
    shown = build_elsewhere(tmp_path, MSVC)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.count("written for GCC and Clang") == 1 and "could not be built" not in shown.stderr
    assert not (tmp_path / "out").exists()
    required = build_elsewhere(tmp_path, MSVC, WARPLOOM_REQUIRE_NATIVE="1")
    assert required.returncode and "written for GCC and Clang" in required.stderr


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="pretends with Linux's g++")
def test_build_on_a_mac_builds_everything(tmp_path):
    """Apple's Clang has no OpenMP and, on ARM, none of x86's instructions: no flag asks it for them."""
    for name, module in (("cpu", "_native"), ("tokenizer", "_tokenizer")):
        (tmp_path / "csrc" / name).mkdir(parents=True)
        text = f"#include <pybind11/pybind11.h>\nPYBIND11_MODULE({module}, module) {{}}"
        (tmp_path / "csrc" / name / "module.cpp").write_text(text)
    clang = tmp_path / "clang++"
    clang.write_text("""#!/bin/bash
for word; do case $word in
    -fopenmp*|-mavx*|-mfma|-mf16c|-mprefer*|-march=*) echo "clang++: error: unsupported option '$word'" >&2; exit 1;;
    -stdlib=*|-mmacosx-version-min=*) ;;
    *) words+=("$word");;
esac; done
exec g++ -O0 "${words[@]}"
""")
    clang.chmod(0o755)
    pretend = (
        'sys.platform, platform.machine = "darwin", lambda: "arm64"\nplatform.mac_ver = lambda: ("14.5", (), "arm64")'
    )
    shown = build_elsewhere(tmp_path, pretend, CXX=str(clang))
    assert shown.returncode == 0 and "could not be built" not in shown.stderr, shown.stderr
    built = {path.name.split(".")[0] for path in (tmp_path / "out" / "warploom").iterdir()}
    assert built == {"_native", "_tokenizer"}


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_native_tiles_equal_plain_loops(tmp_path):
    """csrc/tests/tiles.cpp, which `make native-test` runs too, beside the thread pools under ThreadSanitizer."""
    folder = ROOT / "csrc" / "cpu" / "serving"
    parts = [*map(folder.joinpath, ("matrix.cpp", "dense_matrix.cpp", "spin_pool.cpp", "weight_memory.cpp"))]
    sources = [ROOT / "csrc" / "tests" / "tiles.cpp", *parts, *sorted(folder.glob("packed_*.cpp"))]
    command = ["g++", "-std=c++17", "-O1", "-march=native", "-pthread", f"-I{ROOT / 'csrc'}", *sources]
    subprocess.run([*command, "-o", tmp_path / "tiles"], check=True, capture_output=True)
    shown = subprocess.run([tmp_path / "tiles"], capture_output=True, text=True)
    assert shown.returncode == 0 and "the tiles are right" in shown.stdout, shown.stderr


@pytest.mark.parametrize("compiler", ["clang++", "g++-11", "aarch64-linux-gnu-g++"])
def test_other_compilers_compile_csrc(compiler):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.cpp")) if "pybind11" not in path.read_text()]
    assert len(sources) > 20
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", f"-I{ROOT / 'csrc'}"]
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    levels = (
        [[]] if "aarch64" in compiler else [[], avx2, [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]]
    )

    def complaints(what: tuple[Path, list[str]]) -> str:
        source, level = what
        command = [compiler, *flags, *level, "-fsyntax-only", str(source)]
        shown = subprocess.run(command, capture_output=True, text=True)
        return shown.stderr if shown.returncode else ""

    engine = ROOT / "csrc" / "cpu"  # what setup.py compiles once a level
    todo = [(source, level) for source in sources for level in levels if engine in source.parents or not level]
    with ThreadPoolExecutor() as pool:
        assert "".join(pool.map(complaints, todo)) == ""
