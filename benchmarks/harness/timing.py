"""Times of interleaved candidates, their peak memory, and the copy bandwidth that limits them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .cases import Case
from .device import DEVICE, ON_GPU

# Seconds for which the device is kept busy before a call that is timed: at least, and at most.
SPIN, LONGEST_SPIN = 1e-3, 0.1
CYCLES_PER_SECOND = 2e9  # about: a spin that ends too early is seen, since the call is late then


class Elapsed(NamedTuple):
    """Milliseconds of one call.

    Attributes:
        device: until all its work is done.
        host: until the call returns.
        late: whether the device waited for the host within the call, so that `device` has the host's time in it.
    """

    device: float
    host: float
    late: bool = False


class Times(NamedTuple):
    """Milliseconds of one run: median, 20th and 80th percentile; `host` is the median until the call returned.

    Attributes:
        late: whether the device waited for the host in half of the runs or more.
    """

    median: float
    p20: float
    p80: float
    host: float
    late: bool


def summarise(runs: list[Elapsed]) -> Times:
    """Median and percentiles of at least two runs."""
    device = [run.device for run in runs]
    tenths = statistics.quantiles(device, n=10, method="inclusive")
    host = statistics.median(run.host for run in runs)
    return Times(statistics.median(device), tenths[1], tenths[7], host, sum(run.late for run in runs) * 2 >= len(runs))


def time_case(case: Case, candidates: list[str], runs: int) -> dict[str, Times]:
    """Every candidate's times. They take turns, A B A B, since the machine's speed drifts; two warm-up rounds first."""
    timers = {name: Timer() for name in candidates}
    pool = [case.inputs() for _ in range(case.inputs_per_run)]
    found: dict[str, list[Elapsed]] = {name: [] for name in candidates}
    for run in range(runs + 2):
        for name in candidates:
            inputs = pool[run % len(pool)]
            elapsed = timers[name](lambda name=name, inputs=inputs: case.candidates[name](inputs))
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
    timer = Timer()
    found = [timer(lambda: target.copy_(source)).device for _ in range(runs + 2)][2:]
    return 2 * size / (statistics.median(found) * 1e-3)


class Timer:
    """Times calls of one function, the device's work included.

    On a GPU a call is queued behind a kernel that spins, so that the interval between the two events holds the device's
    work and not the host's before each launch. The spin follows the host's time of the call before, so the first call
    or two are warm-up. A call that waits for the device can never be queued whole, and stays late.
    """

    def __init__(self):
        self.spin = SPIN

    def __call__(self, function: Callable[[], object]) -> Elapsed:
        if not ON_GPU:
            return wall_clock(function)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self.spin * CYCLES_PER_SECOND))
        start.record()
        before = time.perf_counter()
        function()
        host = time.perf_counter() - before
        late = start.query()  # the spin is over
        end.record()
        end.synchronize()
        self.spin = min(LONGEST_SPIN, SPIN + 2 * host)
        return Elapsed(start.elapsed_time(end), host * 1e3, late)


def wall_clock(function: Callable[[], object]) -> Elapsed:
    """One call on an idle device, by the host's clock: its `device` is what a training step takes, host and all."""
    _wait()
    start = time.perf_counter()
    function()
    host = time.perf_counter()
    _wait()
    return Elapsed((time.perf_counter() - start) * 1e3, (host - start) * 1e3)


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
