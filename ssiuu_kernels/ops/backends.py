"""Which implementation of an op runs: the registry of kernels, and the choice among them.

Every op folder registers one kernel per backend. A kernel says, for the tensors at hand, why it cannot run; naming a
backend that cannot run raises with that reason, and `auto` takes the first of the device's `AUTO_ORDER` that can.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

NATIVE_MODULE = "ssiuu_kernels._native"
BACKENDS = ("reference", "native", "triton")
# By device type. On a GPU no order has been measured yet; Triton's compiler is the one with more users.
AUTO_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
OTHER_DEVICES = ("reference",)
MIN_CAPABILITY = (8, 0)
ENVIRONMENT_VARIABLE = "SSIUU_BACKEND"


class Availability(NamedTuple):
    """Whether a backend can run here, and why (or why not) in one sentence."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of one op; `why_not(*tensors)` names the obstacle, or None if it can run."""

    run: Callable
    why_not: Callable[..., str | None]


_kernels: dict[tuple[str, str], Kernel] = {}


def register(op: str, backend: str, run: Callable, why_not: Callable[..., str | None] = lambda *_: None) -> None:
    """Add `backend`'s kernel for `op`. `why_not` is called with the op's tensors, None where one is absent."""
    _kernels[op, backend] = Kernel(run, why_not)


@cache
def _why_not_importable(module: str) -> str | None:
    """What importing the installed `module` raises, in one line, or None. A damaged build costs its backend alone."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


@cache
def native_module() -> ModuleType | None:
    """The compiled module, or None where it was not built or cannot be loaded."""
    return None if _why_no_native_module() else importlib.import_module(NATIVE_MODULE)


@cache
def _why_no_native_module() -> str | None:
    if importlib.util.find_spec(NATIVE_MODULE) is None:
        return "the native module is not built: install the package with `pip install .`"
    if (error := _why_not_importable(NATIVE_MODULE)) is not None:
        advice = "install what is missing, or build it here with `pip install .`"
        return f"the native module cannot be loaded ({error}): {advice}"
    return None


@cache
def _native_availability() -> Availability:
    if (reason := _why_no_native_module()) is not None:
        return Availability(False, reason)
    native = native_module()
    try:
        info, lacks = native.build_info(), native.cpu_lacks()
    except AttributeError:
        reason = "the native module is of another version of this package: build it again with `pip install .`"
        return Availability(False, reason)
    if lacks:
        return Availability(
            False,
            f"the native module was built for a CPU with {lacks}, which this one lacks: "
            "build it on this machine with `pip install .`",
        )
    cuda = f"for {info['cuda_archs']}" if info["cuda"] else f"not built ({info['why_no_cuda']})"
    return Availability(True, f"CPU kernels for {info['cpu_isa']}; CUDA kernels {cuda}")


def triton_interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests, hundreds of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_availability() -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "triton is not installed: `pip install triton`")
    if not triton_interprets() and not torch.cuda.is_available():
        return Availability(False, "torch sees no GPU")
    if (error := _why_not_importable("triton")) is not None:
        return Availability(False, f"triton cannot be loaded ({error}): install it again")
    if triton_interprets():
        return Availability(True, "Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1): for tests, very slow")
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return Availability(False, "compute capability {}.{}; 8.0 or higher is needed".format(*capability))
    return Availability(True, f"Triton kernels on {torch.cuda.get_device_name()}")


def available_backends() -> dict[str, Availability]:
    """Every backend with whether it can run on this machine, and the reason.

    Returns:
        `{"reference": ..., "native": ..., "triton": ...}`, each an `Availability(ok, reason)`.
    """
    return {
        "reference": Availability(True, "plain PyTorch, the definition of each op"),
        "native": _native_availability(),
        "triton": _triton_availability(),
    }


def check_backend(backend: str) -> str:
    """`backend` if it is a known name or "auto"; a ValueError that lists the names otherwise."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected 'auto' or one of {', '.join(BACKENDS)}")
    return backend


def _why_not(op: str, backend: str, tensors: tuple) -> str | None:
    state = available_backends()[backend]
    if not state.ok:
        return state.reason
    kernel = _kernels.get((op, backend))
    return f"{op} has no {backend} kernel" if kernel is None else kernel.why_not(*tensors)


def select(op: str, backend: str, *tensors: torch.Tensor | None) -> Callable:
    """The function that runs `op` on `tensors`.

    Args:
        op: name under which kernels were registered.
        backend: "auto" or a backend's name. `SSIUU_BACKEND`, where set, replaces "auto".
        tensors: the op's tensor arguments, in its own order.

    Raises:
        ValueError: unknown backend, or a named backend that cannot run, with its reason.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    check_backend(backend)
    if backend != "auto":
        reason = _why_not(op, backend, tensors)
        if reason is not None:
            raise ValueError(f"backend={backend!r} cannot run {op}: {reason}; use backend='auto'")
        return _kernels[op, backend].run
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    for candidate in AUTO_ORDER.get(device, OTHER_DEVICES):
        if _why_not(op, candidate, tensors) is None:
            return _kernels[op, candidate].run
    raise AssertionError(f"{op} has no reference kernel")
