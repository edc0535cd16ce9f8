"""The CUDA kernels on the CPU: csrc/cuda compiled by a C++ compiler against shim/cuda_runtime.h.

It shows what the kernels compute, and that they stay within their workspace. It shows neither races between warps, nor
anything of speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from filelock import FileLock

COMPILER = shutil.which("g++")
ROOT = Path(__file__).parents[4]
CSRC = ROOT / "csrc"
SHIM = Path(__file__).parent / "shim"
GUARD = b"\xa5" * 256


@functools.cache
def emulated_module():
    """The compiled module with emulated CUDA launchers; every workspace has a guard behind it."""
    sources = sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cpp")])
    digest = hashlib.sha256()
    for path in sorted([*CSRC.rglob("*.*"), *SHIM.rglob("*.*"), Path(__file__)]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-emulation" / digest.hexdigest()[:16]
    library = folder / "_native.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(ROOT / "build" / "cuda-emulation.lock"):  # test processes beside this one build it too
        if not library.exists():
            _build(sources, library)
    spec = importlib.util.spec_from_file_location("_native", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _Guarded(module)


def _build(sources: list[Path], library: Path) -> None:
    folder = library.parent
    for outdated in folder.parent.glob("*"):
        if outdated != folder:
            shutil.rmtree(outdated, ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder), sources))
    partial = folder / "partial.so"
    _run([COMPILER, "-shared", "-o", partial, *objects])
    partial.replace(library)


def _compile(source: Path, folder: Path) -> Path:
    # Of the CPU kernels only the names are needed, by bindings.cpp.
    level = "-O0" if source.parent.name == "cpu" else "-O1"
    target = folder / f"{source.parent.name}-{source.stem}.o"
    _run([
        COMPILER, "-std=c++17", level, "-fPIC", "-fvisibility=hidden", "-x", "c++", "-c", source, "-o", target,
        "-DSSIUU_WITH_CUDA", '-DSSIUU_CUDA_ARCHS="emulated"', "-Wno-unknown-pragmas",
        "-I", SHIM, "-I", CSRC / "include", "-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"],
    ])  # fmt: skip
    return target


def _run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulation was not built:\n{done.stderr}")


class _Guarded:
    """The module; a launcher that writes behind the workspace that it asked for raises."""

    def __init__(self, module):
        self._module = module
        self._workspace_bytes = {}

    def __getattr__(self, name: str):
        function = getattr(self._module, name)
        op, _, kind = name.rpartition("_")
        if name.endswith("_workspace_bytes"):
            return functools.partial(self._ask, name.removesuffix("_workspace_bytes"), function)
        return functools.partial(self._launch, op, function) if kind == "cuda" else function

    def _ask(self, op: str, function, *arguments: int) -> int:
        self._workspace_bytes[op] = function(*arguments)
        return self._workspace_bytes[op] + len(GUARD)

    def _launch(self, op: str, function, *arguments: float) -> None:
        *_, workspace, _stream = arguments
        size = self._workspace_bytes.pop(op, None)
        if size is None:
            return function(*arguments)
        ctypes.memmove(workspace + size, GUARD, len(GUARD))
        function(*arguments)
        assert ctypes.string_at(workspace + size, len(GUARD)) == GUARD, f"{op} wrote behind its workspace"
        return None
