"""Statistics over seeds and across environments, against scipy and against their definitions."""

import itertools

import numpy as np
import pytest
import scipy.stats

from lab import stats

SAMPLES = [[3.0, 4.5], [1.0, 2.0, 3.0], [-5.0, 0.1, 7.0, 7.5, 20.0, -3.0, 0.0]]


@pytest.mark.parametrize("values", SAMPLES)
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_the_interval_is_students(values, confidence):
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
    mean, lower, upper = stats.t_interval(values, confidence)
    assert (mean, lower, upper) == pytest.approx((sum(values) / len(values), *expected))


def test_the_interval_of_1_2_3_by_hand():
    """Standard error 1 / sqrt(3); the table's t for two degrees of freedom is 4.303."""
    assert stats.t_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484, 2 + 2.484), abs=1e-3)


def test_a_single_value_has_a_mean_and_no_interval():
    assert stats.t_interval([4.0]) == pytest.approx((4.0, np.nan, np.nan), nan_ok=True)
    assert np.isnan(stats.t_interval([])).all() and np.isnan(stats.iqm([]))
    assert np.isnan(stats.median([])) and stats.median([3.0, 1.0, 10.0, 2.0]) == 2.5


@pytest.mark.parametrize("values, expected", [
    ([7.0], 7.0), ([1.0, 3.0], 2.0), ([100.0, 1.0, -100.0, 2.0], 1.5),
    ([0.0, 1.0, 2.0, 3.0, 1000.0], 2.0),
    ([-90.0, -80.0, 1.0, 2.0, 3.0, 4.0, 500.0, 600.0], 2.5)])
def test_iqm_is_the_mean_of_the_middle_half(values, expected):
    assert stats.iqm(values) == pytest.approx(expected)


def test_the_iqm_across_environments_is_of_all_runs_together():
    """Sorted: -9 1 | 2 3 4 5 | 6 99. The mean of each environment's IQM would be 3.75."""
    strata = [np.array([1.0, 2.0, 99.0]), np.array([3.0, -9.0, 4.0, 5.0, 6.0])]
    assert stats.pooled_iqm(strata) == pytest.approx(3.5)
    twice = [np.stack([x, 10 * x]) for x in strata]
    assert stats.pooled_iqm(twice) == pytest.approx([3.5, 35])


def test_a_performance_profile_counts_the_runs_above_and_averages_environments():
    """Of 0 1 2 3 above 1 lie two, not three; the second environment weighs as much with two runs
    as the first with four."""
    strata = [np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 5.0])]
    profile = stats.performance_profile(strata, np.array([-1.0, 1.0, 2.5, 5.0]))
    assert profile == pytest.approx([1, (2 / 4 + 1 / 2) / 2, (1 / 4 + 1 / 2) / 2, 0])


def test_the_probability_of_improvement_by_hand_and_as_mann_whitneys():
    assert stats.probability_of_improvement([1, 2], [1, 3]) == pytest.approx(1.5 / 4)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 9), rng.integers(0, 6, 7)  # with ties
    expected = scipy.stats.mannwhitneyu(x, y).statistic / (9 * 7)
    assert stats.probability_of_improvement(x, y) == pytest.approx(expected)
    assert stats.probability_of_improvement(y, x) == pytest.approx(1 - expected)


def test_the_probability_of_improvement_averages_environments_not_pairs():
    """1 of 1 pair, and 0 of 4."""
    pairs = [np.array([2.0]), np.array([1.0]), np.array([0.0, 0.0]), np.array([1.0, 1.0])]
    assert stats.mean_improvement(pairs) == pytest.approx(0.5)


def mean(strata):
    return np.concatenate(strata, -1).mean(-1)


def test_the_bootstrap_of_two_values_by_hand():
    """The mean of 0 and 1 drawn anew is 0, 0.5, 1 with probabilities 1/4, 1/2, 1/4."""
    values = [np.array([0.0, 1.0])]
    assert stats.stratified_bootstrap(values, mean) == pytest.approx((0, 1))
    assert stats.stratified_bootstrap(values, mean, 0.6) == pytest.approx((0, 1))
    assert stats.stratified_bootstrap(values, mean, 0.4) == pytest.approx((0.5, 0.5))


def test_the_bootstrap_draws_within_each_environment():
    """Drawn from both together, the mean would vary."""
    strata = [np.zeros(3), np.ones(3)]
    assert stats.stratified_bootstrap(strata, mean) == pytest.approx((0.5, 0.5))


def test_the_bootstrap_agrees_with_all_resamples_there_are():
    strata = [np.array([0.0, 4.0, 1.0]), np.array([10.0, 3.0, 20.0])]
    everything = [stats.pooled_iqm([np.array(a), np.array(b)])
                  for a in itertools.product(strata[0], repeat=3)
                  for b in itertools.product(strata[1], repeat=3)]
    for confidence in (0.95, 0.8, 0.5):
        tails = (1 - confidence) / 2, (1 + confidence) / 2
        expected = np.quantile(everything, tails)
        found = stats.stratified_bootstrap(strata, stats.pooled_iqm, confidence)
        assert found == pytest.approx(tuple(expected), abs=0.51), confidence


def test_the_bootstrap_agrees_with_scipys():
    values = np.random.default_rng(1).normal(size=40)
    expected = scipy.stats.bootstrap([values], np.mean, method="percentile", rng=0)
    low, high = expected.confidence_interval
    assert stats.stratified_bootstrap([values], mean) == pytest.approx((low, high), abs=0.03)


def test_the_bootstrap_repeats_itself_and_knows_nothing_of_a_single_run():
    strata = [np.array([0.0, 4.0, 1.0]), np.array([10.0, 3.0])]
    assert stats.stratified_bootstrap(strata, mean) == stats.stratified_bootstrap(strata, mean)
    lower, upper = stats.stratified_bootstrap([*strata, np.array([1.0])], mean)
    assert np.isnan(lower) and np.isnan(upper)
