"""Metrics against scikit-learn, and by hand where it has none."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from ptp_ds.tasks import Outcome, compute_metrics, majority_accuracy


@pytest.mark.parametrize("seed", range(25))
def test_metrics_are_scikit_learns(seed):
    generator = np.random.default_rng(seed)
    labels, rows = int(generator.integers(2, 5)), int(generator.integers(1, 40))
    gold, predicted = (generator.integers(0, labels, rows).tolist() for _ in range(2))
    found = compute_metrics(("accuracy", "macro_f1", "matthews"), Outcome(predicted, gold))
    assert list(found) == ["accuracy", "macro_f1", "matthews"]
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro"), abs=1e-12)
    assert found["matthews"] == pytest.approx(matthews_corrcoef(gold, predicted), abs=1e-12)


def test_metrics_refuse_lists_of_two_lengths():
    with pytest.raises(ValueError, match="zip"):
        compute_metrics(("accuracy",), Outcome([1, 0], [1]))


@pytest.mark.parametrize(("gold", "share"), [([0, 0, 1], 2 / 3), ([1], 1.0), ([0, 1, 2, 2], 0.5)])
def test_majority(gold, share):
    assert majority_accuracy(gold) == pytest.approx(share)


@pytest.mark.parametrize("seed", range(25))
def test_two_label_metrics_are_scikit_learns(seed):
    generator = np.random.default_rng(seed)
    gold, predicted = (generator.integers(0, 2, int(generator.integers(1, 12)) * 4).tolist() for _ in range(2))
    size = min(len(gold), len(predicted))
    gold, predicted = gold[:size], predicted[:size]
    found = compute_metrics(("f1a", "matthews"), Outcome(predicted, gold))
    assert found["f1a"] == pytest.approx(f1_score(gold, predicted, zero_division=0.0), abs=1e-12)
    assert found["matthews"] == pytest.approx(matthews_corrcoef(gold, predicted), abs=1e-12)


def test_group_metrics_by_hand():
    """Three questions: all right, one of two wrong, all wrong; of two pairs one is predicted alike."""
    outcome = Outcome([1, 0, 1, 1, 0], [1, 0, 1, 0, 1], [0, 0, 1, 1, 2])
    assert compute_metrics(("exact_match",), outcome) == {"exact_match": pytest.approx(1 / 3)}
    assert compute_metrics(("gender_parity",), Outcome([1, 1, 0, 1], [1, 1, 1, 1], [4, 4, 9, 9])) == {
        "gender_parity": 0.5
    }


def test_text_metrics_by_hand():
    """SQuAD's normal form; the best of several right answers."""
    said = [("The United States!", ["U.S.", "united states"]), ("Bob Smith", ["Ann", "Bob"]), ("Rome", ["Paris"])]
    found = compute_metrics(("f1", "em"), Outcome([0] * 3, [0] * 3, answers=said))
    assert found == {"f1": pytest.approx((1 + 2 / 3 + 0) / 3), "em": pytest.approx(1 / 3)}
