"""How a split is shared out over passes and ranks, and which prompt is kept."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.packing.groups import group_length, pack_groups, share_contexts
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.prompts.deep import deep_width
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.tasks import load_task
from ptp_ds.tasks.example import Example
from ptp_ds.training import evaluate as evaluation
from ptp_ds.training.evaluate import (
    Evaluation,
    Questions,
    ensemble_scores,
    evaluation_of,
    least_score,
    majority_metrics,
    outcome_of,
    plan_packs,
    score_examples,
    score_prompts,
)
from tests.support.encoders import make_encoder, make_head
from tests.support.packed import make_prompt
from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.reference import make_examples, make_model, plain_scores, with_instruction

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=60),
    budget=st.integers(1, 300),
    ranks=st.integers(1, 9),
)
def test_packs_cover_every_example_within_the_budget(lengths, budget, ranks):
    packs = plan_packs(lengths, budget, ranks)
    assert len(packs) % ranks == 0
    assert all(packs)
    count = Counter(number for numbers in packs for number in numbers)
    assert sorted(count) == list(range(len(lengths)))
    for numbers in packs:
        assert len(set(numbers)) == len(numbers)
        assert len(numbers) == 1 or sum(lengths[number] for number in numbers) <= budget
    repeated = sum(count.values()) - len(lengths)
    assert repeated < ranks
    if repeated:
        assert all(len(numbers) == 1 for numbers in packs), "only single rows are repeated to fill up the ranks"


def test_one_rank_packs_longest_first():
    assert plan_packs([3, 9, 5, 4], 10, 1) == [[1], [2, 3], [0]]


def test_a_row_over_the_budget_is_a_pass_of_its_own():
    assert plan_packs([50, 2, 2], 10, 1) == [[0], [1, 2]]


def test_a_pack_is_split_before_a_row_is_repeated():
    packs = plan_packs([1] * 6, 100, 4)
    assert sorted(number for numbers in packs for number in numbers) == list(range(6))
    assert len(packs) == 4


def test_fewer_rows_than_ranks_are_repeated():
    assert plan_packs([7, 8], 100, 5) == [[1], [0], [1], [1], [1]]


def scored(score: float, rows: int) -> Evaluation:
    return Evaluation({"accuracy": score}, score, 1.0, 0.5, rows)


@pytest.mark.parametrize(
    ("score", "highest", "rows", "kept"),
    [
        (0.80, 0.80, 24, True),
        (0.72, 0.80, 24, True),  # an error of about 0.08
        (0.71, 0.80, 24, False),
        (0.79, 0.80, 2400, False),
        (23 / 24, 1.0, 24, False),  # a row more than an error that isn't 0
        (99 / 100, 1.0, 100, False),
        (1 / 2, 1.0, 2, False),
        (0.0, 0.0, 5, True),
        (-0.1, 0.0, 400, False),  # a correlation may be below 0
    ],
)
def test_a_later_prompt_is_kept_within_one_standard_error(score, highest, rows, kept):
    assert scored(score, rows).within_an_error_of(highest) is kept


def test_the_error_is_that_of_a_share_with_one_row_of_each_kind_more():
    draws = torch.rand(200_000, 48, generator=torch.Generator().manual_seed(0)) < 0.75
    assert 0.75 - least_score(0.75, 48) == pytest.approx(float(draws.float().mean(1).std()), rel=0.02)
    assert least_score(1.0, 48) == pytest.approx(1 - (49 / 50 * 1 / 50 / 48) ** 0.5)


def test_evaluations_survive_json():
    assert Evaluation(**scored(0.5, 10).as_dict()) == scored(0.5, 10)


def test_rows_behind_one_instruction_score_as_they_do_alone():
    """The instruction goes into the cached prefix; every pass holds a few rows."""
    backbone, examples, prompt = Backbone(make_model("llama")), with_instruction(make_examples("ragged")), make_prompt()
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    found = score_examples(backbone, prompt, examples, ranks, budget=20)
    model = make_model("llama")
    for row, example in zip(found, examples, strict=True):
        expected = plain_scores(model, prompt, example)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)


def with_passages(examples):
    """Two passages of 20 and 16 tokens: the first before three examples, the second before the rest."""
    starts = [list(range(20, 40)) if number < 3 else list(range(40, 56)) for number in range(len(examples))]
    return [
        replace(e, context_ids=[*start, *e.context_ids], movable=[True] * len(start) + list(e.movable))
        for e, start in zip(examples, starts, strict=True)
    ]


@pytest.mark.parametrize("budget", [20, 60, 4096])
def test_rows_that_share_a_passage_score_as_they_do_alone(budget):
    """A group's common start stands in the row once; answers of one to three tokens, ragged."""
    backbone, examples, prompt = Backbone(make_model("llama")), with_passages(make_examples("ragged")), make_prompt()
    found = score_examples(backbone, prompt, examples, Ranks(0, 1, 0, torch.device("cpu")), budget)
    model = make_model("llama")
    for row, example in zip(found, examples, strict=True):
        expected = plain_scores(model, prompt, example)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_what_a_group_shares():
    examples = with_passages(make_examples("single"))
    groups = share_contexts(examples, 4096)
    assert groups == [[0, 1, 2], [3, 4]]
    row = pack_groups([[examples[number] for number in group] for group in groups])
    alone = sum(example.packed_length for example in examples)
    assert row.num_tokens == sum(group_length([examples[n] for n in group]) for group in groups) < alone
    assert share_contexts(examples, 1) == [[0], [1], [2], [3], [4]]


def test_outcomes_of_tasks_that_name_their_own_options():
    """WSC: the label says whether the first option is right; ReCoRD: several options may be."""
    example = make_examples("single")[0]
    span = [replace(example, label=label, golds=[0] if label else [], names=("it", "she")) for label in (1, 0, 0)]
    outcome = outcome_of([0, 1, 0], span)
    assert (list(outcome.predicted), list(outcome.gold)) == ([1, 0, 1], [1, 0, 0])
    entity = replace(example, golds=[0, 1], names=("Ann", "Bob"))
    assert outcome_of([1], [entity]).answers == [("Bob", ["Ann", "Bob"])]


def test_an_ensemble_is_the_mean_of_probabilities():
    first = torch.tensor([[0.0, 1.0, float("-inf")], [2.0, 0.5, -1.0]])
    second = torch.tensor([[3.0, 1.0, float("-inf")], [0.0, 0.5, 1.0]])
    found = ensemble_scores([first, second])
    torch.testing.assert_close(found.exp(), (first.softmax(-1) + second.softmax(-1)) / 2)
    assert ensemble_scores([first]) is first


@pytest.mark.slow
def test_an_ensemble_from_the_command_line(tiny_model, tmp_path):
    """Two different prompts: the written scores are those of their mean probabilities, and one prompt twice is one."""
    import subprocess
    import sys

    from ptp_ds.adapters.write import write_adapter
    from ptp_ds.models.source import load_config
    from ptp_ds.tasks import load_task

    config, card = load_config(tiny_model), {"task": load_task("RTE").spec()}
    for seed in (0, 1):
        prompt = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
        write_adapter(tmp_path / str(seed), prompt, str(tiny_model), config, card)

    def scores(*adapters):
        command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--model", str(tiny_model), "--json",
                   str(tmp_path / "out.json"), "--adapter", *(str(tmp_path / name) for name in adapters)]  # fmt: skip
        done = subprocess.run(
            command, env=child_environment(), capture_output=True, text=True, timeout=170, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.tensor(json.loads((tmp_path / "out.json").read_text())["scores"])

    one, other, both = scores("0"), scores("1"), scores("0", "1")
    torch.testing.assert_close(both.exp(), (one.softmax(-1) + other.softmax(-1)) / 2, atol=1e-5, rtol=1e-4)
    assert float((one - other).abs().max()) > 1e-2


def questions(kind):
    """A backbone and three prompts' examples: ragged answers, an instruction before some, passages that are shared."""
    examples = [with_instruction(make_examples("ragged")), with_passages(make_examples("multi", seed=1)),
                make_examples("single", seed=2)[:3]]  # fmt: skip
    if kind in ("soft", "deep"):
        backbone = Backbone(make_model("gemma2" if kind == "soft" else "llama"), prompt=kind, rows=TreeRows(kind))
        layouts = [TreeRows(kind)] * 3
    else:
        layouts = [SeparateRows(kind=kind, prompt_length=length, mask_id=4, tail=(2,)) for length in (5, 3, 8)]
        model = make_model("llama") if kind == "causal" else make_encoder("bert", kind)
        backbone = Backbone(model, head=make_head(model, kind) if kind != "causal" else None, rows=layouts[0])
    if kind == "classes":  # answers that are classes: the same number in every row
        examples = [make_examples("single", seed=number) for number in range(3)]
    generator = torch.Generator().manual_seed(5)
    width = deep_width(backbone.model.config) if kind == "deep" else 32
    asked = []
    for length, own, rows in zip((5, 3, 8), examples, layouts, strict=True):
        prompt = 0.3 * torch.randn(length, width, generator=generator)
        shapes = backbone.head.trained.items()
        head = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes}
        asked.append(Questions(backbone.head.join(prompt, head), own, rows))
    return backbone, asked


@pytest.mark.parametrize("budget", [30, 4096])
@pytest.mark.parametrize("kind", ["soft", "deep", "causal", "masked", "classes"])
def test_several_prompts_score_in_shared_passes_as_each_does_alone(kind, budget):
    """Prompts of three lengths, three kinds of rows; heads of their own take passes of their own."""
    backbone, asked = questions(kind)
    beats = []
    found = score_prompts(backbone, asked, ALONE, budget, lambda: beats.append(1))
    alone = []
    for one, scores in zip(asked, found, strict=True):
        backbone.serve(backbone.prompt, one.rows)
        expected = score_examples(backbone, one.trained, one.examples, ALONE, budget, lambda: alone.append(1))
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=2e-5)
    assert len(beats) == (3 if kind == "classes" else 1) if budget == 4096 else len(beats) > 3
    assert len(alone) == 3 or budget == 30


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_out_the_passes_of_several_prompts(world):
    """Every rank runs as many passes; together they score as one does."""
    backbone, asked = questions("soft")
    expected = score_prompts(backbone, asked, ALONE, 4096)
    sums, passes = {}, []

    class Played(Ranks):
        def sum(self, tensor):
            sums[self.rank] = tensor
            return torch.stack(list(sums.values())).sum(0)

    for rank in range(world):
        beats = []
        found = score_prompts(backbone, asked, Played(rank, world, rank, ALONE.device), 60, lambda b=beats: b.append(1))
        passes.append(len(beats))
    assert len(set(passes)) == 1
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=2e-5)


@given(
    units=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=40),
    budget=st.integers(1, 200),
)
def test_a_pass_holds_its_prompts_too(units, budget):
    owners, lengths = zip(*units, strict=True)
    prefixes = [7, 0, 20, 3]
    packs = plan_packs(lengths, budget, 1, owners, prefixes)
    assert sorted(number for pack in packs for number in pack) == list(range(len(units)))
    flat = [owners[number] for pack in packs for number in pack]
    assert flat == sorted(flat), "a prompt's rows lie together"
    for pack in packs:
        used = sum(lengths[number] for number in pack) + sum(prefixes[owner] for owner in {owners[n] for n in pack})
        assert used <= budget or len(pack) == 1


@pytest.mark.parametrize("together", [False, True])
def test_scores_are_read_when_all_passes_are_launched(together, monkeypatch):
    """A GPU would wait for the next row's packing each time that the host waits for it."""
    events, score, add = [], Backbone.score, evaluation._Table.add
    monkeypatch.setattr(Backbone, "score", lambda self, *a, **k: events.append("pass") or score(self, *a, **k))
    monkeypatch.setattr(evaluation._Table, "add", lambda self, *a: events.append("read") or add(self, *a))
    backbone, examples = Backbone(make_model("llama")), make_examples("ragged")
    asked = [Questions(make_prompt(), examples, backbone.rows)] * (1 + together)
    score_prompts(backbone, asked, ALONE, 20)
    passes = events.count("pass")
    assert passes > 2
    assert events == ["pass"] * passes + ["read"] * (len(events) - passes)
    assert len(events) >= 2 * passes


def labelled(*golds: int) -> list[Example]:
    """Rows of one token and two answers, in groups of two."""
    return [
        Example(context_ids=[1], movable=[True], candidate_ids=[[2], [3]], gold=gold, index=row, group=row // 2)
        for row, gold in enumerate(golds)
    ]


def test_the_most_frequent_answer_has_each_metric():
    """By hand, with MultiRC's metrics: of 5 rows 3 are 0, so all are answered 0; a group is right where all are 0."""
    task = replace(load_task("CB"), metrics=("accuracy", "macro_f1", "f1a", "exact_match", "matthews"))
    assert majority_metrics(labelled(0, 0, 1, 0, 1), task) == pytest.approx(
        {"accuracy": 0.6, "macro_f1": 2 * 3 / (5 + 3) / 2, "f1a": 0.0, "exact_match": 1 / 3, "matthews": 0.0}
    )
    balanced = {"accuracy": 0.5, "macro_f1": 1 / 3}
    for golds in ((0, 1), (1, 0)):
        assert majority_metrics(labelled(*golds), replace(task, metrics=tuple(balanced))) == pytest.approx(balanced)
        # both are as frequent: answering 1 has the higher F1 of label 1
        assert majority_metrics(labelled(*golds), replace(task, metrics=("f1a",))) == pytest.approx({"f1a": 2 / 3})


def test_f1a_is_that_of_label_1_wherever_the_template_has_it():
    """By hand: of label 1 two rows of three are right, and one row is called so that isn't."""
    labels, gold, said = {"0": " no", "1": " yes"}, "10110", "11100"
    for order in (labels, dict(reversed(labels.items()))):
        task = replace(load_task("MultiRC"), answers=order, metrics=("f1a",))
        rows = labelled(*(task.labels.index(label) for label in gold))
        scores_NC = torch.tensor([[float(label == one) for one in task.labels] for label in said])
        assert evaluation_of(scores_NC, rows, task).metrics == pytest.approx({"f1a": 2 * 2 / (3 + 3)})
        assert majority_metrics(rows, task) == pytest.approx({"f1a": 2 * 3 / (3 + 5)})


def test_the_most_frequent_place_among_options_of_a_rows_own():
    """The second is right in two rows of three; the last row has one option alone. Where labels say whether the first
    candidate is right, they count.
    """
    row = labelled(1)[0]
    rows = [
        replace(row, names=("a b", "c d"), golds=(1,)),
        replace(row, names=("e", "f"), golds=(0, 1)),
        replace(row, names=("g",), golds=(0,), gold=0, candidate_ids=[[2]]),
    ]
    task = replace(load_task("CB"), metrics=("f1", "em"))
    assert majority_metrics(rows, task) == {"f1": 1.0, "em": 1.0}
    rows[0] = replace(rows[0], names=("x b", "x d"), golds=(0,))
    assert majority_metrics(rows, task) == pytest.approx({"f1": (0.5 + 1 + 1) / 3, "em": 2 / 3})
    signed = [replace(row, label=label, gold=0) for label in (1, 0, 0)]
    assert majority_metrics(signed, replace(task, metrics=("accuracy", "f1a"))) == {"accuracy": 2 / 3, "f1a": 0.0}
