"""Which tokens an answer is: those behind its context, and an end behind them where only that tells two apart."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief

Answers = list[list[int]]
IN_ORDER = ("causal", "seq2seq")  # heads that score an answer's tokens one after the other


def answer_ids(context: list[int], full: list[int], where: str) -> list[int]:
    """The tokens of `full` behind its context's; UserError where the two share one."""
    if full[: len(context)] != context or len(full) == len(context):
        raise UserError(
            f"{where}: the tokenizer joins the end of the context with the answer's start; "
            "end the template's text without a space and begin each answer with one."
        )
    return full[len(context) :]


def told_apart(candidates: Answers, texts: Sequence[str], tokenizer: Any, where: str) -> tuple[Answers, bool]:
    """(a row's answers, whether each has the end-of-text token behind it: where one's tokens begin another's).

    A sum of log-probabilities without an end is never higher for the longer of such two: what follows the shorter one
    costs something. Raises ValueError where the tokenizer has no such token.
    """
    order = sorted(range(len(candidates)), key=candidates.__getitem__)  # what begins with an answer comes right behind
    found = next(((a, b) for a, b in pairwise(order) if _begins(candidates[b], candidates[a])), None)
    if found is None:
        return candidates, False
    if (end := tokenizer.eos_token_id) is None:
        short, long = (brief(texts[place]) for place in found)
        raise UserError(
            f"{where}: the tokens of the answer {long} begin with those of {short}, and the tokenizer has no "
            "end-of-text token to tell the two apart; reword one of them, so that neither begins with the other."
        )
    return [[*candidate, end] for candidate in candidates], True


def require_distinct(candidates: Answers, texts: Sequence[str], where: str) -> None:
    """UserError where two answers are the same tokens, so that no prediction could tell them apart."""
    first: dict[tuple[int, ...], int] = {}
    for place, candidate in enumerate(candidates):
        before = first.setdefault(tuple(candidate), place)
        if before != place:
            raise UserError(
                f"{where}: the answers {brief(texts[before])} and {brief(texts[place])} are the same tokens to the "
                "model's tokenizer, which may know neither or fold their case; reword one of them."
            )


def undecided(candidates: Answers, golds: Sequence[int]) -> bool:
    """Whether a wrong answer is the same tokens as a right one; not where no answer is known to be right."""
    right = {tuple(candidates[gold]) for gold in golds}
    return any(tuple(one) in right for place, one in enumerate(candidates) if place not in golds)


def _begins(longer: list[int], shorter: list[int]) -> bool:
    return len(longer) > len(shorter) and longer[: len(shorter)] == shorter
