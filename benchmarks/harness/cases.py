"""What a suite hands to the harness: an operation or a training step on one shape, and who computes it."""

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


@dataclass(frozen=True)
class StepCase:
    """One training step, of candidates that have a state of their own.

    Attributes:
        suite, name: where the row stands and what it says.
        candidates: name -> builds the candidate with its state, and returns its step. The first is ours.
        errors: the gate: name -> error.
        tolerance: the largest that is right.
        tokens: tokens that one step serves.
        weight_bytes: of the model.
    """

    suite: str
    name: str
    candidates: dict[str, Callable[[], Callable[[], None]]]
    errors: Callable[[], dict[str, float]]
    tolerance: float
    tokens: int
    weight_bytes: int
    moved_bytes: None = None  # of a whole step, none is stated


@dataclass(frozen=True)
class BudgetCase:
    """The most layers with which a training step fits into a budget of memory.

    Attributes:
        suite, name, errors, tolerance: as in `StepCase`.
        candidates: name -> from a number of layers, builds the candidate with its state, and returns its step.
        budget: bytes.
        too_many: layers that do not fit, for certain.
        parameters: those of a model of so many layers.
    """

    suite: str
    name: str
    candidates: dict[str, Callable[[int], Callable[[], None]]]
    errors: Callable[[], dict[str, float]]
    tolerance: float
    budget: int
    too_many: int
    parameters: Callable[[int], int]


AnyCase = Case | StepCase | BudgetCase
