"""Scores over seeds: their spread, and how a method compares with another on the same seeds.

Tests and intervals are SciPy's; Holm's correction (Scandinavian Journal of Statistics 6, 1979) is a few lines here,
since SciPy has none. SciPy is imported where it is called, so that commands can say that it isn't installed.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 9999  # of an interval
_FLIPS = 99_999  # more sign flips than these are drawn, fewer are all looked at
_DIGITS = 1e9  # to which scores count: of equal differences none is a rounding larger than another
_SHARE = 0.95  # that an interval covers
_FEWEST = 5  # pairs of a task that have an interval: resampled, fewer hardly differ, and theirs covers far less

_Intervals = tuple[tuple[float, float] | None, tuple[float, float] | None]  # of the gain, of the spreads' ratio


@dataclass(frozen=True)
class Spread:
    """Scores of several seeds: mean, standard deviation with n - 1 (None of one score), least, largest, how many."""

    mean: float
    std: float | None
    least: float
    largest: float
    count: int

    @property
    def gap(self) -> float:
        """How far the worst seed lies below the mean."""
        return self.mean - self.least


@dataclass(frozen=True)
class Comparison:
    """A method against another on the same seeds.

    gain: mean difference of scores; gain_interval: its 95 % bootstrap interval over pairs, None of fewer than five in a
    task. spread_ratio: the method's standard deviation over the other's, with an interval over the same resampled
    pairs; None where the other has none.
    p: of the hypothesis that differences are as likely below as above 0, by exact sign flips, two-sided.
    worst_gain: difference of the worst seeds. pairs: seeds that both have.
    """

    gain: float
    gain_interval: tuple[float, float] | None
    spread_ratio: float | None
    spread_interval: tuple[float, float] | None
    p: float | None
    worst_gain: float
    pairs: int


def spread_of(scores: Sequence[float]) -> Spread:
    """The scores' Spread; ValueError for none."""
    if not len(scores):
        raise ValueError("no scores")
    std = float(_std(np.asarray(scores, dtype=float))) if len(scores) > 1 else None
    return Spread(float(np.mean(scores)), std, min(scores), max(scores), len(scores))


def compare(ours: Mapping[Any, float], theirs: Mapping[Any, float], seed: int = 0) -> Comparison | None:
    """Scores by seed of a method and of what it is held against; None without a common one."""
    sides = _pairs(ours, theirs)
    if sides is None:
        return None
    left, right = sides
    differences = left - right
    several = len(differences) > 1
    intervals = _intervals(left, right, seed) if len(differences) >= _FEWEST else (None, None)
    base = float(_std(right)) if several else 0.0
    return Comparison(
        gain=float(differences.mean()), gain_interval=intervals[0],
        spread_ratio=float(_std(left)) / base if base > 0 else None,
        spread_interval=intervals[1] if base > 0 else None, p=sign_flip_p(differences, seed) if several else None,
        worst_gain=float(left.min() - right.min()), pairs=len(differences),
    )  # fmt: skip


def compare_all(by_task: Sequence[tuple[Mapping[Any, float], Mapping[Any, float]]]) -> Comparison | None:
    """`compare` over several tasks at once; None where no task has a common seed.

    gain, p: over all pairs of task and seed. spread_ratio: of standard deviations within tasks, their variances pooled,
    since tasks differ from each other by more than seeds do. worst_gain: mean over the tasks. Intervals: pairs are
    resampled within their task, and none are told where a task has fewer than five.
    """
    sides = [pairs for ours, theirs in by_task if (pairs := _pairs(ours, theirs)) is not None]
    if not sides:
        return None
    sides.sort(key=lambda side: (side[0].tolist(), side[1].tolist()))  # whatever order the tasks came in
    differences = np.concatenate([left - right for left, right in sides])
    several = any(len(left) > 1 for left, _ in sides)
    base = _within([right for _, right in sides])
    ratio = float(_within([left for left, _ in sides]) / base) if base > 0 else None
    enough = min(len(left) for left, _ in sides) >= _FEWEST
    gain_interval, spread_interval = _intervals_over(sides) if enough else (None, None)
    return Comparison(
        gain=float(differences.mean()), gain_interval=gain_interval, spread_ratio=ratio,
        spread_interval=spread_interval if ratio is not None else None,
        p=sign_flip_p(differences) if several else None,
        worst_gain=float(np.mean([left.min() - right.min() for left, right in sides])), pairs=len(differences),
    )  # fmt: skip


def _intervals_over(sides: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Intervals:
    """`_intervals` over several tasks: pairs are resampled within their task."""
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(left), size=(_RESAMPLES, len(left))) for left, _ in sides]
    resampled = [(left[rows], right[rows]) for (left, right), rows in zip(sides, drawn, strict=True)]
    gains = np.concatenate([left - right for left, right in resampled], axis=-1).mean(-1)
    below = _within([right for _, right in resampled])
    ratios = _within([left for left, _ in resampled])[below > 0] / below[below > 0]
    return _bounds(gains), _bounds(ratios)


def _pairs(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> tuple[np.ndarray, np.ndarray] | None:
    """Both sides' scores of the keys that both have, in an order that doesn't depend on the keys'; None of none."""
    pairs = sorted((ours[key], theirs[key]) for key in ours if key in theirs)
    if not pairs:
        return None
    left, right = np.array(pairs, dtype=float).T
    return left, right


def _std(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """With n - 1; exactly 0 of equal scores, whose mean may be a rounding away from them."""
    return (scores - np.take(scores, [0], axis)).std(axis=axis, ddof=1)


def _within(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Standard deviation within tasks over the last axis: the root of their pooled variance; 0 of single scores."""
    squares = sum(one.shape[-1] * (one - one[..., :1]).var(-1) for one in scores)  # see _std
    return np.sqrt(squares / max(1, sum(one.shape[-1] - 1 for one in scores)))


def _bounds(resampled: np.ndarray) -> tuple[float, float] | None:
    """The percentiles that hold 95 % of what was resampled; None of nothing."""
    if not len(resampled):
        return None
    low, high = np.percentile(resampled, [50 * (1 - _SHARE), 50 * (1 + _SHARE)])
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided p of the mean difference under random signs: exact up to 16 pairs, else 99,999 draws of signs.

    In whole numbers of 1e-9, so that sums which are equal count as equal.
    """
    from scipy import stats

    values = np.sort(np.rint(np.asarray(differences, dtype=float) * _DIGITS))
    found = stats.permutation_test(
        (values,), lambda x, axis=-1: x.sum(axis=axis), permutation_type="samples", vectorized=True, batch=10_000,
        n_resamples=_FLIPS, alternative="two-sided", rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Each p with Holm's correction for how many were tested; None stays None."""
    tested = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for rank, (p, name) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[name] = highest
    return corrected


def _intervals(left: np.ndarray, right: np.ndarray, seed: int) -> _Intervals:
    """95 % percentile intervals of the mean difference and of the ratio of standard deviations, pairs resampled."""
    from scipy import stats

    def ratio(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
        spread = _std(theirs, axis)
        return np.divide(_std(ours, axis), spread, out=np.full_like(spread, np.nan), where=spread > 0)

    def gain(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
        return (ours - theirs).mean(axis=axis)

    found = []
    for statistic in (gain, ratio):
        # Resamples that drew one pair over and over have no spread, and no ratio: they are left out.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            resampled = stats.bootstrap(
                (left, right), statistic, paired=True, vectorized=True, n_resamples=_RESAMPLES, method="percentile",
                confidence_level=_SHARE, rng=np.random.default_rng(seed),
            ).bootstrap_distribution  # fmt: skip
        found.append(_bounds(resampled[np.isfinite(resampled)]))
    return found[0], found[1]
