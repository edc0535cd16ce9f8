"""Peak memory.

On a GPU: bytes that torch has allocated. On a CPU, where torch does not count: resident memory of this process as Linux
counts it, with whatever the C library keeps of freed tensors.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from .device import ON_GPU

_PROCESS = Path("/proc/self")
MEASURABLE = ON_GPU or (_PROCESS / "clear_refs").exists()  # Linux


class PeakMemory:
    """Bytes above those in use when this was made."""

    def __init__(self):
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
        elif hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc, which keeps freed memory
            ctypes.CDLL(None).malloc_trim(0)
        self.reset()
        self._before = self._peak() if MEASURABLE else 0

    def reset(self) -> None:
        """Forget what was in use until now."""
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        elif MEASURABLE:
            (_PROCESS / "clear_refs").write_text("5")  # as `man proc_pid_clear_refs` says

    def read(self) -> int | None:
        """The most since `reset`; None where it cannot be measured."""
        return self._peak() - self._before if MEASURABLE else None

    def _peak(self) -> int:
        if ON_GPU:
            return torch.cuda.max_memory_allocated()
        lines = (_PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
