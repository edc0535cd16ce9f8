"""Bootstrap intervals against a computation of their own."""

import itertools
import statistics

import pytest

from ssiuu.analysis.statistics import Interval, bootstrap, paired_difference


def quantile(values, share):
    """Linear interpolation between order statistics."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def test_the_interval_is_that_of_all_resamples():
    values = [0.3, 1.7, -0.4, 2.2, 0.9]
    means = [statistics.fmean(drawn) for drawn in itertools.product(values, repeat=5)]  # all 3125, equally likely
    found = bootstrap(values, level=0.9, resamples=200_000)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.low == pytest.approx(quantile(means, 0.05), abs=0.02)
    assert found.high == pytest.approx(quantile(means, 0.95), abs=0.02)
    assert found.count == 5


def test_the_same_values_give_the_same_interval():
    assert bootstrap([1.0, 2.0, 4.0]) == bootstrap([1.0, 2.0, 4.0])


def test_one_value_has_no_interval():
    assert bootstrap([2.5]) == Interval(2.5, None, None, 1)


def test_no_value_is_missing_and_not_0():
    assert bootstrap([]) is None
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_equal_values_have_an_interval_of_no_width():
    assert bootstrap([0.25] * 4) == Interval(0.25, 0.25, 0.25, 4)


def test_differences_are_of_the_seeds_that_both_have():
    values, baseline = {0: 3.0, 1: 5.0, 2: 100.0}, {1: 4.0, 0: 1.0, 3: -100.0}
    assert paired_difference(values, baseline) == bootstrap([2.0, 1.0])


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 1.0}, {"resamples": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"expected a level in \(0, 1\) and at least one resample"):
        bootstrap([1.0, 2.0], **options)


def test_a_value_that_is_not_finite():
    with pytest.raises(ValueError, match="are not finite; leave out seeds"):
        bootstrap([1.0, float("nan")])
