"""What nvcc makes of the CUDA kernels, read off their machine code without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[4]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def disassembler() -> Path | None:
    """cuobjdump, which comes inside the triton package too."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return Path(found)
    import triton

    packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return packaged if packaged.exists() else None


def nvcc_version() -> str:
    """For example "13.0"."""
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def kernels(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> architecture -> registers, spilled bytes, and bits of the widest global load and store.

    Args:
        folder: where objects are compiled to, unless the build's own are there and newer than the sources.
    """
    objects = _built_objects() or _compile(folder)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for path in objects:
        for architecture in ARCHITECTURES:
            for name, row in _inspect(path, f"sm_{architecture}").items():
                found.setdefault(name, {})[f"sm_{architecture}"] = row
    return dict(sorted(found.items()))


def _built_objects() -> list[Path]:
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    for folder in (ROOT / "build").glob("temp*/CMakeFiles/ssiuu_cuda.dir/csrc/cuda"):
        objects = [folder / f"{source.name}.o" for source in SOURCES]
        if all(path.exists() and path.stat().st_mtime >= newest for path in objects):
            return objects
    return []


def _compile(folder: Path) -> list[Path]:
    def run(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
        command = [NVCC, "-std=c++17", "-O3", "-I", ROOT / "csrc" / "include", *targets, "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, SOURCES))


def _inspect(path: Path, architecture: str) -> dict[str, dict[str, int]]:
    tool = disassembler()
    usage = _output(tool, "-arch", architecture, "-res-usage", path)
    rows = {
        name: {"registers": int(registers), "spilled": int(stack) + int(local)}
        for name, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        )
    }
    for part in _output(tool, "-arch", architecture, "-sass", path).split("Function : ")[1:]:
        rows[part.split(None, 1)[0]] |= {
            "load_bits": _widest(part, r"LDG\.E"),
            "store_bits": _widest(part, r"STG\.E"),
        }
    names = subprocess.run(["c++filt"], input="\n".join(rows), capture_output=True, text=True, check=True).stdout
    return dict(zip(map(_short, names.split("\n")), rows.values(), strict=False))


def _output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _widest(assembly: str, access: str) -> int:
    # An access without a size is of 32 bits.
    found = re.findall(rf"\b{access}(?:\.[A-Z]+)*?(?:\.(64|128))?(?:\.[A-Z]+)* ", assembly)
    return max((int(bits or 32) for bits in found), default=0)


def _short(name: str) -> str:
    """The kernel and its template arguments, without namespaces and parameters."""
    name = re.sub(r"\((anonymous namespace)\)::|ssiuu::(cuda::)?|^void |\(bool\)|\(int\)", "", name)
    return re.sub(r"\(.*", "", name)
