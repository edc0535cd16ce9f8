"""Build of the native module: setuptools drives CMake, CMake drives Ninja.

Environment variables:
  SSIUU_CUDA        0 leaves the CUDA kernels out; otherwise they are built where nvcc is found (no GPU needed).
  SSIUU_CUDA_ARCHS  CUDA architectures, ";"-separated (default "80;90a"); those that nvcc lacks are left out.
  SSIUU_CPU_ARCH    value of -march for the CPU kernels (default "native", where the compiler takes it; "x86-64-v3"
                    for a portable wheel).
  CXX               the C++ compiler: GCC or clang.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

if sys.platform in ("win32", "cygwin"):
    raise SystemExit("ssiuu-kernels: Windows is not supported; use Linux (WSL too) or macOS.")

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, advice: str) -> str:
    # The scripts folder first: `python setup.py` in a virtual environment that is not activated must work.
    tool = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if tool is None:
        raise SystemExit(f"ssiuu-kernels: {name} was not found. {advice}")
    return tool


def check_compiler() -> None:
    candidates = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in candidates):
        raise SystemExit(
            f"ssiuu-kernels: no C++ compiler was found (looked for {', '.join(candidates)}). "
            "Install one with C++17 support, for example `apt-get install g++` or `dnf install gcc-c++`, "
            "or point the CXX environment variable at it."
        )


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"ssiuu-kernels: the native module was not built; `{command[0]}` says why above.")


class FreshBuild(build):
    def run(self) -> None:
        # A module of an earlier build that has been removed since would go into the wheel.
        if Path(self.build_lib).is_relative_to(self.build_base):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_compiler()
        cmake = find_tool("cmake", "Install it with `pip install cmake` or your system's package manager.")
        ninja = find_tool("ninja", "Install it with `pip install ninja` or your system's package manager.")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (ROOT / self.build_temp).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SSIUU_CPU_ARCH": os.environ.get("SSIUU_CPU_ARCH", "native"),
            "SSIUU_CUDA": os.environ.get("SSIUU_CUDA", "1"),
            "SSIUU_CUDA_ARCHS": os.environ.get("SSIUU_CUDA_ARCHS", "80;90a"),
        }
        # A cache made by another interpreter or build environment names files that may no longer be there.
        configure = [cmake, "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        run([cmake, "--build", str(build), "--target", "_native"])


setup(
    ext_modules=[Extension("ssiuu_kernels._native", sources=[])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
