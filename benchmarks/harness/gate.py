"""No time is printed for a kernel whose result has not just been checked."""

from __future__ import annotations

from .cases import Case, Tensors


def errors(case: Case) -> dict[str, float]:
    """Largest relative L2 error over the outputs of every candidate, each on the same fresh inputs, against float64."""
    inputs = case.inputs()
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    exact = case.exact(wide)
    return {
        name: _worst(run({key: tensor.clone() for key, tensor in inputs.items()}), exact)
        for name, run in case.candidates.items()
    }


def _worst(actual: Tensors, exact: Tensors) -> float:
    """A peer need not compute every output; what it computes has to be right."""
    found = [
        ((actual[name].double() - wanted).norm() / wanted.norm()).item()
        for name, wanted in exact.items()
        if name in actual
    ]
    # max() may drop a NaN, which must close the gate; so must a candidate that computes nothing.
    return float("nan") if not found or any(error != error for error in found) else max(found)
