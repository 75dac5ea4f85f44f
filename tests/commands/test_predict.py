"""scripts/predict.py: probabilities against evaluate.py's scores, rows and texts of a user's own, every message."""

import io
import json

import pytest
import torch

from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.predict import answer_lines, main, row_of_text
from ptp_ds.models.heads import HeadPlan
from ptp_ds.models.source import load_config
from ptp_ds.prompts import prompt_width
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import DEMO_DATA, Split
from tests.support.task_rows import ROWS
from tests.support.tiny import make_tokenizer
from tests.support.zygote import run_script

pytestmark = pytest.mark.usefixtures("no_launcher")

VAL = DEMO_DATA / "COPA" / "val.jsonl"
FIELDS = ["premise=The ice melted.", "choice1=It was warm.", "choice2=It froze.", "question=cause"]


@pytest.fixture
def adapter(tmp_path, tiny_model):
    """adapter(kind, task) writes a random prompt of 4 tokens for the tiny model and returns the command's flags."""

    def write(kind: str = "soft", task: str = "COPA") -> list[str]:
        config = load_config(tiny_model)
        prompt = torch.randn(4, prompt_width(kind, config), generator=torch.Generator().manual_seed(3))
        write_adapter(
            tmp_path / "adapter", prompt, str(tiny_model), config, {"task": load_task(task).spec(), "result": {}}, kind
        )
        return ["--adapter", str(tmp_path / "adapter"), "--model", str(tiny_model)]

    return write


def answers(capsys, argv) -> list[dict]:
    assert main(argv) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_probabilities_are_those_of_evaluates_scores(adapter, tmp_path):
    """Both scripts as a user starts them, on the same rows; predict.py's without their labels."""
    flags, report, out = adapter(), tmp_path / "report.json", tmp_path / "out.jsonl"
    bare = [{key: value for key, value in json.loads(line).items() if key != "label"}
            for line in VAL.read_text().splitlines()]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, bare)))
    for script, more in (
        ("evaluate.py", ["--json", str(report)]),
        ("predict.py", ["--input", str(tmp_path / "rows.jsonl"), "--output", str(out)]),
    ):
        done = run_script(script, [*flags, *more])
        assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    scores = json.loads(report.read_text())["scores"]
    assert len(lines) == len(scores) == len(bare)
    for number, (line, row, wanted) in enumerate(zip(lines, bare, scores, strict=True)):
        assert (line["row"], line["idx"]) == (number, row["idx"])
        assert list(line["probabilities"]) == ["0", "1"]
        expected = torch.tensor(wanted).softmax(-1)
        torch.testing.assert_close(torch.tensor(list(line["probabilities"].values())), expected, atol=1e-6, rtol=1e-5)
        assert line["answer"] == str(int(expected.argmax()))


@pytest.fixture
def masked(tmp_path) -> list[str]:
    """The flags of a random prompt on a tiny random BERT with its masked head."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer, folder = make_tokenizer(), tmp_path / "bert"
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = {"task": load_task("Reviews").spec()}
    write_adapter(
        tmp_path / "adapter", torch.randn(4, 32), str(folder), config, card, plan=HeadPlan("masked", outputs=2)
    )
    return ["--adapter", str(tmp_path / "adapter"), "--model", str(folder)]


def test_masked_heads_answer_as_evaluate_scores(masked, tmp_path, capsys):
    report, rows = tmp_path / "report.json", DEMO_DATA / "Reviews" / "val.jsonl"
    done = run_script("evaluate.py", [*masked, "--json", report])
    assert done.returncode == 0, done.stderr[-2000:]
    found = [list(line["probabilities"].values()) for line in answers(capsys, [*masked, "--input", str(rows)])]
    expected = torch.tensor(json.loads(report.read_text())["scores"]).softmax(-1)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-6, rtol=1e-5)


def test_only_causal_models_generate(masked, capsys):
    assert main([*masked, "--text", "A fine film.", "--generate", "3"]) == 2
    assert "serves this adapter with a masked head." in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_a_text_answers_as_its_row_does(adapter, tmp_path, capsys, kind):
    flags = adapter(kind)
    row = dict(word.split("=") for word in FIELDS)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (line,) = answers(capsys, [*flags, "--input", str(tmp_path / "rows.jsonl"), "--generate", "5"])
    assert main([*flags, "--text", *FIELDS, "--generate", "5"]) == 0
    shown = capsys.readouterr().out.splitlines()
    best, share = line["answer"], line["probabilities"][line["answer"]]
    assert shown[0] == f"{best}  {share:.4f}  {[' it was warm.', ' it froze.'][int(best)]!r}"
    assert "\n".join(shown[2:]) == f"generated: {line['generated']}".rstrip("\n")
    assert sum(line["probabilities"].values()) == pytest.approx(1)


def test_the_only_field_needs_no_name(adapter, capsys):
    flags = adapter(task="Reviews")
    printed = []
    for word in ("A fine film: x = y.", "review=A fine film: x = y."):
        assert main([*flags, "--text", word]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "positive" in printed[0]


@pytest.mark.parametrize("text", ["2+2=4", "a = b holds", "a==b", "https://x.org/?q=a", "=x", "A film: x=y.", "it's=x"])
def test_texts_with_an_equals_sign(text):
    assert row_of_text(load_task("Reviews"), [text]) == {"review": text}


def test_a_table_and_standard_input_answer_as_json_lines_do(adapter, tmp_path, capsys, monkeypatch):
    row, flags = dict(word.split("=") for word in FIELDS), adapter()
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (tmp_path / "rows.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    found = []
    for given in (tmp_path / "rows.jsonl", tmp_path / "rows.csv", "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(row).encode())))
        found.append(answers(capsys, [*flags, "--input", str(given)]))
    assert found[0] == found[1] == found[2]


def test_rows_of_several_questions_and_of_their_own_answers():
    split = Split([{"idx": 9, **ROWS["ReCoRD"]}, ROWS["ReCoRD"]], ["row 0", "row 1"], "")
    scores = torch.tensor([[0.0, 0.0, 0.5], [1.0, 0.0, 0.0]] * 2).log_softmax(-1)
    lines = answer_lines(load_task("ReCoRD"), split, scores)
    assert [(line["row"], line.get("idx"), line["entry"], line["answer"]) for line in lines] == [
        (0, 9, 0, "Rome"), (0, 9, 1, "Ann"), (1, None, 0, "Rome"), (1, None, 1, "Ann"),
    ]  # fmt: skip
    assert list(lines[0]["probabilities"]) == ["Ann", "Bob", "Rome"]


def test_answers_that_a_row_lacks_get_no_probability():
    scores = torch.tensor([[-1.0, -2.0, -3.0, float("-inf")]])
    (line,) = answer_lines(load_task("WSC"), Split([ROWS["WSC"]], ["row 0"], ""), scores)
    assert list(line["probabilities"]) == ["Mark", "the old man", "a lie"]
    assert sum(line["probabilities"].values()) == pytest.approx(1)


def test_long_rows_are_shortened_and_told(adapter, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"review": "A film of the town. " * 300}))
    assert main([*adapter(task="Reviews"), "--input", str(tmp_path / "rows.jsonl"), "--generate", "3"]) == 0
    told = capsys.readouterr().err
    assert "1 row was longer than the context: shortened in 'review' (" in told
    assert told.count("/rows.jsonl:1)\n") == 2
    assert "1 row was longer than the context and 3 tokens behind it: shortened in 'review' (" in told


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("CB", ["premise=a", "hypotesis=b"], r"--text 'hypotesis=b': expected field=value, once for each field of pre"),
        ("CB", ["premise=a", "premise=b"], r"--text 'premise=b': expected field=value, once for each field"),
        ("CB", ["in one"], r"--text 'in one': expected field=value, once for each field of premise, hypothesis\."),
        ("Reviews", ["two", "words"], r"--text 'two': expected field=value, once for each field of review\."),
        ("Reviews", ["txt=hello"], r"--text 'txt=hello': task Reviews has no field 'txt'; its only one is review"),
        ("Reviews", ["reviw=a"], r"has no field 'reviw' \(did you mean 'review'\?\); its only one is review, so write"),
        ("WSC", ["text=a"], r"--text can't hold a row of task WSC, which is more than fields; give --input\."),
    ],
)  # fmt: skip
def test_texts_that_are_no_row(name, words, message):
    with pytest.raises(ValueError, match=message):
        row_of_text(load_task(name), words)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "Give either --input or --text, one of the two."),
        (["--input", "a", "--text", "b"], "Give either --input or --text, one of the two."),
        (["--text", "a", "--text", "b"], "--text comes twice; give one row's fields behind one --text, and several "
         "rows in a file behind --input. See --help."),
        (["--text", "b", "--output", "c"], "--output goes with --input; the answer to --text is printed."),
        (["--text", *FIELDS, "--generate", "0"], "--generate is 0; expected a whole number of 1 or more."),
        (["--text", *FIELDS, "--eval_tokens", "0"], "--eval_tokens is 0; expected a whole number of 1 or more."),
        (["--text", *FIELDS, "--generate", "508"],
         "--generate 508 leaves no room for a row: 508 tokens fit behind the prompt."),
        (["--text", *FIELDS[1:]], "--text: the row has no field 'premise', or an empty cell; task COPA"),
        (["--input", "nowhere.jsonl"], "--input nowhere.jsonl: there is no such file; give JSON lines (.jsonl), or"),
        (["--input", "empty.jsonl"], "--input empty.jsonl has no rows; give a file with at least one."),
        (["--input", "bad.jsonl"], "bad.jsonl:1: the row has no field 'premise', or an empty cell; task COPA"),
        (["--input", "bad.jsonl", "--output", "."], "--output .: that is a folder or lies below a file; give a "),
        (["--input", "bad.jsonl", "--output", "out.CSV"],
         "--output out.CSV: answers are JSON lines, no table; give a name in .jsonl, such as out.jsonl."),
        (["--task", "Boolq", "--text", "x"], "Unknown task 'Boolq' (did you mean BoolQ?)"),
    ],
)  # fmt: skip
def test_messages(adapter, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n')
    assert main([*adapter(), *extra]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_launchers_are_refused(adapter, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*adapter(), "--text", *FIELDS]) == 2
    assert (
        "scripts/predict.py is one process; start it with plain python, not with a launcher." in capsys.readouterr().err
    )
