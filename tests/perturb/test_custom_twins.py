"""Twins from a file of the user's own: arrays and tensors, other lengths, and every form that is refused."""

import json

import pytest

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.perturb import Noise, Twin
from ptp_ds.perturb.custom import choose_perturbation
from ptp_ds.training.step import settings_of
from tests.support.reference import make_examples
from tests.support.runs import QUICK


@pytest.mark.parametrize(
    ("returned", "message"),
    [("None", "twins returned NoneType; expected a list"), ("[]", "twins returned 0 of them; expected a list"),
     ("[3 for _ in examples]", "twins returned 3; expected a Twin of one token or more"),
     ("[Twin(['a'], [True]) for _ in examples]", "expected a Twin of one token or more, whole numbers, and movable"),
     ("[Twin([2.0], [True]) for _ in examples]", "expected a Twin of one token or more, whole numbers, and movable"),
     ("[Twin([2], ['no']) for _ in examples]", "and movable for each of them, True or False"),
     ("[Twin([2, 3], [True]) for _ in examples]", "and movable for each of them, True or False"),
     ("[Twin([], []) for _ in examples]", "expected a Twin of one token or more"),
     ("[Twin(2, [True]) for _ in examples]", "expected a Twin of one token or more"),
     ("[Twin([2], [True], 'end') for _ in examples]", "expected a Twin of one token or more"),
     ("[Twin(torch.ones(2, 2).long(), [True] * 2) for _ in examples]", "expected a Twin of one token or more"),
     ("[Twin(numpy.ones((40, 40)), [True] * 40) for _ in examples]", "expected a Twin of one token or more"),
     ("[Twin([2, 96], [True] * 2) for _ in examples]",
      "returned token 96 for row 0; expected the model's token ids, 0 to 95"),
     ("[Twin([-1], [True]) for _ in examples]",
      "twins returned token -1 for row 0; expected the model's token ids, 0 to 95"),
     ("[Twin([2] * 9, [True] * 9) for _ in examples]",
      "returned 9 tokens for row 1; at most 8 fit between the prompt")],
)  # fmt: skip
def test_twins_of_another_form_are_refused(tmp_path, returned, message):
    """In one sentence. Row 0's answers are of 2 and 3 tokens, row 1's of 1 and 3: the last one is not in the row."""
    with pytest.raises(UserError, match=message) as caught:
        twins_of(tmp_path, returned, make_examples("multi")[1:] if "row 1" in message else make_examples("multi"))
    assert "\n" not in str(caught.value)


def twins_of(folder, returned, examples):
    """What a file's twins come to, in a model of 96 tokens with room for 10 of each row."""
    file = folder / "mine.py"
    source = f"import numpy, torch\ndef twins(examples, settings, noise):\n    return {returned}\n"
    head = "from ptp_ds.perturb import Perturbation, Twin\n"
    file.write_text(f"{head}{source}PERTURBATION = Perturbation(twins=twins, sizes=())\n")
    settings = settings_of(RunConfig(), 1.0, vocabulary=96, room=10)
    return choose_perturbation(str(file)).perturbation.twins(examples, settings, Noise(0, 0))


@pytest.mark.parametrize(
    "returned",
    [
        "Twin([2, 95] * 4, [True, False] * 4, 3)",
        "Twin(([2, 95] * 4), (True, False) * 4, torch.tensor(3))",
        "Twin(numpy.array([2, 95] * 4), numpy.array([True, False] * 4), numpy.int64(3))",
        "Twin(torch.tensor([2, 95] * 4), torch.tensor([True, False] * 4), 3)",
        "Twin(list(numpy.array([2, 95] * 4)), list(torch.tensor([True, False] * 4)), 3)",
    ],
)
def test_twins_may_be_arrays_and_tensors(tmp_path, returned):
    """As many tokens as fit, of the vocabulary's first and last."""
    (twin, *_) = twins_of(tmp_path, f"[{returned} for _ in examples]", make_examples("multi")[:2])
    assert twin == Twin([2, 95] * 4, [True, False] * 4, 3)
    assert {type(value) for value in twin.context_ids} == {int}
    assert {type(value) for value in twin.movable} == {bool}


TWINS = {  # of a row whose text ends with the prompt; and what a run says of them
    "x.context_ids[1:], x.movable[1:], x.prompt_at - 1": "",
    "x.context_ids[1:], x.movable[1:]": "error: Row ",
    "[*x.context_ids] * 40, [*x.movable] * 40, 0": "; at most {most} fit between the prompt and the answers, so",
    "[{vocabulary}] * 2, [True] * 2, 0": "error: --perturbation mine.py: twins returned token {vocabulary} for row ",
}


@pytest.mark.parametrize("fields", TWINS)
def test_a_run_with_twins_of_another_length(run_train, tiny_model, tokenizer, tmp_path, write_rows, fields):
    """They are trained on, or refused by the run's own limits: its template, its vocabulary and --max_length."""
    longest = max(len(tokenizer(word)["input_ids"]) for word in (" no", " yes"))
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    known = {"most": 44 - 5 - (longest - 1), "vocabulary": vocabulary}  # of 44 tokens 5 are the prompt's
    said = TWINS[fields].format(**known)
    spec = {"name": "Mine", "text": "{t} It was<prompt>", "label": "y", "verbalizers": {"0": " no", "1": " yes"},
            "metrics": ["accuracy"]}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    for split in ("train", "val"):
        rows = [{"t": "The first one of the town", "y": number % 2} for number in range(4)]
        write_rows(tmp_path / "data" / "Mine" / f"{split}.jsonl", rows)
    (tmp_path / "mine.py").write_text(
        "from ptp_ds.perturb import Perturbation, Twin\ndef twins(examples, settings, noise):\n"
        f"    return [Twin({fields.format(**known)}) for x in examples]\n"
        "PERTURBATION = Perturbation(twins=twins, sizes=())\n"
    )
    done = run_train([*QUICK, "--task", "mine.json", "--data_dir", "data", "--model", tiny_model, "--perturbation",
                      "mine.py", "--max_steps", "2", "--max_length", "44", "--output_dir", "run"])  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (2 if said else 0, False), done.stderr[-2000:]
    assert said in done.stderr
