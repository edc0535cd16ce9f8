"""One file a suite; each has `cases()`."""

from . import attribution, glu, penalty, scores

SUITES = {"glu": glu.cases, "scores": scores.cases, "penalty": penalty.cases, "attribution": attribution.cases}
