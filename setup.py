"""Build of warploom: the repository root is the package `warploom`, and csrc/ becomes `warploom._native`.

Everything declarative is in pyproject.toml. This file does what only code can: it maps the folders `engine/`,
`kernels/`, `tokenizer/`, `bench/` to `warploom.*`, and compiles the C++ extension, with ninja where it is present (in
parallel, and only what changed). A machine without a C++ compiler still gets a working, slower package: the extension
is optional, and every native function has a pure-Python twin. WARPLOOM_PURE=1 does not even try.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ["engine", "kernels", "tokenizer", "bench"]

flags = ["-O3", "-Wall", "-Wextra", "-Wno-psabi"] if os.name == "posix" else ["/O2"]
link = []
if os.environ.get("WARPLOOM_SANITIZE"):  # `make sanitize`: the same extension under ASan and UBSan
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    link = ["-fsanitize=address,undefined"]

native = Pybind11Extension(
    "warploom._native",
    sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.parts[1] != "tests"),
    include_dirs=["csrc"],
    depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".hpp", ".inc")),
    cxx_std=17,
    extra_compile_args=flags,
    extra_link_args=link,
)
native.optional = not os.environ.get("WARPLOOM_REQUIRE_NATIVE")


class RoomsOnly(build_py):
    """Of the root's files only `__init__.py` is the package's: without this, setup.py itself would be installed."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [each for each in modules if package != "warploom" or each[1] == "__init__"]


class NinjaBuild(build_ext):
    """Compile with ninja where it is found; its dependency files know which headers a source read."""

    def build_extension(self, ext):
        ninja = find_ninja()
        if ninja is None or self.compiler.compiler_type != "unix":
            return super().build_extension(ext)
        folder = Path(self.build_temp, "ninja").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.plan(ext, target))
        try:
            subprocess.run([ninja, "-C", str(folder), "--quiet"], check=True)
        except subprocess.CalledProcessError as error:
            from setuptools.errors import CompileError

            raise CompileError("the C++ extension did not compile (see above)") from error

    def plan(self, ext, target):
        compile_, link_ = self.compiler.compiler_so, self.compiler.linker_so
        cxx = os.environ.get("CXX", "c++" if shutil.which("c++") else "g++")
        includes = [f"-I{Path(path).resolve()}" for path in [*ext.include_dirs, *self.compiler.include_dirs]]
        objects = {Path(source).resolve(): Path(source).with_suffix(".o").name for source in ext.sources}
        lines = [
            "rule compile",
            f"  command = {cxx} {shlex.join([*compile_[1:], *includes, *ext.extra_compile_args])} -MMD -MF $out.d "
            "-c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $in",
            "rule link",
            f"  command = {cxx} {shlex.join([*link_[1:], *ext.extra_link_args])} $in -o $out",
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
    ext_modules=[] if os.environ.get("WARPLOOM_PURE") else [native],
    cmdclass={"build_ext": NinjaBuild, "build_py": RoomsOnly},
)
