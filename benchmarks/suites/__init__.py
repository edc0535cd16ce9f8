"""One file a suite; each has `cases()`."""

from . import attribution, glu, memory, penalty, scores, step

SUITES = {
    "glu": glu.cases,
    "scores": scores.cases,
    "penalty": penalty.cases,
    "attribution": attribution.cases,
    "step": step.cases,
    "memory": memory.cases,
}
