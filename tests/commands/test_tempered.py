"""tempered.py: the temperature of the lowest cross-entropy, and a study's prompts before and behind one."""

import json
import math
import re

import pytest
import tempered
import torch
from scipy.special import logsumexp

from ptp_ds.errors import UserError
from tests.support.paths import ROOT
from tests.support.runs import check
from tests.support.zygote import run_script


def test_the_temperature_by_hand():
    """Two answers, three rows of four right, each by a margin of 4: at T the odds, exp(4 / T), are those, 3."""
    scores = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0], [4.0, 0.0]])
    gold = torch.tensor([0, 1, 0, 1])
    found = tempered.fitted(scores, gold)
    assert found == pytest.approx(4 / math.log(3), rel=1e-3)
    wanted = sum(logsumexp(row / found) - row[one] / found for row, one in zip(scores.numpy(), gold, strict=True)) / 4
    assert tempered.nats(scores, gold, found) == pytest.approx(float(wanted), rel=1e-5)
    assert tempered.fitted(scores, scores.argmax(-1)) < 0.1, "where all are right, the colder the lower"


def test_a_study_s_prompts(tiny_model, tmp_path, write_rows):
    """What it finds before a temperature is what the run reported."""
    rows = [{"review": f"It was {word} {place}.", "label": label} for place in range(4)
            for word, label in (("fine", "positive"), ("dull", "negative"))]  # fmt: skip
    for split in ("train", "dev", "val"):
        write_rows(tmp_path / "data" / "Reviews" / f"{split}.jsonl", rows)
    value = {
        "settings": {"model": str(tiny_model), "max_steps": 2, "batch_size": 4, "prompt_length": 3, "lr": 0.3,
                     "ds_config": str(ROOT / "ds_configs/zero3.json"), "perturbation": "none"},
        "seeds": [0, 1], "methods": {"plain": {}},
        "tasks": {"Reviews": {"task": "Reviews", "data_dir": "data", "train_split": "train", "select_split": "dev"}},
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(value), encoding="utf-8")
    check(run_script("study.py", ["study.json", "--output_dir", "out"], tmp_path))
    cell = tmp_path / "out" / "cells" / "Reviews" / "plain"
    done = check(run_script("bench/tempered.py", [cell], tmp_path))
    results = [json.loads((cell / "members" / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    mean = sum(result["eval_cross_entropy"] for result in results) / 2
    (line,) = re.findall(r"^\| Reviews/plain \| (.*) \|$", done.stdout, re.MULTILINE)
    before, *_, behind, _, _, warm = map(float, line.split(" | "))
    assert before == pytest.approx(mean, abs=6e-4)
    assert behind <= before + 5e-4, "the reported rows are the selection rows here"
    assert warm > 0


def test_what_is_no_cell_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no members/\*/result\.json; give folders of a study's cells"):
        tempered.main([str(tmp_path)])
    member = tmp_path / "members" / "seed-0"
    member.mkdir(parents=True)
    (member / "result.json").write_text('{"settings": {"select_split": null}}')
    with pytest.raises(UserError, match="rows held out of training; a --select_split is needed"):
        tempered.selection_split(member)
