"""SuperGLUE's official metrics, as fractions of 1 (not percent)."""

from collections import Counter
from collections.abc import Callable, Sequence


def accuracy(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Share of rows whose prediction is the gold label."""
    return sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)


def macro_f1(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Mean over the labels that occur (in either) of each label's F1, as scikit-learn's f1_score(average="macro")."""
    scores = []
    for label in sorted(set(predicted) | set(gold)):
        true_positive = sum(p == g == label for p, g in zip(predicted, gold, strict=True))
        scores.append(2 * true_positive / (sum(p == label for p in predicted) + sum(g == label for g in gold)))
    return sum(scores) / len(scores)


METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {"accuracy": accuracy, "macro_f1": macro_f1}


def compute_metrics(names: Sequence[str], predicted: Sequence[int], gold: Sequence[int]) -> dict[str, float]:
    """Each named metric; predicted and gold are label numbers, one a row."""
    return {name: METRICS[name](predicted, gold) for name in names}


def majority_accuracy(gold: Sequence[int]) -> float:
    """Accuracy of always answering the most frequent label of `gold`."""
    return max(Counter(gold).values()) / len(gold)
