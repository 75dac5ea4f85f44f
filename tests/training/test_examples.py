"""Batches of --tokens_per_step: the same however many share them, and what is refused; what trains."""

import itertools
import json
from dataclasses import replace

import pytest

from ptp_ds.commands import one_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.layouts import TreeRows
from ptp_ds.perturb.neighbours import WORD, vocabulary_of
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import Split, tokenise
from ptp_ds.tasks.example import Example
from ptp_ds.training import examples
from ptp_ds.training.examples import batch_order, nothing_to_change, require_rows_for, run_examples
from tests.support.task_rows import ROWS

LENGTHS = [120, 300, 180, 240, 100, 260, 140, 280, 160, 220]  # packed tokens of a row, one stream


def rows_of(lengths=LENGTHS):
    return [
        Example(
            context_ids=[number + 1] * length, movable=[True] * length, candidate_ids=[[1], [2]], gold=0, index=number
        )
        for number, length in enumerate(lengths)
    ]


def budget(tokens, **changes):
    return RunConfig(tokens_per_step=tokens, **{"perturbation": "none", "max_steps": 30, **changes})


def test_a_batch_is_what_fits_the_budget():
    """Counted by hand, in the seeded order: the next row would be too many."""
    order = batch_order(budget(600), TreeRows(), rows_of())
    batches = [order.batch(step) for step in range(30)]
    for batch, following in itertools.pairwise(batches):
        tokens = sum(LENGTHS[number] for number in batch)
        assert tokens <= 600 < tokens + LENGTHS[following[0]]


def test_both_streams_count():
    """--perturbation none has one."""
    plain = batch_order(budget(600), TreeRows(), rows_of())
    noisy = batch_order(budget(1200, perturbation="gaussian"), TreeRows(), rows_of())
    assert [noisy.batch(step) for step in range(9)] == [plain.batch(step) for step in range(9)]


@pytest.mark.parametrize(("tokens", "hands"), [(600, 1), (600, 2), (1160, 4), (100, 1)])
def test_batches_with_a_row_for_each(tokens, hands):
    """Longest rows: 300 and 280, each of them twice where two epochs meet, so 1160 tokens always hold four; alone, any
    budget does."""
    require_rows_for(budget(tokens), TreeRows(), rows_of(), hands)


def test_a_batch_that_holds_fewer_rows_than_there_are_hands():
    run, order = budget(600), batch_order(budget(600), TreeRows(), rows_of())
    sizes = [len(order.batch(step)) for step in range(30)]
    fewest, first = min(sizes), sizes.index(min(sizes)) + 1
    message = (
        rf"^--tokens_per_step 600 holds {fewest} of the 10 training rows in batch {first}, and each of the 4 "
        r"micro-batches \(ranks times --gradient_accumulation_steps\) needs a row; give --tokens_per_step 1160, "
        r"which is always enough, or fewer ranks or a smaller --gradient_accumulation_steps\.$"
    )
    with pytest.raises(ValueError, match=message):
        require_rows_for(run, TreeRows(), rows_of(), 4)
    require_rows_for(run, TreeRows(), rows_of(), fewest)


def test_a_budget_that_is_always_enough_is_so_where_two_epochs_meet():
    """There a batch may hold the longest row twice: 80 tokens hold two rows of one epoch, but not of batch 45."""
    rows = rows_of([50, 30, 20, 10])
    sizes = [len(batch_order(budget(80), TreeRows(), rows).batch(step)) for step in range(200)]
    assert sizes.index(1) + 1 == 45
    with pytest.raises(ValueError, match="holds 1 of the 4 training rows in batch 45, and"):
        require_rows_for(budget(80, max_steps=200), TreeRows(), rows, 2)
    with pytest.raises(ValueError, match="give --tokens_per_step 100, which is always enough, or"):
        require_rows_for(budget(70, max_steps=200), TreeRows(), rows, 2)
    require_rows_for(budget(100, max_steps=200), TreeRows(), rows, 2)


def test_steps_that_the_run_does_not_take_do_not_count():
    run = budget(600, seed=1)
    sizes = [len(batch_order(run, TreeRows(), rows_of()).batch(step)) for step in range(30)]
    narrow = sizes.index(min(sizes))
    assert narrow > 0, "else nothing is tested"
    require_rows_for(replace(run, max_steps=narrow), TreeRows(), rows_of(), min(sizes) + 1)
    require_rows_for(
        replace(run, max_steps=2 * narrow, perturbation="free", reg_weight=1.0, tokens_per_step=1200),
        TreeRows(),
        rows_of(),
        min(sizes) + 1,
    )  # each batch is used twice
    with pytest.raises(ValueError, match=f"in batch {narrow + 1}, "):
        require_rows_for(replace(run, max_steps=narrow + 1), TreeRows(), rows_of(), min(sizes) + 1)


def test_fewer_rows_than_hands():
    with pytest.raises(
        ValueError, match=r"holds 10 of the 10 training rows.* needs a row; give fewer ranks or a smaller --grad"
    ):
        require_rows_for(budget(10**6), TreeRows(), rows_of(), 11)


def test_a_perturbation_that_finds_nothing_to_change_is_told(tokenizer, monkeypatch):
    """A word that may be swapped, or a token that may move, in any row is enough; it looks no further."""
    fixed = [replace(row, movable=[False] * len(row.movable)) for row in rows_of()]
    word = replace(rows_of()[0], context_ids=[vocabulary_of(tokenizer).members[WORD][0]], movable=[True])
    tokens, swaps = ("changes nothing: no training row has a token", "swaps nothing: no training row has a word")
    for name, target, rows, said in (
        ("pgd", "input", fixed, tokens), ("gaussian", "input", fixed, tokens), ("mask", "input", fixed, tokens),
        ("a2t", "input", fixed, swaps), ("a2t", "input", rows_of(), swaps), ("a2t", "input", [*fixed, word], None),
        ("pgd", "input", [*fixed, *rows_of()], None), ("pgd", "prompt", fixed, None), ("none", "input", fixed, None),
    ):  # fmt: skip
        found = nothing_to_change(RunConfig(perturbation=name, target=target), rows, tokenizer)
        assert [sentence.startswith(f"--perturbation {name} {said}") for sentence in found] == [True] * bool(said)
    assert nothing_to_change(RunConfig(perturbation="pgd", reg_weight=0.0), fixed, tokenizer) == []
    monkeypatch.setattr(examples, "swappable", lambda row, vocabulary: next(looked) == 2)
    looked = iter(range(3))
    assert nothing_to_change(RunConfig(perturbation="a2t"), rows_of(), tokenizer) == []


def test_a_run_says_so(tiny_model, tmp_path, write_rows, monkeypatch):
    spec = {"name": "T", "text": "{x}", "fixed": ["x"], "label": "y", "verbalizers": {"0": " no", "1": " yes"},
            "metrics": ["accuracy"]}  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(spec))
    for split in ("train", "val"):
        write_rows(tmp_path / "T" / f"{split}.jsonl", [{"x": f"text {n}", "y": n % 2} for n in range(4)])
    said: list[str] = []
    monkeypatch.setattr(one_run.log, "warning", lambda line, *values: said.append(line % values))
    run = RunConfig(model=str(tiny_model), task=str(tmp_path / "t.json"), data_dir=str(tmp_path), perturbation="pgd")
    one_run.prepare(run)
    assert said == [
        "warning: --perturbation pgd changes nothing: no training row has a token that may be; leave a field out of "
        "'fixed' and 'values'"
    ]


def test_training_sets_one_right_answer_against_the_wrong_ones(tokenizer):
    """ReCoRD's rows have several; those that select and are reported keep them all."""
    task = load_task("ReCoRD")
    splits = {name: Split([ROWS["ReCoRD"]], ["here"], "") for name in ("train", "select", "eval")}
    found = run_examples(RunConfig(select_split="select"), task, splits, tokenizer, 400, "causal")
    whole = tokenise(task, splits["train"], tokenizer, 400).examples
    assert found.select == found.evaluation == whole
    one, several = whole
    assert (several.names, several.gold, several.golds) == (["Ann", "Bob", "Rome"], 0, [0, 1])
    assert found.train[0] == one, "a row with one right answer stays as it is"
    candidates = [several.candidate_ids[0], several.candidate_ids[2]]
    assert found.train[1] == replace(several, candidate_ids=candidates, names=["Ann", "Rome"], golds=(0,))
    late = replace(several, gold=1, golds=(1, 0))
    kept = examples._with_one_right(late)
    assert kept.candidate_ids[kept.gold] == several.candidate_ids[1]
    assert [kept.names[place] for place in kept.golds] == ["Bob"]
