"""What CMake makes of the compilers that it finds. Nothing is compiled but CMake's own probes."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from tests.kernels.rungs.cuda_compiled import NVCC

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
TOOLS = {
    name: shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name) for name in ("cmake", "ninja")
}
# As Apple's compilers: without OpenMP, and the older ones without -march=native.
WITHOUT = """#!/bin/sh
for argument; do
  case $argument in
    -march=native|-fopenmp|-fopenmp=*) echo "unsupported option $argument" >&2; exit 1;;
  esac
done
exec {compiler} "$@"
"""


def configure(folder, **options):
    """CMake's output, and the rules that it wrote for Ninja, "" where it failed."""
    options = {
        "CMAKE_MAKE_PROGRAM": TOOLS["ninja"],
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        **options,
    }
    command = [TOOLS["cmake"], "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    rules = (folder / "build.ninja").read_text() if done.returncode == 0 else ""
    return " ".join((done.stdout + done.stderr).split()), rules


def kernel_flags(rules):
    """The options with which the CPU kernels are compiled."""
    return re.search(r"build \S*cpu/penalty\.cpp\.o:.*?FLAGS = (.*?)\n", rules, re.DOTALL).group(1).split()


@pytest.fixture(scope="module")
def plain_compiler(tmp_path_factory):
    """Output and rules with a compiler that has neither OpenMP nor -march=native."""
    folder = tmp_path_factory.mktemp("plain")
    compiler = folder / "c++"
    compiler.write_text(WITHOUT.format(compiler=COMPILER))
    compiler.chmod(0o755)
    return configure(folder / "build", CMAKE_CXX_COMPILER=compiler, SSIUU_CUDA=0)


def test_native_is_left_out_where_the_compiler_does_not_take_it(plain_compiler):
    output, rules = plain_compiler
    assert "does not take -march=native: the CPU kernels are for its default" in output
    assert [flag for flag in kernel_flags(rules) if flag.startswith("-march")] == []


def test_loops_are_vectorised_without_openmp(plain_compiler):
    _, rules = plain_compiler
    assert "-fopenmp-simd" in kernel_flags(rules)


def test_an_architecture_that_the_compiler_does_not_know_is_refused(tmp_path):
    output, rules = configure(tmp_path, SSIUU_CUDA=0, SSIUU_CPU_ARCH="no-such-cpu")
    assert rules == ""
    assert re.search(r"SSIUU_CPU_ARCH=no-such-cpu: \S+ does not take -march=no-such-cpu", output)


def test_a_module_without_cuda_knows_why(plain_compiler):
    output, rules = plain_compiler
    assert "No CUDA kernels: SSIUU_CUDA=0" in output
    assert r"-DSSIUU_WHY_NO_CUDA=\"SSIUU_CUDA=0\"" in rules


@pytest.mark.skipif(NVCC is None, reason="needs nvcc, which was not found")
def test_an_architecture_that_nvcc_lacks_costs_no_other(tmp_path):
    output, rules = configure(tmp_path, SSIUU_CUDA_ARCHS="80;1")
    assert "CUDA kernels for 80" in output
    assert re.search(r"nvcc cannot compile for 1: no CUDA kernels are built for it", output)
    assert r"-DSSIUU_CUDA_ARCHS=\"80\"" in rules
    assert set(re.findall(r"code=\[(\S+)\]", rules)) == {"compute_80,sm_80"}
    output, rules = configure(tmp_path, SSIUU_CUDA_ARCHS="1;2")
    assert re.search(r"No CUDA kernels: nvcc [\d.]+ cannot compile for 1 2", output)
    assert "cuda/penalty.cu" not in rules
