"""What the native kernels of every op need to know of a tensor, and the call into the compiled module."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..backends import MIN_CAPABILITY, native_module

# The codes of csrc/include/ssiuu/types.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def why_not(*tensors: Tensor | None) -> str | None:
    """The reason for which the native kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type not in ("cpu", "cuda"):
            return f"no native kernel for device {tensor.device}"
        if tensor.is_cuda and (reason := _why_no_cuda(tensor.device)) is not None:
            return reason
        if tensor.dtype.is_floating_point and tensor.dtype not in DTYPE_CODES:
            return f"dtype {tensor.dtype} is not supported (float32 and bfloat16 are)"
    return None


def _why_no_cuda(device: torch.device) -> str | None:
    info = native_module().build_info()
    if not info["cuda"]:
        why = info["why_no_cuda"]
        return f"the native module was built without CUDA kernels ({why}): change that, and build it again"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{}; 8.0 or higher is needed".format(*capability)
    if not any(_runs_on(capability, architecture) for architecture in info["cuda_archs"].split()):
        return (
            "compute capability {}.{}, but the CUDA kernels were built for {}: "
            "build them with SSIUU_CUDA_ARCHS={}{}".format(*capability, info["cuda_archs"], *capability)
        )
    return None


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether code for `architecture`, one of CMake's names, runs on a device: its PTX on later ones too."""
    parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if parts is None:
        return True  # "native", "all": the compiler's own choice, which only a launch can try
    major, minor = int(parts[1]), int(parts[2])
    if parts[3] == "a":
        return capability == (major, minor)
    if parts[3] == "f" or parts[4] == "-real":
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)


def uses_cuda(tensor: Tensor) -> bool:
    """Whether `tensor` is for the CUDA kernels. The tests of their emulation replace this."""
    return tensor.is_cuda


def call(op: str, like: Tensor, *arguments: float, workspace: tuple[int, ...] | None = None) -> None:
    """Run the compiled kernel `op` where `like` is, on the current stream.

    Args:
        arguments: those of `_native.<op>_cpu`, in its order; pointers are integers, 0 where absent.
        workspace: arguments of `_native.<op>_workspace_bytes`; None where the CUDA kernel needs no workspace.
    """
    native = native_module()
    if not uses_cuda(like):
        # As many threads as torch, also where the module's OpenMP library is not torch's: clang's beside GCC's, or the
        # system's beside a copy of torch's own.
        native.set_num_threads(torch.get_num_threads())
        getattr(native, f"{op}_cpu")(*arguments)
        return
    size = 0 if workspace is None else getattr(native, f"{op}_workspace_bytes")(*workspace)
    buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
    # The launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(like.device if like.is_cuda else -1):
        stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
        getattr(native, f"{op}_cuda")(*arguments, buffer.data_ptr(), stream)
