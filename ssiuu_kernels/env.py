"""What a bug report or a benchmark needs to know of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from .ops.backends import ENVIRONMENT_VARIABLE, available_backends, native_module

PACKAGES = ("ssiuu-kernels", "torch", "triton", "transformers", "accelerate", "numpy")


def environment() -> dict[str, str]:
    """Versions, processor, device and backends by name, all as text, in the order of `collect_env`."""
    facts = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    facts["cpu"] = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts |= {package: _version(package) for package in PACKAGES}
    native = native_module()
    if native is not None:
        facts["native build"] = ", ".join(f"{key}={value}" for key, value in native.build_info().items())
    for name, state in available_backends().items():
        facts[f"backend {name}"] = f"{'yes' if state.ok else 'no'} ({state.reason})"
    facts[ENVIRONMENT_VARIABLE] = os.environ.get(ENVIRONMENT_VARIABLE, "not set")
    return facts


def collect_env() -> str:
    """`environment()` as text for a bug report, one `name: value` per line."""
    return "\n".join(f"{name}: {value}" for name, value in environment().items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
