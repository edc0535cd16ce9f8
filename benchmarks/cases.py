"""What a suite hands to the harness: one operation on one shape, and who computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Tensors = dict[str, Tensor]
Candidate = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes:
        suite, name: where the row stands and what it says.
        moved_bytes: bytes that the operation has to read and write, the limit that bandwidth sets; None where
            something else limits.
        inputs: makes fresh random inputs by name.
        candidates: name -> function of the inputs that returns the outputs by name. In-place operations return the
            tensors that they wrote. The first candidate is ours; ratios are of the others' times to its time.
        exact: the same function in float64: it is given the inputs as float64 (integers as they are).
        tolerance: largest relative L2 error of an output.
        inputs_per_run: how many sets of inputs to rotate through, so that no cache keeps them.
        tokens: tokens that one run serves, for a rate.
        missing: peer -> why it is not among the candidates.
    """

    suite: str
    name: str
    moved_bytes: int | None
    inputs: Callable[[], Tensors]
    candidates: dict[str, Candidate]
    exact: Candidate
    tolerance: float
    inputs_per_run: int = 1
    tokens: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
