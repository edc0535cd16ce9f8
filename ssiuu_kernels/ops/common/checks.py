"""Argument checks that the ops share. Each names the argument, what came, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(name: str, tensor: Tensor) -> None:
    """`tensor` is a floating tensor of a type that the ops support."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.dtype not in FLOAT_TYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_TYPES)
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected one of {expected}: convert it first")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """`tensor` has `other`'s shape, device and (unless `dtype` is false) type."""
    check_float(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {other_name}'s, {list(other.shape)}")
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}; move them to one device")
    if dtype and tensor.dtype != other.dtype:
        raise ValueError(f"{name} is {tensor.dtype} and {other_name} {other.dtype}; convert them to one type")


def check_rows(name: str, tensor: Tensor) -> None:
    """`tensor` is `[T, D]` or `[B, S, D]`."""
    check_float(name, tensor)
    if tensor.dim() not in (2, 3):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [T, D] or [B, S, D]")


def check_in_place(tensors: Iterable[tuple[str, Tensor, bool]]) -> None:
    """The tensors are contiguous, and no memory is written that another of them has: one pass reads and writes.

    Args:
        tensors: (name, tensor, whether it is written), all on one device.
    """
    spans: list[tuple[int, int, str, bool]] = []
    for name, tensor, written in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} of shape {list(tensor.shape)} and strides {list(tensor.stride())} is not contiguous; "
                f"in-place ops need it so: keep it contiguous, or pass {name}.contiguous() and copy back"
            )
        if tensor.numel():
            start = tensor.data_ptr()
            spans.append((start, start + tensor.numel() * tensor.element_size(), name, written))
    spans.sort(key=lambda span: span[0])
    # Sorted by start, each is compared with the earlier one that reaches furthest, and with the written one that does.
    furthest = furthest_written = (0, "")
    for start, end, name, written in spans:
        reach, other = furthest if written else furthest_written
        if start < reach:
            raise ValueError(f"{name} and {other} share memory; in-place ops need separate tensors: clone one of them")
        furthest = max(furthest, (end, name))
        if written:
            furthest_written = max(furthest_written, (end, name))


def as_rows(tensor: Tensor) -> Tensor:
    """`[B, S, D]` or `[T, D]` as `[T, D]`: a view wherever the strides allow one."""
    return tensor.flatten(0, -2)


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` `[T, D]` with neighbouring columns next to each other; only rows may be strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def make_segments(tensor: Tensor, segments: Tensor | None) -> Tensor:
    """The rows of each sample, int32 `[B, 2]` (start, end) on `tensor`'s device.

    Without `segments`, `[B, S, D]` is B samples of S rows and `[T, D]` one sample. Given segments are checked for type
    and shape here, and for their values where the kernel runs (`check_segment_values`).
    """
    if segments is None:
        samples, rows = (tensor.shape[0], tensor.shape[1]) if tensor.dim() == 3 else (1, tensor.shape[0])
        start = torch.arange(samples, dtype=torch.int32, device=tensor.device) * rows
        return torch.stack([start, start + rows], dim=1)
    if not isinstance(segments, Tensor) or segments.dtype != torch.int32:
        came = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
        raise TypeError(f"segments is {came}; expected an int32 tensor [B, 2] of start and end rows")
    if segments.dim() != 2 or segments.shape[1] != 2:
        raise ValueError(
            f"segments has shape {list(segments.shape)}; expected [B, 2]: start and end row of each sample"
        )
    if segments.device != tensor.device:
        raise ValueError(f"segments is on {segments.device} and the data on {tensor.device}; move it there")
    return segments.contiguous()


def longest_sample(tensor: Tensor, segments: Tensor | None) -> int:
    """Rows of a sample where sizes alone tell them; 0 with given segments, whose values may be on a GPU."""
    return 0 if segments is not None else tensor.shape[-2]


def check_segment_values(segments: Tensor, rows: int) -> None:
    """Segments lie within `rows`, run forward and do not overlap. On a GPU the values are trusted: no host read."""
    if segments.is_cuda:
        return
    start, end = segments.long().unbind(1)
    for wrong, what in (
        (start < 0, "starts before row 0"),
        (end > rows, f"ends after the last of {rows} rows"),
        (end < start, "goes backwards"),
    ):
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"segments[{index}] = {segments[index].tolist()} {what}; expected 0 <= start <= end <= rows"
            )
    order = start.argsort(stable=True)
    order = order[start[order] < end[order]]
    overlap = (end[order][:-1] > start[order][1:]).nonzero()
    if len(overlap):
        first, second = order[overlap[0]].item(), order[overlap[0] + 1].item()
        raise ValueError(
            f"segments[{first}] = {segments[first].tolist()} and segments[{second}] = {segments[second].tolist()} "
            "overlap; a row belongs to at most one sample"
        )
