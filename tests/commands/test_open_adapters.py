"""Adapters that are looked at together: one backbone, and rows that fit behind every prompt."""

from argparse import Namespace

import pytest
import torch

from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.landscape import open_adapters
from ptp_ds.commands.robustness import _Changes
from ptp_ds.errors import UserError
from ptp_ds.models.source import load_config
from ptp_ds.studies.robustness import Bench
from ptp_ds.tasks import load_task
from ptp_ds.training.evaluate import evaluation_of
from tests.support.task_rows import ROWS
from tests.support.tiny import CONTEXT


@pytest.fixture
def given(tiny_model, tmp_path, write_rows):
    """given(short, long): adapters of two lengths and a split whose rows the context cuts, as the scripts are asked."""
    rows = [{"review": f"{word} " * 400, "label": label} for word, label in (("good", "positive"), ("bad", "negative"))]
    write_rows(tmp_path / "data" / "Reviews" / "val.jsonl", rows)

    def made(*lengths):
        for length in lengths:
            prompt = torch.randn(length, 32, generator=torch.Generator().manual_seed(length))
            card = {"task": load_task("Reviews").spec(), "head": {"kind": "causal"}}
            write_adapter(tmp_path / f"p{length}", prompt, str(tiny_model), load_config(tiny_model), card)
        return Namespace(
            adapters=[tmp_path / f"p{length}" for length in lengths], model=str(tiny_model), split="val", rows=5,
            data_dir=str(tmp_path / "data"), dataset=None, precision="fp32", seed=0,
        )  # fmt: skip

    return made


@pytest.mark.parametrize("lengths", [(3, 40), (40, 3)])
def test_rows_fit_behind_the_longest_prompt(given, lengths):
    args = given(*lengths)
    served, opened = open_adapters(args)
    assert [subject.trained.shape[0] for subject in opened.subjects] == list(lengths)
    bench = Bench(opened.backbone, served.task, opened.examples, None, 2000)
    scores, misspelt, _ = _Changes(args, served, bench, opened.split).typos(opened.subjects[0], 0.5, 0)
    assert scores.isfinite().all()
    for examples in (opened.examples, misspelt):
        assert max(example.path_length for example in examples) + 40 == CONTEXT, "cut, and no more than need be"
    opened.backbone.release()


def test_rows_whose_right_answer_is_no_option(tiny_model, tmp_path, write_rows):
    """WSC's false rows: robustness scores them as ptp evaluate does, a landscape has no cross-entropy of them."""
    row, task = ROWS["WSC"], load_task("WSC")
    write_rows(tmp_path / "data" / "WSC" / "val.jsonl", [row, {**row, "label": True}, row])
    write_rows(tmp_path / "data" / "WSC" / "false.jsonl", [row, row])
    card = {"task": task.spec(), "head": {"kind": "causal"}}
    write_adapter(tmp_path / "p", torch.zeros(3, 32), str(tiny_model), load_config(tiny_model), card)
    args = Namespace(adapters=[tmp_path / "p"], model=str(tiny_model), split="val", rows=9,
                     data_dir=str(tmp_path / "data"), dataset=None, precision="fp32", seed=0)  # fmt: skip
    counts = []
    for trainable in (True, False):
        _, opened = open_adapters(args, trainable)
        counts.append(len(opened.examples))
        opened.backbone.release()
    assert counts == [1, 3]
    args.split = "false"
    with pytest.raises(UserError, match=r"^--split false: none of 2 rows has its right answer among its options"):
        open_adapters(args)
    _, opened = open_adapters(args, trainable=False)
    bench = Bench(opened.backbone, task, opened.examples, None, 2000)
    (scores, examples, _) = _Changes(args, None, bench, opened.split).masks(opened.subjects[0], 0.0, 0)
    assert evaluation_of(scores, examples, task).examples == 2
    opened.backbone.release()
