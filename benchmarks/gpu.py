"""The first minutes on a machine with a GPU: build, test, benchmark, sanitize.

    python -m benchmarks.gpu               # build tests ops memcheck racecheck
    python -m benchmarks.gpu build tests   # some of them

Needs torch, triton, transformers, pytest, hypothesis and the build tools; nothing is downloaded. A part that fails does
not stop the next one; the exit status is 1 where one failed. Records go to $OUT where it is set, else to
benchmarks/results. The last lines are the bfloat16 rows of the records that this call wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
PYTHON = [sys.executable, "-m"]
PYTEST = [*PYTHON, "pytest", "-q", "-p", "no:cacheprovider"]
# The build's architecture for a device of this capability; other devices get the default build.
ARCHITECTURES = {(8, 0): "80", (9, 0): "90a"}
OPS = ("glu", "scores", "penalty", "attribution")
LONGEST_TABLE = 8000  # characters


def _sanitize(tool: str) -> list[str]:
    # With torch's caching allocator an overrun ends in memory that torch owns, and memcheck cannot see it.
    uncached = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
    return ["env", uncached, "compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
            *PYTEST, "-m", "gpu and sanitizer", "tests/kernels"]  # fmt: skip


def _benchmark(name: str, *arguments: str) -> list[str]:
    return [*PYTHON, "benchmarks", *arguments, "--out", str(RESULTS / f"{name}.json")]


# Part -> its commands. Benchmarks stand before the sanitizer, which takes longest and finds least.
PARTS: dict[str, list[list[str]]] = {
    "build": [
        [*PYTHON, "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."],
        [sys.executable, "-c", "import ssiuu_kernels; print(ssiuu_kernels.collect_env())"],
    ],
    "tests": [[*PYTEST, "-m", "gpu", "tests/kernels"]],
    "ops": [_benchmark("gpu", "--suite", *OPS, "--runs", "10")],
    "memcheck": [_sanitize("memcheck")],
    "racecheck": [_sanitize("racecheck")],
    **{
        f"step-{shape}": [_benchmark(f"gpu-step-{shape}", "--suite", "step", "--case", shape, "--runs", "6")]
        for shape in ("Llama-3.2-3B", "Llama-3.2-1B", "Llama-3.1-8B")
    },
    "memory": [_benchmark("gpu-memory", "--suite", "memory")],
}
FIRST = ("build", "tests", "ops", "memcheck", "racecheck")  # in under ten minutes together


def main() -> int:
    """Run parts in their order; exit status 1 where one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: {' '.join(FIRST)}")
    parts = parser.parse_args().parts or list(FIRST)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"part {unknown[0]!r} is unknown; expected some of {', '.join(PARTS)}")
    started, failed = time.time(), []
    for part in parts:
        begun = time.perf_counter()
        succeeded = [run(command) for command in PARTS[part]]
        if not all(succeeded):
            failed.append(part)
        say(f"{part}: {'failed' if part in failed else 'done'} in {time.perf_counter() - begun:.0f} s")
    print(headlines(path for path in sorted(RESULTS.glob("gpu*.json")) if path.stat().st_mtime >= started))
    say(f"failed: {', '.join(failed)}" if failed else "all parts done")
    return 1 if failed else 0


def run(command: list[str]) -> bool:
    """Run a command in the checkout, and say whether it succeeded; one whose tool is missing says so and fails."""
    say(shlex.join(command))
    tool = next(word for word in command if word != "env" and "=" not in word)
    if shutil.which(tool) is None:
        say(f"{tool} was not found")
        return False
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **_architectures()}, check=False).returncode == 0


def say(text: str) -> None:
    """Print a line that tells parts apart in a long log."""
    print(f"== {text}", flush=True)


def _architectures() -> dict[str, str]:
    """SSIUU_CUDA_ARCHS for this device alone, which halves the build."""
    import torch

    if "SSIUU_CUDA_ARCHS" in os.environ or not torch.cuda.is_available():
        return {}
    known = ARCHITECTURES.get(torch.cuda.get_device_capability())
    return {} if known is None else {"SSIUU_CUDA_ARCHS": known}


def headlines(records: Iterable[Path]) -> str:
    """The bfloat16 rows of records as lines of case, candidate and figures, cut at `LONGEST_TABLE` characters."""
    from .harness.record import cells

    lines = []
    for path in records:
        rows = [row for row in json.loads(path.read_text())["rows"] if "bfloat16" in row["case"]]
        lines += [path.stem, *(" | ".join(cells(row)) for row in rows)]
    text = "\n".join(lines)
    return (
        text if len(text) <= LONGEST_TABLE else text[:LONGEST_TABLE].rpartition("\n")[0] + "\n... cut; see the records"
    )


if __name__ == "__main__":
    sys.exit(main())
