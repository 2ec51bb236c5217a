"""Build of warploom: the repository root is the package `warploom`; csrc/ becomes `_tokenizer` and `_native` in it.

Everything declarative is in pyproject.toml. This file does what only code can: it maps the folders `engine/`,
`kernels/`, `tokenizer/`, `bench/` to `warploom.*`, and compiles the C++ extensions, with ninja where it is present (in
parallel, and only what changed). A machine without a C++ compiler still gets a working, slower package: each extension
is optional and fails alone, and Python or PyTorch does what it would have done. WARPLOOM_PURE=1 does not even try.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ["engine", "kernels", "tokenizer", "bench"]

CXX = os.environ.get("CXX", "c++" if shutil.which("c++") else "g++")
SANITIZE = bool(os.environ.get("WARPLOOM_SANITIZE"))  # `make sanitize`: the same extensions under ASan and UBSan
flags = ["-O3", "-Wall", "-Wextra", "-Wno-psabi"]
link = []
if SANITIZE:
    link = ["-fsanitize=address,undefined"]
    flags = ["-O1", "-g1", "-Wno-psabi", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", *link]
# As GCC does anyway. Clang fuses a product and a sum only within one expression: at AVX2 a query alone had other bits
# than among many.
flags += ["-ffp-contract=fast"]


# The CPU engine is compiled once for each size of registers; kernels/cpu/extension.py loads one by what PyTorch finds.
# WARPLOOM_LEVELS="avx512" builds only those named: a third of the time where one works on it.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS = {"baseline": ("_native", [])}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": ("_native_avx2", AVX2), "avx512": ("_native_avx512", AVX512)}
chosen = os.environ.get("WARPLOOM_LEVELS", "").split() or LEVELS
if wrong := [level for level in chosen if level not in LEVELS]:
    sys.exit(f"WARPLOOM_LEVELS names {' '.join(wrong)}, which is none of {' '.join(LEVELS)}")


def extension(name, folder, more_flags=()):
    """`warploom.<name>` of the sources in csrc/<folder>; its failure fails nothing else, unless it is required."""
    files = sorted(Path("csrc", folder).rglob("*.?pp"))
    made = Pybind11Extension(
        f"warploom.{name}",
        [str(path) for path in files if path.suffix == ".cpp"],
        include_dirs=["csrc"],
        depends=[str(path) for path in [*files, *Path("csrc").glob("*.hpp")] if path.suffix == ".hpp"],
        cxx_std=17,
        extra_compile_args=[*flags, *more_flags, f"-DWARPLOOM_MODULE={name}"],
        extra_link_args=link,
    )
    made.optional = not os.environ.get("WARPLOOM_REQUIRE_NATIVE")
    return made


EXTENSIONS = [extension("_tokenizer", "tokenizer")]
EXTENSIONS += [extension(name, "cpu", more_flags) for name, more_flags in map(LEVELS.get, chosen)]
LOST = {
    "warploom._tokenizer": "texts will be encoded in Python, some hundred times slower",
    "warploom._native_avx512": "a CPU with AVX-512 will do as one with AVX2",
    "warploom._native_avx2": "a CPU with AVX2 will do as one without",
    "warploom._native": "a CPU of other registers will train and serve by PyTorch alone, and not in 8 bits by C++",
}


class RoomsOnly(build_py):
    """Of the root's files only `__init__.py` is the package's: without this, setup.py itself would be installed."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [each for each in modules if package != "warploom" or each[1] == "__init__"]


class NinjaBuild(build_ext):
    """Compile with ninja where it is found; its dependency files know which headers a source read."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = None  # ninja is; without it the levels' objects have one place, one after the other

    def build_extensions(self):
        if self.compiler.compiler_type == "msvc":
            from setuptools.errors import CompileError

            lost = (
                "csrc/ is written for GCC and Clang, whose vector types MSVC has not: no extension is built, texts are "
            )
            lost += "encoded in Python and a CPU works by PyTorch alone; under WSL, with g++, all of it is built"
            if not all(ext.optional for ext in self.extensions):
                raise CompileError(lost)
            print(f"\n*** {lost} ***\n", file=sys.stderr)
            self.extensions = []
        super().build_extensions()

    def build_extension(self, ext):
        try:
            self.compile(ext)
        except BaseException:
            print(f"\n*** {ext.name} could not be built: {LOST[ext.name]} ***\n", file=sys.stderr)
            raise

    def compile(self, ext):
        ninja = find_ninja()
        if ninja is None or self.compiler.compiler_type != "unix":
            return super().build_extension(ext)
        folder = Path(self.build_temp, ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.plan(ext, target))
        try:
            subprocess.run([ninja, "-C", str(folder), "--quiet"], check=True)
        except subprocess.CalledProcessError as error:
            from setuptools.errors import CompileError

            raise CompileError(f"{ext.name} did not compile (see above)") from error

    def plan(self, ext, target):
        compile_, link_ = self.compiler.compiler_so, self.compiler.linker_so
        includes = [f"-I{Path(path).resolve()}" for path in [*ext.include_dirs, *self.compiler.include_dirs]]
        objects = {Path(source).resolve(): Path(source).with_suffix(".o").name for source in ext.sources}
        lines = [
            "rule compile",
            f"  command = {CXX} {shlex.join([*compile_[1:], *includes, *ext.extra_compile_args])} -MMD -MF $out.d "
            "-c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $in",
            "rule link",
            f"  command = {CXX} {shlex.join([*link_[1:], *ext.extra_link_args])} $in -o $out",
            "  description = linking $out",
        ]
        lines += [f"build {escape(name)}: compile {escape(source)}" for source, name in objects.items()]
        lines += [f"build {escape(target)}: link {' '.join(map(escape, objects.values()))}", ""]
        return "\n".join(lines)


def escape(path):
    """A path as ninja reads it: spaces and colons separate words there."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def find_ninja():
    return shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


setup(
    packages=["warploom"]
    + [f"warploom.{name}" for room in ROOMS for name in find_packages(include=[room, f"{room}.*"])],
    package_dir={"warploom": "."},
    ext_modules=[] if os.environ.get("WARPLOOM_PURE") else EXTENSIONS,
    cmdclass={"build_ext": NinjaBuild, "build_py": RoomsOnly},
)
