"""The attack on texts: what it may change, near words, its losses and gradients against plain ones, whole runs."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.flags import parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack_text_twins
from ptp_ds.perturb import PERTURBATIONS, Noise
from ptp_ds.perturb.a2t import (
    Swaps,
    choose_swaps,
    first_order_gains,
    keep_worst,
    losses,
    most_swaps,
    shares_of,
    swappable,
    texts_of,
)
from ptp_ds.perturb.neighbours import WORD, Neighbours, Vocabulary
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.perturb.text_scoring import TextScorer
from ptp_ds.tasks.example import Example
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.deep_prompts import cached_scores, deep_prompt
from tests.support.packed import make_prompt, plain_twin_gradient, twin_deltas
from tests.support.reference import FAMILIES, VOCABULARY, make_examples, make_model, plain_scores, relative_error
from tests.support.words import letters

A2T = PERTURBATIONS["a2t"].attack
SETTINGS = settings_of(RunConfig(perturbation="a2t"), 1.0)


def all_words(size: int = VOCABULARY) -> Vocabulary:
    """Every token is a word of one kind."""
    return Vocabulary([WORD] * size, [" " + letters(number) for number in range(size)])


def scorer_of(family="llama", examples=None, *, shared=0, min_cosine=0.0, vocabulary=None):
    """A scorer with make_prompt() over a tiny random model."""
    backbone = Backbone(make_model(family))
    near = Neighbours(vocabulary or all_words(), 4, min_cosine)
    return TextScorer(backbone, make_prompt(), examples or make_examples("ragged"), shared, near)


def texts_tried(scorer, examples):
    plans = choose_swaps(scorer, scorer.gradients(), 0.1)
    return [
        [replace(example, context_ids=text) for text in texts_of(example, swaps, 3)]
        for example, swaps in zip(examples, plans, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_the_words_equal_an_eager_reference(family):
    examples = make_examples("ragged")
    scorer, model = scorer_of(family, examples), make_model(family)
    found = scorer.gradients()
    for number, (example, places) in enumerate(zip(examples, found.places, strict=True)):
        delta = torch.zeros(len(example.context_ids), 32, requires_grad=True)
        scores = plain_scores(model, make_prompt(), example, delta)
        loss = F.cross_entropy(scores[None], torch.tensor([example.gold]))
        (expected,) = torch.autograd.grad(loss, delta)
        ours = found.packed[places]
        assert relative_error(ours, expected) < 1e-4
        assert ours.norm(dim=-1).argsort().tolist() == expected.norm(dim=-1).argsort().tolist()
        torch.testing.assert_close(found.clean[number, : len(scores)], scores.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_all_texts_equal_plain_ones(family):
    examples = make_examples("ragged")
    scorer, model = scorer_of(family, examples), make_model(family)
    groups = texts_tried(scorer, examples)
    assert max(map(len, groups)) == 3
    scores, place = scorer.scores(groups), 0
    for text in (text for group in groups for text in group):
        expected = plain_scores(model, make_prompt(), text)
        torch.testing.assert_close(scores[place, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        place += 1
    assert place == len(scores)


def test_a_deep_prompt_scores_as_the_familys_own_cache():
    examples, backbone = make_examples("ragged"), Backbone(make_model("llama"), prompt="deep")
    prompt, model = deep_prompt(backbone.model), make_model("llama")
    scorer = TextScorer(backbone, prompt, examples, 0, Neighbours(all_words(), 4, 0.0))
    for text, ours in zip(examples, scorer.gradients().clean, strict=True):
        expected = cached_scores(model, prompt, text)
        torch.testing.assert_close(ours[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert any(twin.context_ids != e.context_ids for twin, e in zip(A2T(scorer, SETTINGS).twins, examples, strict=True))


@pytest.mark.parametrize("shared", [0, 2])
def test_what_all_rows_begin_with_is_in_the_prefix(shared):
    examples = [
        replace(example, context_ids=[7, 8, *example.context_ids], movable=[False, False, *example.movable])
        for example in make_examples("multi")
    ]
    scorer, expected = scorer_of(examples=examples, shared=shared), scorer_of(examples=examples)
    assert [twin.context_ids for twin in A2T(scorer, SETTINGS).twins] == [
        twin.context_ids for twin in A2T(expected, SETTINGS).twins
    ]
    place = len(examples[0].context_ids) - 1
    ours, theirs = (found.packed[found.places[0][place]] for found in (scorer.gradients(), expected.gradients()))
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("perturbation", ["a2t", "a2t+gaussian"])
def test_step_gradient_given_the_twins_equals_plain(family, perturbation):
    examples, scorer, how = make_examples("ragged"), scorer_of(family), PERTURBATIONS[perturbation]
    backbone, prompt = scorer.backbone, make_prompt().requires_grad_()
    run = RunConfig(
        perturbation=perturbation, divergence="sym_kl", divergence_gradient="both", reg_weight=0.7, sigma=0.5
    )
    settings, noise = settings_of(run, backbone.mean_embedding_norm()), Noise(3, 4)
    twins = how.attack(scorer, settings).twins
    contexts, movable = [twin.context_ids for twin in twins], [twin.movable for twin in twins]
    assert sum(list(e.context_ids) != list(c) for e, c in zip(examples, contexts, strict=True)) >= 3
    row = pack_text_twins(examples, contexts, movable if how.find else None)
    loss = ptp_loss(prompt, backbone, row, run, settings, noise, PassOptions(2))
    loss.total.backward()
    delta = how.find(None, row, backbone.embed(row.token_ids), settings, noise) if how.find else None
    total, expected = plain_twin_gradient(family, prompt, examples, contexts, twin_deltas(row, twins, delta))
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, expected) < 1e-4


def long_examples(count=6, words=60):
    """Rows of many words, every fifth of them not to be attacked."""
    generator = torch.Generator().manual_seed(5)
    draws = torch.randint(0, VOCABULARY, (count, words), generator=generator).tolist()
    free = [place % 5 != 0 for place in range(words)]
    return [
        Example(context_ids=ids, movable=[True] * words, attackable=free, candidate_ids=[[1], [2, 3]], gold=number % 2,
                index=number) for number, ids in enumerate(draws)
    ]  # fmt: skip


def test_few_words_change_where_they_may_and_the_loss_never_falls():
    examples, model = long_examples(), make_model("llama")
    backbone, scorer = Backbone(make_model("llama")), scorer_of(examples=long_examples(), min_cosine=0.2)
    before = plain_losses(model, examples)
    found = A2T(scorer, settings_of(RunConfig(a2t_share=0.1), 1.0))
    after = plain_losses(model, [replace(e, context_ids=t.context_ids) for e, t in zip(examples, found.twins)])  # noqa: B905
    changed = 0
    for example, twin in zip(examples, found.twins, strict=True):
        places = [p for p, (a, b) in enumerate(zip(example.context_ids, twin.context_ids, strict=True)) if a != b]
        assert len(places) <= 4 == most_swaps(48, 0.1)
        assert all(example.attackable[place] for place in places)
        old, new = (torch.tensor([ids[p] for p in places]) for ids in (example.context_ids, twin.context_ids))
        if places:
            assert float(F.cosine_similarity(backbone.embed(old), backbone.embed(new)).min()) >= 0.2
        changed += len(places)
    assert changed > 0
    assert found.shares["a2t/changed_share"] == (changed, 48 * 6)
    assert bool((after >= before - 1e-5).all())
    raised = int((after > before + 1e-5).sum())
    assert found.shares["a2t/raised_share"] == (raised, 6)
    assert raised >= 3


def plain_losses(model, examples):
    scores = [plain_scores(model, make_prompt(), example) for example in examples]
    return torch.stack([losses(row[None], [example.gold])[0] for row, example in zip(scores, examples, strict=True)])


def test_the_steepest_words_are_swapped_by_first_order_gain():
    examples = long_examples()
    scorer = scorer_of(examples=examples)
    found = scorer.gradients()
    norms, weight = found.packed.norm(dim=-1), scorer.backbone.model.get_input_embeddings().weight
    for example, places, swaps in zip(examples, found.places, choose_swaps(scorer, found, 0.25), strict=True):
        open_places = swappable(example, all_words())
        expected = sorted(open_places, key=lambda place, places=places: -float(norms[places[place]]))[:12]
        assert list(swaps.places) == expected
        for place, tokens in zip(swaps.places, swaps.tokens, strict=True):
            old = example.context_ids[place]
            gains = [float((weight[token] - weight[old]) @ found.packed[places[place]]) for token in tokens]
            assert gains == sorted(gains, reverse=True)
            assert sorted(tokens) == sorted(scorer.near([old])[old])
    assert first_order_gains(scorer, found.packed, []) == []


def test_the_attack_is_the_same_again_and_in_other_company():
    examples = long_examples()
    twins = A2T(scorer_of(examples=examples), SETTINGS).twins
    assert A2T(scorer_of(examples=examples), SETTINGS).twins == twins
    assert A2T(scorer_of(examples=examples[::-1]), SETTINGS).twins == twins[::-1]
    assert A2T(scorer_of(examples=examples[2:3]), SETTINGS).twins == twins[2:3]


def test_ranks_run_the_same_passes_whatever_their_rows_are(monkeypatch):
    """Rows without a word that may change still take part in every gather."""
    still = [replace(example, attackable=[False] * 60) for example in long_examples()]
    counts = []
    for examples in (long_examples(), still, still[:1]):
        passes, real = [0], Backbone.run

        def count(self, *args, passes=passes, real=real):
            passes[0] += 1
            return real(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(Backbone, "run", count)
            found = A2T(scorer_of(examples=examples), SETTINGS)
        counts.append(passes[0])
        assert (found.shares["a2t/changed_share"][0] > 0) == (examples[0].attackable[1])
    assert counts == [3, 3, 3]
    assert [twin.context_ids for twin in found.twins] == [still[0].context_ids]


def test_a_share_of_zero_changes_nothing_and_is_plain_prompt_tuning():
    examples = long_examples(2)
    found = A2T(scorer_of(examples=examples), settings_of(RunConfig(a2t_share=0.0), 1.0))
    assert [twin.context_ids for twin in found.twins] == [example.context_ids for example in examples]
    assert not RunConfig(perturbation="a2t", a2t_share=0.0).perturbs
    assert RunConfig(perturbation="a2t+gaussian", a2t_share=0.0).perturbs


def test_budget():
    assert [most_swaps(words, 0.1) for words in (0, 3, 49, 50, 120)] == [4, 4, 4, 5, 12]
    assert most_swaps(120, 0.0) == 0


def test_texts_differ_and_one_is_always_there():
    example = Example(context_ids=[1, 2, 3, 4], movable=[True] * 4, candidate_ids=[[1], [2]], gold=0, index=0)
    swaps = Swaps([3, 0], [[7, 8, 9], [6]])
    assert texts_of(example, swaps, 3) == [[6, 2, 3, 7], [6, 2, 3, 8], [6, 2, 3, 9]]
    assert texts_of(example, Swaps([0], [[6]]), 3) == [[6, 2, 3, 4]]
    assert texts_of(example, Swaps([], []), 3) == [[1, 2, 3, 4]]


def test_the_most_damaging_text_is_kept_and_told():
    clean = Example(context_ids=[1, 2], movable=[True] * 2, candidate_ids=[[1], [2]], gold=1, index=0)
    worse, better = replace(clean, context_ids=[1, 5]), replace(clean, context_ids=[4, 2])
    scores = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 2.0]])
    kept, outcome = keep_worst([clean, worse, better], scores)
    assert kept is worse
    assert (outcome.words, outcome.changed, outcome.right, outcome.fooled, outcome.raised) == (2, 1, True, True, True)
    kept, other = keep_worst([clean, better], scores[[0, 2]])
    assert kept is clean
    assert (other.changed, other.right, other.fooled, other.raised) == (0, True, False, False)
    rounding = keep_worst([clean, clean], scores[[0, 1]])
    assert (rounding[0], rounding[1].raised, rounding[1].fooled) == (clean, False, False)
    assert shares_of([outcome, other]) == {
        "a2t/changed_share": (1, 4), "a2t/raised_share": (1, 2), "a2t/success_rate": (1, 2)
    }  # fmt: skip


def test_a_prediction_is_right_where_any_of_the_right_answers_is_chosen():
    """ReCoRD has several; their probabilities are one. From the second right answer to the first, nobody is fooled."""
    clean = Example(
        context_ids=[1, 2], movable=[True] * 2, candidate_ids=[[1], [2], [3]], gold=0, index=0, golds=(0, 2)
    )
    other, wrong = replace(clean, context_ids=[1, 5]), replace(clean, context_ids=[4, 2])
    scores = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.5, 0.0], [0.0, 1.0, 0.5]])
    kept, outcome = keep_worst([clean, other, wrong], scores)
    assert (kept, outcome.right, outcome.fooled) == (wrong, True, True)
    kept, outcome = keep_worst([clean, other], scores[:2])
    assert (kept, outcome.right, outcome.fooled) == (other, True, False)
    together = torch.softmax(scores, -1)[:, [0, 2]].sum(-1)
    torch.testing.assert_close(losses(scores, (0, 2)).exp(), 1 / together)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--a2t_share", "1.5"], "--a2t_share is 1.5; expected a share between 0 and 1."),
        (["--a2t_neighbours", "0"], "--a2t_neighbours is 0; expected a whole number of 1 or more."),
        (["--a2t_min_cosine", "1"], "--a2t_min_cosine is 1.0; expected a cosine from 0 up to below 1."),
    ],
)
def test_flag_errors(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_run(["--perturbation", "a2t", *argv])


RUN = ["--task", "RTE", "--prompt_length", "5", "--batch_size", "4", "--eval_tokens", "2000", "--log_every", "1",
       "--perturbation", "a2t", "--a2t_min_cosine", "0", "--eval_every", "0", "--lr", "0.1"]  # fmt: skip


def state(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:06}" / "state.safetensors")


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_shares_are_told(run_train, tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = [*RUN, "--model", tiny_model, "--max_steps", "6", "--save_every", "2", "--keep_checkpoints", "5"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    done = run_train([*args, "--output_dir", whole])
    assert done.returncode == 0, done.stderr[-2000:]
    done = run_train([*args, "--output_dir", again, "--resume", whole / "checkpoints" / "step-000002"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(state(again, 6)["prompt"], state(whole, 6)["prompt"])
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert all(0 < line["a2t/changed_share"] < 1 and 0 <= line["a2t/success_rate"] <= 1 for line in steps)
    assert sum(line["a2t/raised_share"] for line in steps) > 0
    assert sum(line["divergence"] for line in steps) > 0
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert {"a2t/changed_share", "a2t/raised_share", "a2t/success_rate"} <= set(board.Tags()["scalars"])
    other = run_train([*args, "--output_dir", tmp_path / "no", "--a2t_neighbours", "3", "--resume",
                       whole / "checkpoints" / "step-000002"])  # fmt: skip
    assert other.returncode == 2
    assert "its a2t_neighbours is 8, this run's is 3" in other.stderr


@pytest.mark.slow
def test_two_ranks_under_zero3_attack_alike(run_train, tiny_model, tmp_path):
    """Two micro-batches on each of two ranks, or all rows on one: the same words swapped, one prompt."""
    folders = {}
    for nproc in (1, 2):
        out = folders[nproc] = tmp_path / str(nproc)
        args = [*RUN, "--model", tiny_model, "--max_steps", "3", "--gradient_accumulation_steps", nproc]
        done = run_train([*args, "--output_dir", out], nproc=nproc)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (state(folders[nproc], 3)["prompt"] for nproc in (1, 2))
    assert float((two - one).norm() / one.norm()) < 1e-4
    told = [
        [line["a2t/changed_share"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
         if line["kind"] == "train"] for folder in folders.values()
    ]  # fmt: skip
    assert told[0] == told[1]
    assert min(told[0]) > 0
