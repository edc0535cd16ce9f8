"""Makes Triton's interpreter round float32 to bfloat16 as GPUs do: to nearest, where it would cut off (triton 3.7)."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float


def _to_nearest(values, source, target, rounding_mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(values, source, target, rounding_mode)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(np.shape(values))


def install() -> None:
    """Replace the interpreter's conversion for the rest of the process."""
    interpreter._convert_float = _to_nearest
