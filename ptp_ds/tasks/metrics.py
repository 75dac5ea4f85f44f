"""SuperGLUE's official metrics, as fractions of 1 (not percent)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What was predicted for each row, and what is right: label numbers.

    groups: rows with the same number belong together (a question's answers, a pair), -1 for none. answers: where rows
    name their own options, each row's (predicted text, right texts). positive: the label number that f1a counts.
    """

    predicted: Sequence[int]
    gold: Sequence[int]
    groups: Sequence[int] = ()
    answers: Sequence[tuple[str, Sequence[str]]] = ()
    positive: int = 1

    def grouped(self) -> list[list[int]]:
        """Row numbers of each group."""
        members: dict[int, list[int]] = {}
        for row, group in enumerate(self.groups):
            members.setdefault(group, []).append(row)
        return list(members.values())


def accuracy(outcome: Outcome) -> float:
    """Share of rows whose prediction is the gold label."""
    return sum(p == g for p, g in zip(outcome.predicted, outcome.gold, strict=True)) / len(outcome.gold)


def _label_f1(outcome: Outcome, label: int) -> float:
    true_positive = sum(p == g == label for p, g in zip(outcome.predicted, outcome.gold, strict=True))
    named = sum(p == label for p in outcome.predicted) + sum(g == label for g in outcome.gold)
    return 2 * true_positive / named if named else 0.0


def macro_f1(outcome: Outcome) -> float:
    """Mean over the labels that occur (in either) of each label's F1, as scikit-learn's f1_score(average="macro")."""
    labels = sorted(set(outcome.predicted) | set(outcome.gold))
    return sum(_label_f1(outcome, label) for label in labels) / len(labels)


def f1a(outcome: Outcome) -> float:
    """F1 of the positive label over all rows: MultiRC's F1 over answers."""
    return _label_f1(outcome, outcome.positive)


def exact_match(outcome: Outcome) -> float:
    """Share of groups whose rows are all right: MultiRC's exact match by question."""
    groups = outcome.grouped()
    return sum(all(outcome.predicted[row] == outcome.gold[row] for row in group) for group in groups) / len(groups)


def gender_parity(outcome: Outcome) -> float:
    """Share of groups whose rows are all predicted alike (AX-g's pairs)."""
    groups = outcome.grouped()
    return sum(len({outcome.predicted[row] for row in group}) == 1 for group in groups) / len(groups)


def matthews(outcome: Outcome) -> float:
    """Matthews correlation over all labels that occur, 0 where either side has only one of them.

    (c n - sum_k p_k t_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2)) with c right ones of n rows, p_k of them
    predicted as label k and t_k that are k (Gorodkin 2004); the usual one of two labels, as scikit-learn's.
    """
    count, right = len(outcome.gold), sum(p == g for p, g in zip(outcome.predicted, outcome.gold, strict=True))
    predicted, gold = Counter(outcome.predicted), Counter(outcome.gold)
    product = (count**2 - sum(p**2 for p in predicted.values())) * (count**2 - sum(t**2 for t in gold.values()))
    shared = right * count - sum(predicted[label] * gold[label] for label in gold)
    return shared / product**0.5 if product else 0.0


def _plain(text: str) -> str:
    """SQuAD's normal form, which ReCoRD uses: lower case, no punctuation, no articles, single spaces."""
    lowered = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def _text_f1(predicted: str, right: str) -> float:
    a, b = _plain(predicted).split(), _plain(right).split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def text_f1(outcome: Outcome) -> float:
    """Mean over rows of the best token F1 against any right answer (ReCoRD)."""
    best = [max((_text_f1(said, answer) for answer in right), default=0.0) for said, right in outcome.answers]
    return sum(best) / len(best)


def text_match(outcome: Outcome) -> float:
    """Share of rows whose predicted text is one of the right answers, in normal form (ReCoRD's EM)."""
    hits = [any(_plain(said) == _plain(answer) for answer in right) for said, right in outcome.answers]
    return sum(hits) / len(hits)


METRICS: dict[str, Callable[[Outcome], float]] = {
    "accuracy": accuracy, "macro_f1": macro_f1, "f1a": f1a, "exact_match": exact_match, "matthews": matthews,
    "gender_parity": gender_parity, "f1": text_f1, "em": text_match,
}  # fmt: skip


# Metrics over groups or over answers' texts, and the readers whose rows have them.
NEEDS_READER = {
    "exact_match": ("multirc", "pairs"), "gender_parity": ("pairs",), "f1": ("record", "wsc"), "em": ("record", "wsc"),
}  # fmt: skip


def compute_metrics(names: Sequence[str], outcome: Outcome) -> dict[str, float]:
    """Each named metric."""
    return {name: METRICS[name](outcome) for name in names}


def majority_accuracy(gold: Sequence[int]) -> float:
    """Accuracy of always answering the most frequent label of `gold`."""
    return max(Counter(gold).values()) / len(gold)
