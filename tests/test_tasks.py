"""Task templates: the built-in ones, filters, values, every error of a template or a row, metrics."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from ptp_ds.data import load_split
from ptp_ds.tasks import builtin_tasks, compute_metrics, load_task, majority_accuracy
from ptp_ds.tasks.template import canonical_label, parse_task

ROWS = {
    "BoolQ": {"passage": "Glass -- It melts.", "question": "can glass melt", "label": True},
    "CB": {"premise": "It rains, he said.", "hypothesis": "it rains", "label": "neutral"},
    "COPA": {"premise": "The ice melted. ", "choice1": "It was warm.", "choice2": "I froze it.", "question": "cause",
             "label": 1},
    "RTE": {"premise": "A came.", "hypothesis": "B came.", "label": "not_entailment"},
    "Reviews": {"review": "A fine film.", "label": "positive"},
}  # fmt: skip
RENDERED = {
    "BoolQ": ("Glass -- It melts.\nQuestion: can glass melt?\nAnswer:", [" yes", " no"], 0),
    "CB": (
        "It rains, he said.\nQuestion: it rains True, False or Neither?\nAnswer:",
        [" True", " False", " Neither"],
        2,
    ),
    "COPA": ("The ice melted because", [" it was warm.", " i froze it."], 1),
    "RTE": ("A came.\nQuestion: B came. True or False?\nAnswer:", [" True", " False"], 1),
    "Reviews": ("Review: A fine film.\nSentiment:", [" positive", " negative"], 0),
}


def template(**changes):
    spec = {
        "name": "T", "text": "{a} {b|strip_stop}:", "truncate": "a", "label": "y",
        "verbalizers": {"0": " no", "1": " yes"}, "metrics": ["accuracy"],
    }  # fmt: skip
    merged = {**spec, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def test_every_builtin_task_has_an_expectation_here():
    assert builtin_tasks() == sorted(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_builtin_templates_render(name):
    rendered = load_task(name).render(ROWS[name], "here")
    assert (rendered.context, list(rendered.candidates), rendered.gold) == RENDERED[name]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_builtin_templates_fit_the_demo_data(name):
    task = load_task(name)
    split = load_split(task, "train", None, None)
    golds = {task.render(row, where).gold for row, where in zip(split.rows, split.where, strict=True)}
    assert golds == set(range(len(task.labels)))


@pytest.mark.parametrize("name", ["BoolQ", "CB", "COPA", "RTE"])
def test_builtin_templates_fit_superglue(name, superglue):
    task = load_task(name)
    split = load_split(task, "val", str(superglue), None)
    golds = {task.render(row, where).gold for row, where in zip(split.rows, split.where, strict=True)}
    assert golds == set(range(len(task.labels)))


def test_pieces_name_their_fields():
    pieces = load_task("COPA").render(ROWS["COPA"], "here").pieces
    assert list(pieces) == [("The ice melted", "premise"), (" ", None), ("because", "question")]


@pytest.mark.parametrize(("raw", "word"), [("cause", "because"), ("effect", "so")])
def test_values_replace_raw_words_and_are_fixed(raw, word):
    task = load_task("COPA")
    assert task.render({**ROWS["COPA"], "question": raw}, "here").context == f"The ice melted {word}"
    assert task.fixed_fields == {"question"}


def test_fixed_fields_add_to_values():
    task = parse_task(template(fixed=["b"], values={"a": {"x": "y"}}), "t")
    assert task.fixed_fields == {"a", "b"}
    assert task.spec()["fixed"] == ["b"]


@pytest.mark.parametrize(
    ("name", "text", "filtered"),
    [
        ("strip_stop", "It melted. ", "It melted"),
        ("strip_stop", "It melted", "It melted"),
        ("strip_stop", "etc...", "etc"),
        ("lower_first", "The Ice.", "the Ice."),
        ("lower_first", "X", "x"),
    ],
)
def test_filters(name, text, filtered):
    task = parse_task(template(text=f"{{a|{name}}}!"), "t")
    assert task.render({"a": text, "y": 0}, "here").context == f"{filtered}!"


@pytest.mark.parametrize(
    ("value", "label"), [(True, "true"), (False, "false"), (1, "1"), ("True", "True"), ("entailment", "entailment")]
)
def test_canonical_label(value, label):
    assert canonical_label(value) == label


def test_spec_tells_templates_apart():
    first, second = (
        parse_task(template(**change), "t").spec() for change in ({}, {"verbalizers": {"0": "a", "1": "b"}})
    )
    assert first != second
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": ...}, "row 7: the row has no field 'a'; task T needs it"),
        ({"a": ""}, "row 7: field 'a' must be non-empty text, not ''"),
        ({"a": "  "}, "row 7: field 'a' must be non-empty text"),
        ({"a": 3}, "row 7: field 'a' must be non-empty text, not 3"),
        ({"y": ...}, "row 7: the row has no 'y'; a labelled split is needed"),
        ({"y": "2"}, r"row 7: label '2' is not one of 0, 1 \(task T\)"),
        ({"y": True}, "row 7: label 'true' is not one of 0, 1"),
        ({"y": None}, "row 7: label 'None' is not one of 0, 1"),
    ],
)
def test_row_errors(changes, message):
    row = {key: value for key, value in {"a": "x", "b": "y", "y": 1, **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        parse_task(template(), "t").render(row, "row 7")


def test_value_outside_the_mapping():
    with pytest.raises(ValueError, match="here: field 'question' is 'why'; expected cause, effect"):
        load_task("COPA").render({**ROWS["COPA"], "question": "why"}, "here")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["text"], "t: a template is one JSON object with the keys candidates, fixed, label, "),
        (template(verbaliser={}), r"t: unknown key 'verbaliser' \(did you mean 'verbalizers'\?\)\."),
        (template(qqqq=1), r"t: unknown key 'qqqq'\."),
        (template(name=..., metrics=...), "t: the template lacks metrics, name"),
        (template(verbalizers=...), "t: give either 'verbalizers' or 'candidates', one of the two"),
        (template(candidates={"0": "a", "1": "b"}), "t: give either 'verbalizers' or 'candidates'"),
        (template(verbalizers=["a", "b"]), "t: verbalizers or candidates must map two or more labels to answer texts"),
        (template(verbalizers={"0": "a"}), "must map two or more labels"),
        (template(verbalizers={"0": "a", "1": ""}), "must map two or more labels"),
        (template(verbalizers={"0": "a", "1": 1}), "must map two or more labels"),
        (template(verbalizers={"0": "a", "1": "a"}), "t: two labels share one answer text; each label needs its own"),
        (template(name=""), "t: 'name' must be non-empty text"),
        (template(text=5), "t: 'text' must be non-empty text"),
        (template(label=None), "t: 'label' must be non-empty text"),
        (template(metrics=["f2"]), r"t: metrics \['f2'\] are unknown; choose from accuracy, macro_f1"),
        (template(metrics=[]), r"t: metrics \[\] are unknown"),
        (template(text="{a|upper}"), "t: unknown filter 'upper'; choose from strip_stop, lower_first"),
        (template(verbalizers={"0": " {b|low}", "1": " x"}), "t: unknown filter 'low'"),
        (template(truncate="c"), "t: 'truncate' names 'c', which the text doesn't hold"),
    ],
)
def test_template_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_task(spec, "t")


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": 5},
        {"metrics": [["accuracy"]]},
        {"truncate": ["a"]},
        {"values": {"a": "word"}},
        {"values": ["a"]},
        {"values": {"c": {"x": "y"}}},
        {"values": {"a": {"x": 1}}},
        {"fixed": 3},
        {"fixed": "ab"},
        {"fixed": ["c"]},
        {"text": "no field at all", "truncate": ...},
        {"text": "{a } {b}", "truncate": ...},
    ],
    ids=str,
)
def test_template_parts_of_the_wrong_kind(changes):
    with pytest.raises(ValueError, match=r"^t: "):
        parse_task(template(**changes), "t")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "rte",
            r"Unknown task 'rte' \(did you mean RTE\?\): give one of BoolQ, CB, COPA, RTE, .* template \.json file",
        ),
        ("Bool", r"\(did you mean BoolQ\?\)"),
        ("zzzzzz", "Unknown task 'zzzzzz': give one of"),
        ("none.json", r"--task none\.json: there is no such template file"),
    ],
)
def test_unknown_tasks(name, message):
    with pytest.raises(ValueError, match=message):
        load_task(name)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00"])
def test_template_file_that_is_not_json(tmp_path, content):
    file = tmp_path / "own.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.json: not valid JSON \("):
        load_task(str(file))


def test_template_file_of_ones_own(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(template()), encoding="utf-8")
    task = load_task(str(file))
    assert task.render({"a": "x", "b": "y.", "y": 1}, "here").context == "x y:"
    assert task.labels == ("0", "1")


@pytest.mark.parametrize("seed", range(25))
def test_metrics_are_scikit_learns(seed):
    generator = np.random.default_rng(seed)
    labels, rows = int(generator.integers(2, 5)), int(generator.integers(1, 40))
    gold, predicted = (generator.integers(0, labels, rows).tolist() for _ in range(2))
    found = compute_metrics(("accuracy", "macro_f1"), predicted, gold)
    assert list(found) == ["accuracy", "macro_f1"]
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro"), abs=1e-12)


def test_metrics_refuse_lists_of_two_lengths():
    with pytest.raises(ValueError, match="zip"):
        compute_metrics(("accuracy",), [1, 0], [1])


@pytest.mark.parametrize(("gold", "share"), [([0, 0, 1], 2 / 3), ([1], 1.0), ([0, 1, 2, 2], 0.5)])
def test_majority(gold, share):
    assert majority_accuracy(gold) == pytest.approx(share)
