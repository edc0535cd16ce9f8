"""token_scores: every backend against float64."""

import pytest
import torch

import ssiuu_kernels as sk

from ...support import eager
from ...support.accuracy import assert_as_accurate_as_pytorch, assert_same_direction
from ...support.cases import BACKENDS, DTYPES, SEGMENTED, as_segments, random_rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SEGMENTED)
@pytest.mark.parametrize("sliced", [False, True], ids=["dense", "sliced"])
def test_scores(case, sliced, dtype, backend):
    rows, cols, pairs = SEGMENTED[case]
    z, grad_z = (random_rows(rows, cols, dtype, sliced=sliced) for _ in range(2))
    segments = as_segments(pairs)
    actual = torch.stack(sk.ops.token_scores(z, grad_z, segments=segments, backend=backend))
    exact = eager.segment_scores(z.double() * grad_z.double(), segments)
    assert_as_accurate_as_pytorch(actual, exact, eager.segment_scores(z * grad_z, segments), torch.float32)
    assert_same_direction(actual, exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_scores(backend):
    z, grad_z = torch.randn(8, 21), torch.randn(8, 21)
    z[3, 20] = float("nan")
    for scores in sk.ops.token_scores(z, grad_z, backend=backend):
        assert scores.isnan().nonzero().tolist() == [[0, 20]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    arguments = (torch.randn(6, 10), torch.randn(6, 10), as_segments([(0, 2), (2, 6)]), backend)
    torch.library.opcheck(torch.ops.ssiuu.token_scores, arguments)
