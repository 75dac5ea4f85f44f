"""Changed rows: what is drawn, that all prompts meet the same, and scores against plain forwards."""

from dataclasses import replace

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.padded import PaddedBackbone
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.perturb import Noise, PerturbSettings
from ptp_ds.perturb.mask import mask
from ptp_ds.perturb.neighbours import WORD, Neighbours, Vocabulary
from ptp_ds.seeding import make_generator
from ptp_ds.studies.landscape import Subject
from ptp_ds.studies.robustness import Bench, attacked, scored, typo, typo_fields, with_masks, with_noise, with_typos
from ptp_ds.tasks import load_task
from tests.support.packed import make_prompt
from tests.support.reference import VOCABULARY, make_examples, make_model, plain_scores
from tests.support.words import letters


@pytest.fixture
def bench():
    settings = PerturbSettings(
        unit=2.0, sigma=0.0, epsilon=0.0, alpha=0.0, steps=0, norm="frobenius", divergence="kl", mask_id=7
    )
    return Bench(Backbone(make_model("llama")), load_task("Reviews"), make_examples("ragged"), settings, 60, seed=3)


def plain(examples, prompt, deltas=None):
    model = make_model("llama")
    deltas = deltas or [None] * len(examples)
    return [plain_scores(model, prompt, e, delta) for e, delta in zip(examples, deltas, strict=True)]


def require_close(found, expected):
    for row, scores in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(scores)], scores, atol=2e-5, rtol=2e-5)
        assert (row[len(scores) :] == float("-inf")).all()


def test_clean_scores_and_masked_ones_equal_plain_forwards(bench):
    subject = Subject("p", make_prompt(), TreeRows())
    require_close(scored(bench, subject, bench.examples), plain(bench.examples, subject.trained))
    found = with_masks(bench, subject, 0.5, 1)
    twins = mask(bench.examples, replace(bench.settings, mask_share=0.5), Noise(3, 1))
    assert any(list(t.context_ids) != list(e.context_ids) for t, e in zip(twins, bench.examples, strict=True))
    hidden = [replace(e, context_ids=t.context_ids) for t, e in zip(twins, bench.examples, strict=True)]
    require_close(found, plain(hidden, subject.trained))
    require_close(with_masks(bench, subject, 0.0, 1), plain(bench.examples, subject.trained))


def test_a_family_that_is_padded_has_its_prompt_under_noise(bench):
    """The noise path with a noise of almost 0 is the clean one, and prompts differ there."""
    padded = replace(bench, backbone=PaddedBackbone(Backbone(make_model("falcon"))))
    found = []
    for prompt in (make_prompt(), -2 * make_prompt()):
        subject = Subject("p", prompt, TreeRows())
        clean = scored(padded, subject, padded.examples)
        require_close(clean, [plain_scores(make_model("falcon"), prompt, e) for e in padded.examples])
        found.append(with_noise(padded, subject, 1e-6, 0))
        torch.testing.assert_close(found[-1], clean, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*found, atol=1e-2)


def test_noise_is_of_its_size_and_the_same_for_every_prompt(bench):
    """Passes of any size draw the same noise for a row; two draws differ."""
    subject = Subject("p", make_prompt(), TreeRows())
    whole = Bench(bench.backbone, bench.task, bench.examples, bench.settings, 4096, seed=3)
    one, two = with_noise(bench, subject, 1.0, 0), with_noise(whole, subject, 1.0, 0)
    torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(one, with_noise(bench, subject, 1.0, 1))
    require_close(with_noise(bench, subject, 0.0, 0), plain(bench.examples, subject.trained))
    deltas = []
    for example in bench.examples:
        moves = torch.tensor(example.movable)
        drawn = torch.randn(int(moves.sum()), 32, generator=make_generator(3, "noise", 0, example.index))
        deltas.append(torch.zeros(len(moves), 32).masked_scatter(moves[:, None], drawn * 2.0 * 0.5 / 32**0.5))
    require_close(with_noise(bench, subject, 0.5, 0), plain(bench.examples, subject.trained, deltas))


@pytest.mark.parametrize("length", [2, 5])
def test_a_prompt_that_stands_in_every_row_moves_no_noise(bench, length):
    """A row's noise is the same behind a prefix and behind a prompt of any length in the row, as encoders have."""
    prompt = torch.randn(length, 32, generator=make_generator(0, "prompt", length))
    behind, beside = (
        Subject("p", prompt, TreeRows()),
        Subject("p", prompt, SeparateRows(kind="causal", prompt_length=length)),
    )
    for sigma in (0.0, 1.0):
        found = with_noise(bench, beside, sigma, 0)
        torch.testing.assert_close(found, with_noise(bench, behind, sigma, 0), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(found, with_noise(bench, behind, 0.0, 0), atol=1e-2)


def test_rows_without_a_known_answer_are_scored_and_not_attacked(bench):
    """As WSC's false rows: an attack leaves them, and counts the others alone."""
    unknown = replace(bench, examples=[replace(e, golds=() if number % 2 else None, label=number % 2)
                                       for number, e in enumerate(bench.examples)])  # fmt: skip
    words = Vocabulary([WORD] * VOCABULARY, [" " + letters(number) for number in range(VOCABULARY)])
    subject, neighbours = Subject("p", make_prompt(), TreeRows()), Neighbours(words, 4, 0.0)
    found, others = attacked(unknown, subject, 0.5, neighbours), replace(bench, examples=bench.examples[::2])
    alone = attacked(others, subject, 0.5, neighbours)
    assert found.texts[::2] == alone.texts
    assert found.texts[1::2] == [e.context_ids for e in bench.examples[1::2]]
    counts = ("right", "fooled", "changed", "words")
    assert [getattr(found, name) for name in counts] == [getattr(alone, name) for name in counts]
    nothing = attacked(replace(unknown, examples=unknown.examples[1::2]), subject, 0.5, neighbours)
    assert (nothing.right, nothing.success_rate, nothing.changed) == (0, 0.0, 0)
    require_close(nothing.scores, plain(bench.examples[1::2], subject.trained))


def test_typos():
    generator = make_generator(0, "t")
    words = [typo("wonderful,", generator) for _ in range(50)]
    for word in words:
        assert word[0] == "w"
        assert word.endswith("l,")
        assert len(word) == 9 or sorted(word) == sorted("wonderful,")
    assert len({len(word) for word in words}) == 2, "both kinds"
    assert typo("fun", generator) == "fun"
    assert typo("a1b2", generator) == "a1b2"
    rows = [{"text": "a truly wonderful little film", "label": "wonderful"}] * 2
    some = with_typos(rows, ["text"], 1.0, 0)
    assert some[0]["label"] == "wonderful"
    assert some[0]["text"] != some[1]["text"], "drawn by the row's place"
    assert some == with_typos(rows, ["text"], 1.0, 0)
    assert with_typos(rows, ["text"], 0.0, 0) == rows
    assert [len(row["text"].split(" ")) for row in some] == [5, 5]


def test_answers_and_fixed_fields_keep_their_spelling():
    assert typo_fields(load_task("COPA")) == ["premise"]
    assert typo_fields(load_task("Reviews")) == ["review"]


def test_an_attack_counts_what_predictions_say(bench):
    """right and fooled by the scores of clean and attacked texts; a share of 0 changes nothing."""
    words = Vocabulary([WORD] * VOCABULARY, [" " + letters(number) for number in range(VOCABULARY)])
    subject, neighbours = Subject("p", make_prompt(), TreeRows()), Neighbours(words, 4, 0.0)
    found = attacked(bench, subject, 0.5, neighbours)
    clean = torch.tensor([int(scores.argmax()) for scores in plain(bench.examples, subject.trained)])
    gold = torch.tensor([example.gold for example in bench.examples])
    assert found.right == int((clean == gold).sum())
    assert found.fooled == int(((clean == gold) & (found.scores.argmax(-1) != gold)).sum())
    changed = [sum(a != b for a, b in zip(text, e.context_ids, strict=True))
               for text, e in zip(found.texts, bench.examples, strict=True)]  # fmt: skip
    assert found.changed == sum(changed) > 0
    assert attacked(bench, subject, 0.0, neighbours).changed == 0
