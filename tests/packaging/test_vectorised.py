"""The CPU kernels' inner loops are vectorised: losing that costs a factor of seven, and nothing else shows it."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
GCC = shutil.which("g++")
# Debian installs it under the name of its version alone.
CLANG = next(filter(None, map(shutil.which, ["clang++", *(f"clang++-{n}" for n in range(30, 13, -1))])), None)
FLAGS = [
    "-std=c++17", "-O3", "-march=x86-64-v3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-I", CSRC / "include", "-c", "-o", "/dev/null",
]  # fmt: skip
on_x86 = platform.machine() == "x86_64"


@pytest.mark.skipif(GCC is None or not on_x86, reason="reads GCC's report for x86-64")
@pytest.mark.parametrize(
    ("source", "instances"),
    [
        (
            "hidden.cpp",
            2 * 5 * 2 * (1 + 1 + 2 * 3),
        ),  # types x activations x gated: forward, scores; backward with h or not, plain, scored or penalised
        ("token_scores.cpp", 2),
        (
            "penalty.cpp",
            3 * 2**3,
        ),  # penalty, AdamW, AdamW with stochastic rounding; types of parameter, gradient and state
    ],
)
def test_simd_loops_are_vectorised(source, instances):
    path = CSRC / "cpu" / source
    report = subprocess.run(
        [GCC, *FLAGS, "-fopenmp", "-fopt-info-vec", path], capture_output=True, text=True, check=True
    ).stderr  # fmt: skip
    pragmas = [n for n, line in enumerate(path.read_text().splitlines(), 1) if line.startswith("#pragma omp simd")]
    found = [int(n) for n in re.findall(rf"{source}:(\d+):\d+: optimized: loop vectorized using 32 byte", report)]
    assert pragmas
    # GCC reports the line of the loop or of its body, one or two below the pragma.
    assert sum(line - pragma in (1, 2) for line in found for pragma in pragmas) == instances


@pytest.mark.skipif(CLANG is None or not on_x86, reason="needs clang++ for x86-64, which was not found")
@pytest.mark.parametrize("source", ["hidden.cpp", "token_scores.cpp", "penalty.cpp", "row_blocks.cpp"])
def test_simd_loops_are_vectorised_by_clang(source):
    """Clang reports every `omp simd` loop that it does not vectorise."""
    done = subprocess.run(
        [CLANG, *FLAGS, "-fopenmp", "-Werror=pass-failed", CSRC / "cpu" / source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
