"""PTP-ADV in text space: words swapped for near ones where the loss is steepest (A2T, Yoo and Qi 2021).

As there: words are ranked by the gradient of the loss at their embeddings, few of them are swapped for near
neighbours, and function words stay. Ours: neighbours by the backbone's own input embeddings, not counter-fitted ones;
instead of a search word by word, a few texts a row with all of its swaps made, all rows' texts scored in one pass, and
the most damaging kept. An optimizer step costs one more pass with gradient, over the clean rows, and one without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from ptp_ds.objective import log_probabilities
from ptp_ds.perturb.neighbours import BARE, WORD, Vocabulary, is_letter
from ptp_ds.perturb.perturbation import Attacked, Twin
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.perturb.text_scoring import Gradients, TextScorer
from ptp_ds.tasks.example import Example

LEAST_WORDS = 4  # of a short text, where the share would allow fewer
TEXTS = 3  # tried for each row
_STEM = 4  # words that begin with the same letters, so many of them, count as one: "place" and "places"


@dataclass(frozen=True)
class Swaps:
    """One row's swaps: places of its context, the steepest first, and for each what may stand there, best first."""

    places: Sequence[int]
    tokens: Sequence[Sequence[int]]


def a2t(scorer: TextScorer, settings: PerturbSettings) -> Attacked:
    """Each row's most damaging text of those tried; the clean one where none raises the loss.

    Words are chosen on the host, so it reads from the device: norms, cosines of words not met before, gains, scores.
    All ranks run the same passes, whatever their rows are.
    """
    examples, found = scorer.examples, scorer.gradients()
    plans = choose_swaps(scorer, found, settings.a2t_share)
    groups = [
        [replace(example, context_ids=text) for text in texts_of(example, swaps, TEXTS)]
        for example, swaps in zip(examples, plans, strict=True)
    ]
    scores = scorer.scores(groups).cpu().split([len(group) for group in groups])
    twins, outcomes = [], []
    for clean, tried, clean_C, scores_NC in zip(examples, groups, found.clean.cpu(), scores, strict=True):
        kept, outcome = keep_worst([clean, *tried], torch.cat([clean_C[None], scores_NC]))
        twins.append(Twin(kept.context_ids, clean.movable))
        outcomes.append(outcome)
    return Attacked(twins, shares_of(outcomes))


def choose_swaps(scorer: TextScorer, found: Gradients, share: float) -> list[Swaps]:
    """For each row the words to swap, by the gradient's l2 norm, and their neighbours, by the first-order rise."""
    examples, vocabulary = scorer.examples, scorer.neighbours.vocabulary
    norms = found.packed.norm(dim=-1).tolist()
    open_places = [swappable(example, vocabulary) for example in examples]
    near = scorer.near(
        example.context_ids[place] for example, places in zip(examples, open_places, strict=True) for place in places
    )
    chosen = []
    for example, packed, places in zip(examples, found.places, open_places, strict=True):
        ranked = sorted((-norms[packed[place]], place) for place in places)
        free = [place for _, place in ranked if near[example.context_ids[place]]]
        chosen.append(free[: most_swaps(len(attacked_words(example)), share)])
    return _by_gain(scorer, found, chosen, near)


def _by_gain(
    scorer: TextScorer, found: Gradients, chosen: Sequence[Sequence[int]], near: Mapping[int, Sequence[int]]
) -> list[Swaps]:
    """Each chosen place's neighbours, those first whose embedding raises the loss most, to first order."""
    triples = []  # (packed token, old, new)
    for example, packed, places in zip(scorer.examples, found.places, chosen, strict=True):
        for place in places:
            old = example.context_ids[place]
            triples += [(packed[place], old, new) for new in near[old]]
    gains = iter(first_order_gains(scorer, found.packed, triples))
    plans = []
    for example, places in zip(scorer.examples, chosen, strict=True):
        tokens = []
        for place in places:
            rated = [(-next(gains), number, token) for number, token in enumerate(near[example.context_ids[place]])]
            tokens.append([token for _, _, token in sorted(rated)])
        plans.append(Swaps(places, tokens))
    return plans


def first_order_gains(scorer: TextScorer, gradient_TH: Tensor, triples: Sequence[tuple[int, int, int]]) -> list[float]:
    """gradient . (new - old) for each (packed token, old token, new token): the loss' rise to first order, in nats."""
    if not triples:
        return []
    packed, old, new = zip(*triples, strict=True)
    places = torch.tensor(packed, device=gradient_TH.device)
    return ((scorer.embed(new) - scorer.embed(old)) * gradient_TH[places]).sum(-1).tolist()


def attacked_words(example: Example) -> dict[int, list[int]]:
    """The places of each word that the attack may change, by word; words that reach out of the text are left out."""
    words = example.words or range(len(example.context_ids))
    free = example.attackable or example.movable
    places: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        places.setdefault(word, []).append(place)
    return {word: mine for word, mine in places.items() if all(free[p] and example.movable[p] for p in mine)}


def swappable(example: Example, vocabulary: Vocabulary) -> list[int]:
    """Places of the words that are one token, punctuation aside, and that nothing outside of the attacked text holds.

    What stands in the question, a fixed field or an answer, or in the template, stays as it is in the attacked text,
    too: with the hypothesis' words swapped in the premise its label could be another one.
    """
    words = attacked_words(example)
    inside = {place for places in words.values() for place in places}
    outside = [-1 if place in inside else token for place, token in enumerate(example.context_ids)]
    known = _stems(" ".join([_spelled(vocabulary, outside), *map(vocabulary.text, example.candidate_ids)]))
    found = []
    for places in words.values():
        kinds = [vocabulary.kind(example.context_ids[place]) for place in places]
        letters = [place for place, kind in zip(places, kinds, strict=True) if kind != BARE]
        if len(letters) == 1 and kinds[places.index(letters[0])] >= WORD:
            text = vocabulary.text([example.context_ids[letters[0]]])
            if not _stems(text) & known:
                found.append(letters[0])
    return found


def _spelled(vocabulary: Vocabulary, token_ids: Sequence[int]) -> str:
    """The tokens' text, a space for each run of tokens of -1."""
    return " ".join(vocabulary.text(run) for gap, run in groupby(token_ids, lambda token: token < 0) if not gap)


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in "".join(c if is_letter(c) else " " for c in text).split()}


def most_swaps(words: int, share: float) -> int:
    """Words that may change in a text of `words`: max(4, share of them), none for a share of 0."""
    return max(LEAST_WORDS, int(share * words)) if share > 0 else 0


def texts_of(example: Example, swaps: Swaps, count: int) -> list[list[int]]:
    """At most `count` different texts with every swap made, the n-th with each place's n-th best word; at least one.

    Without any swap that one is the clean text: a pass over the texts of a rank's rows is never empty.
    """
    texts: list[list[int]] = []
    for number in range(count):
        text = list(example.context_ids)
        for place, tokens in zip(swaps.places, swaps.tokens, strict=True):
            text[place] = tokens[min(number, len(tokens) - 1)]
        if text not in texts:
            texts.append(text)
    return texts


@dataclass(frozen=True)
class Outcome:
    """One row's attack. words: those it might change. right, fooled: whether the clean text's prediction was right, and
    whether that was so and the kept text's is wrong. raised: whether the loss rose."""

    words: int
    changed: int
    right: bool
    fooled: bool
    raised: bool


def keep_worst(texts: Sequence[Example], scores_NC: Tensor) -> tuple[Example, Outcome]:
    """The text of the highest cross-entropy at the right answers; the first, clean one where no other's is higher."""
    clean = texts[0]
    golds = clean.golds or (clean.gold,)
    best = int(losses(scores_NC, golds).argmax())
    changed = sum(new != old for new, old in zip(texts[best].context_ids, clean.context_ids, strict=True))
    best = best if changed else 0  # the clean text again, higher by rounding
    predicted = scores_NC.argmax(-1)
    right = int(predicted[0]) in golds
    fooled = right and int(predicted[best]) not in golds
    return texts[best], Outcome(len(attacked_words(clean)), changed, right, fooled, best > 0)


def losses(scores_NC: Tensor, golds: Sequence[int]) -> Tensor:
    """[N] cross-entropy of each text at the right answers together, in nats."""
    return -log_probabilities(scores_NC)[:, list(golds)].logsumexp(-1)


def shares_of(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, float]]:
    """What the log tells: changed_share, of the attacked texts' words; raised_share, rows whose loss rose, of all;
    success_rate, rows whose right prediction the kept text turns wrong, of those predicted right."""
    return {
        "a2t/changed_share": (sum(o.changed for o in outcomes), sum(o.words for o in outcomes)),
        "a2t/raised_share": (sum(o.raised for o in outcomes), len(outcomes)),
        "a2t/success_rate": (sum(o.fooled for o in outcomes), sum(o.right for o in outcomes)),
    }
