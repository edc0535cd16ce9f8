"""Times of interleaved candidates, their peak memory, and the copy bandwidth that limits them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .cases import Case
from .device import DEVICE, ON_GPU


class Times(NamedTuple):
    """Milliseconds of one run: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def summarise(runs: list[float]) -> Times:
    """Median and percentiles of the milliseconds of at least two runs."""
    tenths = statistics.quantiles(runs, n=10, method="inclusive")
    return Times(statistics.median(runs), tenths[1], tenths[7])


def time_case(case: Case, candidates: list[str], runs: int) -> dict[str, Times]:
    """Every candidate's times. They take turns, A B A B, since the machine's speed drifts; two warm-up rounds first."""
    pool = [case.inputs() for _ in range(case.inputs_per_run)]
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for run in range(runs + 2):
        for name in candidates:
            inputs = pool[run % len(pool)]
            elapsed = milliseconds(lambda name=name, inputs=inputs: case.candidates[name](inputs))
            if run >= 2:
                found[name].append(elapsed)
    return {name: summarise(times) for name, times in found.items()}


def peak_bytes(case: Case, candidate: str) -> int | None:
    """Largest device memory of one run above its inputs. None on a CPU, where torch does not count."""
    if not ON_GPU:
        return None
    inputs = case.inputs()
    case.candidates[candidate](inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.candidates[candidate](inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(size: int = 1 << 28, runs: int = 10) -> float:
    """Bytes per second that a plain copy of `size` bytes reads and writes together, median of `runs`."""
    source, target = (torch.rand(size // 4, device=DEVICE) for _ in range(2))
    found = [milliseconds(lambda: target.copy_(source)) for _ in range(runs + 2)][2:]
    return 2 * size / (statistics.median(found) * 1e-3)


def milliseconds(function: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    if not ON_GPU:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
