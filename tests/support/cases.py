"""Shapes, segments and layouts on which every kernel is tried."""

import pytest
import torch

# A test that takes a backend runs on the device of its parameter: see the fixture `_device` in conftest.py. Where torch
# sees no GPU, conftest.py turns Triton's interpreter on, and its kernels run on CPU tensors. "cuda_emulated" are the
# CUDA kernels, compiled for the CPU (cuda_emulation/).
CUDA = torch.cuda.is_available()
BACKENDS = [
    "reference",
    "native",
    pytest.param("native", id="cuda_emulated", marks=pytest.mark.emulated),
    pytest.param("reference", id="reference_cuda", marks=pytest.mark.gpu),
    pytest.param("native", id="native_cuda", marks=pytest.mark.gpu),
    pytest.param("triton", id="triton_cuda", marks=pytest.mark.gpu)
    if CUDA
    else pytest.param("triton", id="triton_interpreted"),
]
DTYPES = [torch.float32, torch.bfloat16]

# (rows, columns, segments): odd sizes, none a multiple of a vector or a block.
SEGMENTED = {
    "one sample": (37, 129, [(0, 37)]),
    "one token": (1, 17, [(0, 1)]),
    "no rows": (0, 5, [(0, 0)]),
    "no samples": (6, 9, []),
    "left padding": (24, 33, [(3, 8), (8, 16), (20, 24)]),
    "right padding": (24, 33, [(0, 5), (8, 16), (16, 19)]),
    "an empty sample": (13, 65, [(0, 6), (6, 6), (6, 13)]),
    "packed, out of order": (50, 31, [(30, 50), (0, 11), (11, 30)]),
    "a long sample": (1101, 7, [(0, 900), (910, 1101)]),
    "one column": (120, 1, [(row, row + 9) for row in range(0, 120, 10)]),
    "wide": (3, 2053, [(0, 2), (2, 3)]),
}


def random_rows(rows, cols, dtype, *, sliced=False):
    """Normal numbers `[rows, cols]`; `sliced` takes them from a wider tensor, as a fused projection gives them."""
    return torch.randn(rows, 2 * cols + 3).to(dtype)[:, 1 : cols + 1] if sliced else torch.randn(rows, cols).to(dtype)


def as_segments(pairs):
    return torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
