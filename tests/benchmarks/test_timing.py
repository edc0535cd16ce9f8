"""Times on a device that runs behind the host, played by a clock."""

import types

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.harness.timing import CYCLES_PER_SECOND, Timer, wall_clock


class Device:
    """Host and device time in seconds; the device does its work in order, and none before it is queued."""

    def __init__(self):
        self.now = self.free = 0.0

    def perf_counter(self):
        return self.now

    def launch(self, host, device):
        self.now += host
        self.free = max(self.free, self.now) + device

    def synchronize(self):
        self.now = max(self.now, self.free)


@pytest.fixture
def device(monkeypatch):
    played = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = max(played.free, played.now)

        def query(self):
            return played.now >= self.time

        def synchronize(self):
            played.now = max(played.now, self.time)

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    monkeypatch.setattr(timing, "ON_GPU", True)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=played.perf_counter))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", played.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: played.launch(0.0, cycles / CYCLES_PER_SECOND))
    return played


def test_the_time_before_a_launch_is_the_hosts(device):
    found = Timer()(lambda: device.launch(host=100e-6, device=30e-6))
    assert (found.device, found.host) == pytest.approx((0.030, 0.100))
    assert not found.late


def test_work_between_launches_hides_behind_a_longer_spin(device):
    timer = Timer()

    def many():
        for _ in range(50):
            device.launch(host=100e-6, device=30e-6)

    first, second = timer(many), timer(many)
    assert first.late  # 5 ms of launches outlast the first spin
    assert (second.device, second.late) == (pytest.approx(1.5), False)


def test_a_call_that_waits_for_the_device_is_late(device):
    timer = Timer()

    def waiting():
        device.launch(host=10e-6, device=30e-6)
        device.synchronize()

    assert all(timer(waiting).late for _ in range(4))


def test_a_step_takes_what_host_and_device_take_together(device):
    found = wall_clock(lambda: [device.launch(host=100e-6, device=30e-6) for _ in range(3)])
    assert (found.device, found.host) == pytest.approx((0.330, 0.300))
