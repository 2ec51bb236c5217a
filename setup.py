"""Build of warploom: the repository root is the package `warploom`, and csrc/ becomes `warploom._native`.

Everything declarative is in pyproject.toml. This file does what only code can: it maps the folders
`engine/`, `kernels/`, `tokenizer/`, `bench/` to `warploom.*`, and compiles the C++ extension in parallel.
A machine without a C++ compiler still gets a working, slower package: the extension is optional, and every
native function has a pure-Python twin.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ["engine", "kernels", "tokenizer", "bench"]

ParallelCompile("WARPLOOM_BUILD_JOBS", default=os.cpu_count()).install()

flags = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"] if os.name == "posix" else ["/O2"]
link = []
if os.environ.get("WARPLOOM_SANITIZE"):  # `make sanitize`: the same extension under ASan and UBSan
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    link = ["-fsanitize=address,undefined"]

native = Pybind11Extension(
    "warploom._native",
    sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").glob("*.hpp")),
    cxx_std=17,
    extra_compile_args=flags,
    extra_link_args=link,
)
native.optional = not os.environ.get("WARPLOOM_REQUIRE_NATIVE")


class RoomsOnly(build_py):
    """The root holds no modules of the package: without this, setup.py itself would be installed."""

    def find_package_modules(self, package, package_dir):
        return [] if package == "warploom" else super().find_package_modules(package, package_dir)


setup(
    packages=["warploom"]
    + [f"warploom.{name}" for room in ROOMS for name in find_packages(include=[room, f"{room}.*"])],
    package_dir={"warploom": "."},
    ext_modules=[native],
    cmdclass={"build_ext": build_ext, "build_py": RoomsOnly},
)
