import numpy as np
import pytest

from rag.quality.significance import Shares, holm, interval, p_values, resampled, swapped


def shares(parts, wholes=None):
    parts = np.array(parts, dtype=float).reshape(len(parts), -1)
    return Shares(parts, np.ones_like(parts) if wholes is None else np.array(wholes, dtype=float).reshape(parts.shape))


def test_a_figure_is_the_sum_of_its_parts_over_the_sum_of_its_wholes():
    # One question with 3 citations, 1 of them right; one with 1, right: 2 of 4, not (1/3 + 1) / 2.
    assert shares([1, 1], [3, 1]).totals() == pytest.approx([0.5])
    assert np.isnan(shares([0, 0], [0, 0]).totals()).all()


def test_the_interval_of_a_coin_is_the_one_in_the_textbook():
    # 50 of 100: standard error 0.05, so 0.5 -+ 1.96 * 0.05.
    low, high = interval(resampled(shares([1, 0] * 50), rounds=4000))
    assert low == pytest.approx([0.402], abs=0.015) and high == pytest.approx([0.598], abs=0.015)


def test_an_interval_is_the_same_each_time_and_exact_where_nothing_varies():
    same = shares([1] * 20)
    assert interval(resampled(same)) == (1.0, 1.0)
    coin = shares([1, 0, 0, 1, 1])
    assert np.array_equal(resampled(coin), resampled(coin))


def test_samples_of_two_runs_are_paired():
    a, b = shares([1, 0, 1, 0]), shares([0, 1, 0, 1])
    # Every question is right in exactly one of them, so the paired sum is 1 in every sample.
    assert resampled(a) + resampled(b) == pytest.approx(np.ones((2000, 1)))


def test_a_figure_no_sample_holds_has_no_interval():
    low, high = interval(resampled(shares([0, 0], [0, 0])))
    assert np.isnan(low).all() and np.isnan(high).all()


def p_of(a, b):
    chance_a, chance_b = swapped(shares(a), shares(b), rounds=4000)
    return float(p_values(shares(b).totals() - shares(a).totals(), chance_b - chance_a)[0])


def test_the_permutation_test_agrees_with_counting_by_hand():
    # Five questions went from wrong to right, none back: of 2^5 ways to swap them only all-same and
    # all-swapped differ as much, so p = 2/32.
    assert p_of([0, 0, 0, 0, 0], [1, 1, 1, 1, 1]) == pytest.approx(2 / 32, abs=0.012)
    # Five of ten went up and five down: no difference at all.
    assert p_of([0, 1] * 5, [1, 0] * 5) == 1.0
    assert p_of([0] * 12, [1] * 12) < 0.005


def test_holm_corrects_the_smallest_most():
    # 0.01 * 3, then 0.02 * 2, then 0.5 * 1; never smaller than the one before.
    assert holm([0.5, 0.01, 0.02]) == pytest.approx([0.5, 0.03, 0.04])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
