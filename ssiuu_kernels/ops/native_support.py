"""What the native kernels of every op need to know of a tensor, and the call into the compiled module."""

from __future__ import annotations

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
    if not native_module().build_info()["cuda"]:
        return "the native module was built without CUDA: rebuild it where nvcc is found, and without SSIUU_CUDA=0"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{}; 8.0 or higher is needed".format(*capability)
    return None


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
        getattr(native, f"{op}_cpu")(*arguments)
        return
    size = 0 if workspace is None else getattr(native, f"{op}_workspace_bytes")(*workspace)
    buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
    # The launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(like.device if like.is_cuda else -1):
        stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
        getattr(native, f"{op}_cuda")(*arguments, buffer.data_ptr(), stream)
