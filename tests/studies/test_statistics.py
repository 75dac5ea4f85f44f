"""Spread and comparisons against SciPy, plain NumPy and cases worked by hand."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from ptp_ds.studies import statistics
from ptp_ds.studies.statistics import _intervals, compare, compare_all, holm, sign_flip_p, spread_of


def test_a_spread():
    found = spread_of([0.5, 0.75, 1.0])
    assert (found.mean, found.std, found.least, found.largest, found.count) == (0.75, 0.25, 0.5, 1.0, 3)
    assert found.gap == 0.25
    assert spread_of([0.5]).std is None
    with pytest.raises(ValueError, match="no scores"):
        spread_of([])


@pytest.mark.parametrize("differences", [[1.0, 2.0, 3.0], [0.1, 0.1, -0.05, 0.2, 0.0], [-1.0, 1.0], [0.0, 0.0, 0.0]])
def test_p_counts_sign_flips(differences):
    """Every pattern of signs, counted: how often the mean's size is at least the one found."""
    values = np.array(differences)
    means = [abs((np.array(signs) * values).mean()) for signs in product((1, -1), repeat=len(values))]
    expected = np.mean([mean >= abs(values.mean()) - 1e-12 for mean in means])
    assert sign_flip_p(values) == pytest.approx(expected)


def test_p_of_many_pairs_is_near_wilcoxons():
    """Drawn flips, where all can't be looked at: for normal differences both tests find nearly the same."""
    values = np.random.default_rng(0).normal(0.2, 1.0, 60)
    assert sign_flip_p(values) == pytest.approx(stats.wilcoxon(values).pvalue, abs=0.05)
    assert sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)
    assert sign_flip_p(values) == sign_flip_p(values)


def test_holm_by_hand():
    """0.01 * 4, 0.02 * 3, then the largest so far; the textbook's example."""
    found = holm({"a": 0.04, "b": 0.01, "c": 0.02, "d": 0.03, "none": None})
    assert found == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06, "none": None})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": None}) == {"a": None}


def test_a_comparison_over_common_seeds():
    ours = {0: 0.8, 1: 0.82, 2: 0.84, 9: 0.1}
    theirs = {0: 0.7, 1: 0.8, 2: 0.9, 5: 0.0}
    found = compare(ours, theirs)
    assert found.pairs == 3
    assert found.gain == pytest.approx(0.02)
    assert found.worst_gain == pytest.approx(0.1)
    assert found.spread_ratio == pytest.approx(0.2)
    assert found.p == pytest.approx(sign_flip_p([0.1, 0.02, -0.06]))
    assert (found.gain_interval, found.spread_interval) == (None, None), "of three pairs"
    assert compare({0: 1.0}, {1: 1.0}) is None
    single = compare({0: 0.5}, {0: 0.25})
    assert (single.gain, single.gain_interval, single.spread_ratio, single.p) == (0.25, None, None, None)
    assert compare({0: 0.5, 1: 0.75}, {0: 0.5, 1: 0.5}).spread_ratio is None


def test_intervals_cover_as_often_as_they_say(monkeypatch):
    """100 draws of 30 pairs with a known gain: the 95 % interval holds it in 85 to 99 of them."""
    monkeypatch.setattr(statistics, "_FLIPS", 99)  # of p, which isn't asked for
    generator, covered = np.random.default_rng(1), 0
    for _ in range(100):
        base = generator.normal(0.7, 0.05, 30)
        better = base + generator.normal(0.03, 0.02, 30)
        low, high = compare(dict(enumerate(better)), dict(enumerate(base))).gain_interval
        covered += low <= 0.03 <= high
    assert 85 <= covered <= 99


def test_over_tasks_spread_is_that_within_them():
    """By hand: task a has deviations of 1 and 2, task b, 100 points higher, of 3 and 6."""
    a = ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 2.0, 2: 4.0})
    b = ({0: 107.0, 1: 110.0, 2: 113.0}, {0: 104.0, 1: 110.0, 2: 116.0})
    found = compare_all([a, b])
    assert found.pairs == 6
    assert found.gain == pytest.approx(0.0)
    assert found.spread_ratio == pytest.approx(0.5)
    assert found.worst_gain == pytest.approx((1.0 + 3.0) / 2)
    assert found.p == pytest.approx(1.0)
    assert found.gain_interval is None


def test_intervals_need_five_pairs_of_every_task():
    generator = np.random.default_rng(2)
    sides = [[dict(enumerate(generator.normal(size=count))) for _ in range(2)] for count in (2, 3, 4, 5, 6)]
    for few in sides[:3]:
        assert (compare(*few).gain_interval, compare(*few).spread_interval) == (None, None)
        both = compare_all([few, sides[3]])
        assert (both.gain_interval, both.spread_interval) == (None, None)
        assert compare(*few).p is not None
        assert compare(*few).spread_ratio is not None
    for found in (compare(*sides[3]), compare_all(sides[3:])):
        assert found.gain_interval[0] < found.gain < found.gain_interval[1]
        assert found.spread_interval[0] < found.spread_ratio < found.spread_interval[1]


def test_over_one_task_it_is_the_tasks_comparison():
    scores = np.random.default_rng(3).normal(size=(2, 12))
    ours, theirs = (dict(enumerate(side)) for side in scores)
    one, all_tasks = compare(ours, theirs), compare_all([(ours, theirs)])
    for name in ("gain", "spread_ratio", "p", "worst_gain", "pairs"):
        assert getattr(all_tasks, name) == pytest.approx(getattr(one, name)), name
    for name in ("gain_interval", "spread_interval"):
        assert getattr(all_tasks, name) == pytest.approx(getattr(one, name), rel=0.1, abs=0.03), name
    assert compare_all([({0: 1.0}, {1: 1.0})]) is None
    single = compare_all([({0: 1.0}, {0: 0.5})])
    assert (single.gain, single.p, single.spread_ratio, single.gain_interval) == (0.5, None, None, None)


def test_p_is_exact_where_sums_are_equal():
    """In whole numbers, counted: fractions of 56 rows, whose sums floats round apart."""
    generator = np.random.default_rng(1)
    cases = [[-1, -8, 2, 4, 15, 0, -6, -12, -1, 7], *(generator.integers(-15, 16, size) for size in (3, 6, 9, 12))]
    for whole in cases:
        sums = [abs(np.dot(signs, whole)) for signs in product((1, -1), repeat=len(whole))]
        expected = np.mean(np.array(sums) >= abs(sum(whole)))
        assert sign_flip_p(np.array(whole) / 56) == pytest.approx(expected, abs=1e-12)
    assert sign_flip_p(np.array(cases[0]) / 56) == 1.0, "its sum is 0"


@pytest.mark.parametrize("right", range(75, 300, 4))
def test_equal_scores_have_no_spread(right):
    """The majority's score from every seed: the mean of ten floats may be a rounding away from each of them."""
    same, other = dict.fromkeys(range(10), right / 300), {seed: 0.5 + seed / 300 for seed in range(10)}
    assert spread_of(list(same.values())).std == 0.0
    assert compare(same, other).spread_ratio == 0.0
    assert compare(other, same).spread_ratio is None
    assert compare_all([(other, same), (other, same)]).spread_ratio is None


def test_resamples_of_one_pair_have_no_ratio():
    """Of three seeds every ninth resample is one pair three times over, whose ratio would be rounding over rounding."""
    sides = np.array((154, 151, 193)), np.array((187, 191, 176))
    _, spread_interval = _intervals(sides[0] / 277, sides[1] / 277, seed=0)
    several = []
    for drawn in product(range(3), repeat=3):
        left, right = (side[list(drawn)] for side in sides)
        if len(set(drawn)) > 1:
            several.append(left.std(ddof=1) / right.std(ddof=1))
    assert spread_interval == pytest.approx((min(several), max(several)), rel=1e-3)


def test_a_comparison_does_not_depend_on_the_order():
    scores = np.random.default_rng(4).normal(size=(2, 3, 8))
    tasks = [tuple(dict(enumerate(side[place])) for side in scores) for place in range(3)]
    turned = [tuple(dict(reversed(side.items())) for side in task) for task in reversed(tasks)]
    assert compare_all(tasks) == compare_all(turned)
    assert compare(*tasks[0]) == compare(*turned[-1])
