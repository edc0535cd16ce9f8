"""Where the benchmarks run, and which backends can run there."""

from __future__ import annotations

import torch

import ssiuu_kernels as sk
from ssiuu_kernels.ops.backends import AUTO_ORDER

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def backends() -> list[str]:
    """Those that can run on the device, in the order in which `auto` takes them; the reference last."""
    found = sk.available_backends()
    return [name for name in AUTO_ORDER[DEVICE.type] if found[name].ok and not (name == "native" and _no_cuda(found))]


def _no_cuda(found: dict) -> bool:
    return ON_GPU and "CUDA kernels not built" in found["native"].reason
