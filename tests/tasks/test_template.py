"""Task templates: the built-in ones, filters, values, every error of a template or a row."""

import json
import re
from dataclasses import replace

import pytest

from ptp_ds.errors import UserError
from ptp_ds.tasks import NoLabelError, builtin_tasks, load_task
from ptp_ds.tasks.data import DEMO_DATA, load_split
from ptp_ds.tasks.template import builtin_templates, canonical_label, parse_task
from tests.support.task_rows import ROWS

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
    "WiC": (
        'A river bank.\nHe robbed a bank.\nQuestion: Is the word "bank" used with the same meaning in both sentences?'
        "\nAnswer:", [" yes", " no"], 1,
    ),
    "AX-b": ("A came.\nQuestion: A did not come. True or False?\nAnswer:", [" False", " True"], 0),
    "AX-g": ("A met B.\nQuestion: B met A. True or False?\nAnswer:", [" True", " False"], 0),
    "MultiRC": ('It rained.\nQuestion: What fell?\nIs "Rain" a right answer?\nAnswer:', [" no", " yes"], 1),
    "ReCoRD": ("Ann met Bob in Rome.\nA short visit\nThen he said:", [
        " (Ann's town).", " (Bob's town).", " (Rome's town)."], 2),
    "WSC": (
        'Mark told the old man a lie, and *he* believed it.\nIn the passage above, the pronoun "he" refers to',
        [" Mark", " the old man", " a lie"], 0,
    ),
}  # fmt: skip


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
    rendered = load_task(name).entries(ROWS[name], "here")[0]
    assert (rendered.context, list(rendered.candidates), rendered.gold) == RENDERED[name]


@pytest.mark.parametrize("name", sorted(path.name for path in DEMO_DATA.iterdir() if path.is_dir()))
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


def test_fields_are_those_of_context_and_answers():
    assert load_task("COPA").fields == ("premise", "question", "choice1", "choice2")
    assert load_task("Reviews").fields == ("review",)


def test_attacked_fields():
    """Those under 'attack', by default the one that may be shortened, without one all."""
    shortened, chosen, neither = (
        parse_task(template(**changes), "t") for changes in ({}, {"attack": ["b"]}, {"truncate": ...})
    )
    assert [shortened.attacks(name) for name in ("a", "b", None)] == [True, False, False]
    assert [chosen.attacks(name) for name in ("a", "b", None)] == [False, True, False]
    assert neither.attacks("a")
    assert neither.attacks("b")
    assert chosen.spec()["attack"] == ["b"]
    assert "attack" not in shortened.spec()


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
    ("value", "label"),
    [
        (True, "true"), (False, "false"), (1, "1"), (1.0, "1"), (-1.0, "-1"), (0.5, "0.5"), ("1.0", "1.0"),
        ("True", "True"), ("entailment", "entailment"),
    ],
)  # fmt: skip
def test_canonical_label(value, label):
    assert canonical_label(value) == label


@pytest.mark.parametrize(
    ("labels", "value", "gold"),
    [
        (("0", "1"), 1.0, 1), (("0", "1"), -0.0, 0), (("1", "1.0"), 1.0, 1), (("1.0", "2.5"), 1, None),
        (("1.0", "2.5"), 2.5, 1), (("True", "False"), False, 1), (("FALSE", "TRUE"), True, 1),
        (("True", "False"), "true", 0), (("true", "True"), True, 0), (("true", "True"), "True", 1),
        (("0", "1"), 0.5, None), (("0", "1"), float("nan"), None), (("0", "1"), float("inf"), None),
        (("True", "False"), 1, None), (("0", "1"), True, None),
    ],
)  # fmt: skip
def test_a_label_by_another_spelling_of_its_value(labels, value, gold):
    task = parse_task(template(verbalizers=dict(zip(labels, (" no", " yes"), strict=True))), "t")
    row = {"a": "x", "b": "y"}
    if gold is None:
        with pytest.raises(UserError, match=r"here: label '\S+' is not one of "):
            task.render({**row, "y": value}, "here")
    else:
        assert task.render({**row, "y": value}, "here").gold == gold


def test_the_hub_s_number_of_no_label_as_a_float():
    with pytest.raises(NoLabelError, match=r"here: label '-1' is not one of 0, 1"):
        parse_task(template(), "t").render({"a": "x", "b": "y", "y": -1.0}, "here")


def test_every_builtin_template_has_an_instruction_with_its_answers():
    for name in builtin_templates():
        task = load_task(name)
        assert task.instruction, name
        if not task.choice:
            words = re.findall(r"\w+", task.instruction)
            assert all(answer.strip() in words for answer in task.answers.values()), name


def test_an_instruction_is_no_part_of_how_rows_read():
    """A template that gains one is the same to a resume and to a study's finished cells."""
    task = load_task("CB")
    assert task.is_same(replace(task, instruction=None))
    assert "instruction" not in task.spec()


def test_spec_tells_templates_apart():
    first, second = (
        parse_task(template(**change), "t").spec() for change in ({}, {"verbalizers": {"0": "a", "1": "b"}})
    )
    assert first != second
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"a": ...},
            r"row 7: the row has no field 'a', or an empty cell; task T needs it \(the row has b, y\)\.$",
        ),
        ({"a": ""}, "row 7: field 'a' must be non-empty text, not ''"),
        ({"a": "  "}, "row 7: field 'a' must be non-empty text"),
        ({"a": 3}, "row 7: field 'a' must be non-empty text, not 3"),
        (
            {"y": ...},
            r"row 7: the row has no 'y', the label of task T, or an empty cell; it has a, b\. Correct row or template, "
            r"or give a split whose rows all have labels\.$",
        ),
        ({"y": "2"}, r"row 7: label '2' is not one of 0, 1 \(task T\)"),
        ({"y": True}, "row 7: label 'true' is not one of 0, 1"),
        ({"y": None}, "row 7: label 'None' is not one of 0, 1"),
    ],
)
def test_row_errors(changes, message):
    row = {key: value for key, value in {"a": "x", "b": "y", "y": 1, **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        parse_task(template(), "t").render(row, "row 7")


HALF = (
    r"holds '\\u\w{4}' at character 4, half a character or a byte of another encoding; give whole characters, as UTF-8"
)


@pytest.mark.parametrize("text", ["bad \ud83d half", b"caf\xe9".decode("utf-8", "surrogateescape").replace("f", "ff")])
def test_half_a_character(text):
    """As JSON may hold it, and as Python hands on a Latin-1 byte of the command line."""
    row = {"premise": text, "hypothesis": "It is wet.", "label": "entailment"}
    with pytest.raises(UserError, match=f"^here: field 'premise' {HALF}"):
        load_task("RTE").render(row, "here")
    spec = {"name": "T", "text": "{a}", "label": "l", "verbalizers": {"x": text, "y": " y"}, "metrics": ["accuracy"]}
    with pytest.raises(UserError, match=rf"^here: '\w+.*' {HALF}"):
        parse_task(spec, "here")


def test_half_a_character_in_a_row_s_own_answers():
    """What stands behind a query's placeholder is text of the answers alone."""
    row = json.loads(json.dumps(ROWS["ReCoRD"]))
    row["qas"][0]["query"] += " \ud83d"
    with pytest.raises(UserError, match=r"^here: the answer .* holds '.ud83d' at character"):
        load_task("ReCoRD").entries(row, "here", labelled=False)


def test_value_outside_the_mapping():
    with pytest.raises(ValueError, match="here: field 'question' is 'why'; expected cause, effect"):
        load_task("COPA").render({**ROWS["COPA"], "question": "why"}, "here")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["text"], "t: a template is one JSON object with the keys attack, candidates, fixed, instruction, "),
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
        (template(instruction=["Say"]), "t: 'instruction' must be non-empty text"),
        (template(label=None), "t: 'label' must be non-empty text"),
        (template(metrics=["f2"]), r"t: metrics \['f2'\] are unknown; choose from accuracy, macro_f1"),
        (template(metrics=[]), r"t: metrics \[\] are unknown"),
        (template(metrics=["f1"]), "t: metric 'f1' needs reader record or wsc"),
        (template(metrics=["exact_match"]), "t: metric 'exact_match' needs reader multirc or pairs"),
        (template(reader="csv"), "t: unknown reader 'csv'; choose from flat, pairs, multirc, record, wsc"),
        (template(reader="wsc"), "t: reader 'wsc' brings its rows' answers; leave out verbalizers and label"),
        (template(label=...), "t: the template lacks label"),
        (template(text="{a|upper}"), "t: unknown filter 'upper'; choose from strip_stop, lower_first"),
        (template(verbalizers={"0": " {b|low}", "1": " x"}), "t: unknown filter 'low'"),
        (template(truncate="c"), "t: 'truncate' names 'c', which the text doesn't hold"),
        (template(attack=["c"]), "t: 'attack' names 'c', which the text doesn't hold"),
        (template(attack="a"), "t: 'attack' must be a list of names"),
        (template(attack=["b"], fixed=["b"]), "t: 'attack' names 'b', which 'fixed' or 'values' keeps as it is"),
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


def test_a_column_s_name_in_the_text_is_one_word():
    """Letters of any language."""
    with pytest.raises(ValueError, match=r"one word of letters, digits and _, so rename a column whose name is not\.$"):
        parse_task(template(text="{Mein Text} {b}", truncate=...), "t")
    assert parse_task(template(text="{L\u00e4nge_2} {b}", truncate=...), "t").fields == ("L\u00e4nge_2", "b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "rte",
            r"Unknown task 'rte' \(did you mean RTE\?\): give one of AX-b, AX-g, BoolQ, .* template \.json file",
        ),
        ("Bool", r"\(did you mean BoolQ\?\)"),
        ("zzzzzz", "Unknown task 'zzzzzz': give one of"),
        ("none.json", r"--task none\.json: there is no such template file"),
    ],
)
def test_unknown_tasks(name, message):
    with pytest.raises(ValueError, match=message):
        load_task(name)


def test_a_template_that_was_named_without_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtee.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Unknown task 'rtee' \(rtee\.json is here\): give one of .* template \.json"):
        load_task("rtee")


@pytest.mark.parametrize(("content", "message"), [(b"{", r"not valid JSON \("), (b"\xff\xfe\x00", "not UTF-8 text")])
def test_template_file_that_is_not_json(tmp_path, content, message):
    file = tmp_path / "own.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"own\.json: {message}"):
        load_task(str(file))


@pytest.mark.parametrize("name", ["..", "../CB", "a/b", "a\\b", "/etc", ".hidden", "~", "a\0b", "a\nb", " ", "a" * 129])
def test_names_that_are_no_folder_s(name):
    with pytest.raises(ValueError, match=r"^here: 'name' is .*; expected a plain name of at most 128 bytes"):
        parse_task(template(name=name), "here")


def test_template_file_of_ones_own(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(template()), encoding="utf-8")
    task = load_task(str(file))
    assert task.render({"a": "x", "b": "y.", "y": 1}, "here").context == "x y:"
    assert task.labels == ("0", "1")


@pytest.mark.parametrize("name", sorted(set(builtin_templates()) - set(builtin_tasks())))
def test_variants_are_their_task_in_other_words(name):
    task, plain = load_task(name), load_task(name.split(".")[0])
    assert (task.name, task.metrics, task.reader, task.fields) == (
        plain.name,
        plain.metrics,
        plain.reader,
        plain.fields,
    )
    assert task.labels == plain.labels
    assert task.choice == plain.choice
    assert task.text != plain.text or task.values != plain.values
    assert len(task.entries(ROWS[plain.name], "here")) == len(plain.entries(ROWS[plain.name], "here"))
