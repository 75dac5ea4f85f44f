"""Several adapters as an ensemble: all of one task, with the prompt in one place; every message."""

from dataclasses import replace

import pytest
import torch

from ptp_ds.adapters.served import serve
from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.evaluate import main as evaluate
from ptp_ds.errors import UserError
from ptp_ds.models.source import load_config
from ptp_ds.tasks import load_task

TASK = load_task("CB")
OTHERS = {
    "name": "Other",
    "text": "{hypothesis}? {premise}",
    "answers": {"entailment": " yes", "contradiction": " no", "neutral": " so"},
    "values": {"premise": {"a": "b"}},
    "truncate": None,
}


@pytest.fixture
def written(tiny_model, tmp_path):
    """written(name, task, in_text) writes a random prompt of 4 tokens, with a card that names the task, or without."""

    def write(name, task=TASK, in_text=False):
        card = {} if task is None else {"task": task.spec(), "head": {"kind": "causal"}}
        prompt, config = torch.randn(4, 32), load_config(tiny_model)
        write_adapter(tmp_path / name, prompt, str(tiny_model), config, card, in_text=in_text)
        if task is None:
            (tmp_path / name / "ptp_ds.json").unlink()
        return tmp_path / name

    return write


@pytest.mark.parametrize("part", OTHERS)
def test_an_ensemble_is_of_one_task(written, part):
    """Each prompt is scored behind the first one's text, so another's score would be of what it never saw."""
    first, other = written("first"), written("other", replace(TASK, **{part: OTHERS[part]}))
    with pytest.raises(UserError, match=rf"/first and \S*/other were trained on different tasks: {part} is .* --task"):
        serve([first, other])
    assert len(serve([first, other], task="CB").prompts) == 2


def test_what_rows_do_not_show_may_differ(written):
    """Which fields a perturbation left alone, and what is counted: the rows and answers are the same."""
    first = written("first")
    other = written("other", replace(TASK, fixed=frozenset({"premise"}), metrics=("accuracy",), attack=frozenset()))
    assert serve([first, other]).task == TASK
    assert serve([other, written("of_peft", None)]).task.metrics == ("accuracy",)
    swapped = {"neutral": TASK.answers["neutral"], **TASK.answers}
    assert serve([first, written("swapped", replace(TASK, answers=swapped))]).task == TASK


@pytest.mark.parametrize("task", [None, "CB"])
def test_an_ensemble_s_prompts_stand_in_one_place(written, task):
    inside = replace(TASK, text=f"{TASK.text} <prompt>")
    first, other = written("first"), written("other", TASK if task is None else inside, in_text=True)
    for pair in ([first, other], [other, first]):
        with pytest.raises(UserError, match=r"/other has its prompt inside the text, \S*/first in front of it; an ens"):
            serve(pair, task=task)
    assert len(serve([other, written("third", inside, in_text=True)], task=task or "CB").prompts) == 2


def test_evaluate_says_it_before_data_are_read(written, capsys):
    first, other = written("first"), written("other", replace(TASK, text=OTHERS["text"]))
    assert evaluate(["--adapter", str(first), str(other), "--data_dir", "nowhere"]) == 2
    assert "were trained on different tasks: text is" in capsys.readouterr().err
