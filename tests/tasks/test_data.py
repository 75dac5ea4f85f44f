"""Splits from jsonl and from the hub's layout, and the orders in which rows are held out, seen and dealt."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import BatchOrder, BudgetOrder, deal_rows, hold_out, load_split, tokenise

CB_ROWS = [
    {"premise": "It rains, he said.", "hypothesis": "it rains", "label": "neutral", "idx": 0},
    {"premise": "He knew that it rains.", "hypothesis": "it rains", "label": "entailment", "idx": 1},
    {"premise": "He was wrong that it rains.", "hypothesis": "it rains", "label": "contradiction", "idx": 2},
]
CB_NAMES = ["entailment", "contradiction", "neutral"]
COPA_ROWS = [
    {"premise": "The ice melted.", "choice1": "It was warm.", "choice2": "It froze.", "question": "cause", "label": 0},
    {"premise": "The ice melted.", "choice1": "It froze.", "choice2": "It dripped.", "question": "effect", "label": 1},
]


def load(task: str, folder: Path, split: str = "train"):
    return load_split(load_task(task), split, str(folder), None)


# jsonl


def test_rows_are_numbered_by_line_and_digested(tmp_path, write_rows):
    file = write_rows(tmp_path / "CB" / "train.jsonl", [CB_ROWS[0], "", "  ", CB_ROWS[1]])
    split = load("CB", tmp_path)
    assert list(split.rows) == CB_ROWS[:2]
    assert list(split.where) == [f"{file}:1", f"{file}:4"]
    write_rows(tmp_path / "other" / "CB" / "train.jsonl", CB_ROWS[:2])
    assert load("CB", tmp_path / "other").digest == split.digest
    write_rows(tmp_path / "other" / "CB" / "train.jsonl", CB_ROWS[1::-1])
    assert load("CB", tmp_path / "other").digest != split.digest


def test_unicode_line_separator_stays_inside_its_row(tmp_path, write_rows):
    row = {**CB_ROWS[0], "premise": "It\u2028rains\u2029now\x85 he said."}
    write_rows(tmp_path / "CB" / "train.jsonl", [row, CB_ROWS[1]])
    assert list(load("CB", tmp_path).rows) == [row, CB_ROWS[1]]


def test_windows_line_ends(tmp_path):
    (tmp_path / "CB").mkdir()
    (tmp_path / "CB" / "train.jsonl").write_bytes("\r\n".join(map(json.dumps, CB_ROWS)).encode())
    assert list(load("CB", tmp_path).rows) == CB_ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"premise": "a"', r"train\.jsonl:3: not valid JSON \(.*, column 16\)"),
        ("nonsense", r"train\.jsonl:3: not valid JSON \(Expecting value, column 1\)"),
        ("[1]", r"train\.jsonl:3: expected a JSON object, found list"),
        ('"text"', r"train\.jsonl:3: expected a JSON object, found str"),
    ],
)
def test_malformed_lines(tmp_path, write_rows, line, message):
    write_rows(tmp_path / "CB" / "train.jsonl", [CB_ROWS[0], "", line])
    with pytest.raises(ValueError, match=message):
        load("CB", tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "CB").mkdir()
    (tmp_path / "CB" / "train.jsonl").write_bytes(b'{"premise": "\xff"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl: not UTF-8 text \(invalid start byte at byte 13\)"):
        load("CB", tmp_path)


@pytest.mark.parametrize("rows", [[], ["", "   "]])
def test_empty_split(tmp_path, write_rows, rows):
    write_rows(tmp_path / "CB" / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"CB/train\.jsonl: split 'train' of task CB has no rows"):
        load("CB", tmp_path)


def test_missing_folders_and_files(tmp_path, write_rows):
    with pytest.raises(ValueError, match=r"--data_dir .*nowhere: there is no such folder"):
        load("CB", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"No folder 'CB' in --data_dir .*; it holds no folders\."):
        load("CB", tmp_path)
    write_rows(tmp_path / "RTE" / "train.jsonl", CB_ROWS)
    with pytest.raises(
        ValueError, match=r"--data_dir .*train\.jsonl is a file; give the folder above RTE/, which holds"
    ):
        load("RTE", tmp_path / "RTE" / "train.jsonl")
    with pytest.raises(
        ValueError,
        match=r"No folder 'RTE' in --data_dir .*RTE; it holds train\.jsonl itself\. Give the folder above it, and name "
        r"this one RTE\.",
    ):
        load("RTE", tmp_path / "RTE")
    with pytest.raises(ValueError, match=r"No folder 'CB' in --data_dir .*; it holds RTE\."):
        load("CB", tmp_path)
    with pytest.raises(ValueError, match=r"No file .*RTE/val\.jsonl; splits there \(\.jsonl, \.csv, \.tsv\): train\."):
        load("RTE", tmp_path, "val")
    (tmp_path / "CB").mkdir()
    with pytest.raises(ValueError, match=r"No file .*CB/val\.jsonl; splits there \(.*\): none\."):
        load("CB", tmp_path, "val")


@pytest.mark.parametrize("ending", ["CSV", "Csv", "TSV", "JSONL"])
def test_a_split_s_ending_may_be_in_capitals(tmp_path, ending):
    """As load_rows takes it."""
    rows = {"J": '{"review": "a", "label": "b"}\n', "T": "review\tlabel\na\tb\n", "C": "review,label\na,b\n"}[ending[0]]
    (tmp_path / "Reviews").mkdir()
    (tmp_path / "Reviews" / f"train.{ending}").write_text(rows)
    assert load("Reviews", tmp_path).rows == [{"review": "a", "label": "b"}]
    with pytest.raises(ValueError, match=r"splits there \(\.jsonl, \.csv, \.tsv\): train\."):
        load("Reviews", tmp_path, "val")
    with pytest.raises(ValueError, match=f"it holds train.{ending} itself"):
        load("Reviews", tmp_path / "Reviews")


def test_task_without_demo_data(tmp_path):
    own = tmp_path / "own.json"
    spec = {"name": "Own", "text": "{a}:", "label": "y", "verbalizers": {"0": " a", "1": " b"}, "metrics": ["accuracy"]}
    own.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match=r"No folder 'Own' in the packaged demo data; it holds .*; give --data_dir or"):
        load_split(load_task(str(own)), "train", None, None)


def test_demo_data_is_the_default():
    assert len(load_split(load_task("CB"), "val", None, None).rows) == 48


def test_two_sources_are_refused():
    with pytest.raises(ValueError, match="Can't read both --data_dir and --dataset; choose one"):
        load_split(load_task("CB"), "train", "a", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CB_ROWS[0], "label": "maybe"}, r"train\.jsonl:2: label 'maybe' is not one of entailment, contradiction"),
        ({"premise": "a", "label": "neutral"}, r"train\.jsonl:2: the row has no field 'hypothesis', or an empty"),
    ],
)  # fmt: skip
def test_bad_rows_name_their_line(tmp_path, write_rows, tokenizer, row, message):
    write_rows(tmp_path / "CB" / "train.jsonl", [CB_ROWS[0], row])
    with pytest.raises(ValueError, match=message):
        tokenise(load_task("CB"), load("CB", tmp_path), tokenizer, 400)


def test_lone_surrogate_names_its_line(tmp_path, write_rows, tokenizer):
    line = '{"premise": "a \\ud800 b", "hypothesis": "c", "label": "neutral"}'
    write_rows(tmp_path / "CB" / "train.jsonl", [CB_ROWS[0], line])
    with pytest.raises(ValueError, match=r"train\.jsonl:2"):
        tokenise(load_task("CB"), load("CB", tmp_path), tokenizer, 400)


# the hub's layout


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """hub_folder(config, splits, label): a local folder as a hub data set has it; label is its feature."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(config: str, splits: dict, label) -> Path:
        folder = tmp_path / "hub"
        (folder / config).mkdir(parents=True)
        lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            features = {name: datasets.Value("string") for name in rows[0]}
            features.update({name: datasets.Value("int32") for name in rows[0] if name == "idx"})
            features["label"] = label
            table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
            table.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
        return folder

    return write


def same_examples(task: str, jsonl_folder: Path, hub: Path, tokenizer, split: str):
    read = load_task(task)
    files, table = load(task, jsonl_folder, split), load_split(read, split, None, str(hub))
    assert tokenise(read, table, tokenizer, 400) == tokenise(read, files, tokenizer, 400)
    return table


def test_hub_layout_gives_the_files_examples(tmp_path, write_rows, hub_folder, tokenizer):
    import datasets

    numbered = [{**row, "label": CB_NAMES.index(row["label"])} for row in CB_ROWS]
    hub = hub_folder("cb", {"train": numbered, "validation": numbered[1:]}, datasets.ClassLabel(names=CB_NAMES))
    write_rows(tmp_path / "CB" / "train.jsonl", CB_ROWS)
    write_rows(tmp_path / "CB" / "val.jsonl", CB_ROWS[1:])
    table = same_examples("CB", tmp_path, hub, tokenizer, "train")
    assert list(table.where) == [f"{hub}/cb/train row {number}" for number in range(3)]
    assert table.digest == load("CB", tmp_path).digest
    assert len(same_examples("CB", tmp_path, hub, tokenizer, "val").rows) == 2


@pytest.mark.parametrize("names", [None, ["choice1", "choice2"]])
def test_hub_layout_with_whole_numbers_as_labels(tmp_path, write_rows, hub_folder, tokenizer, names):
    import datasets

    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    hub = hub_folder("copa", {"train": COPA_ROWS}, label)
    write_rows(tmp_path / "COPA" / "train.jsonl", COPA_ROWS)
    same_examples("COPA", tmp_path, hub, tokenizer, "train")


def test_hub_layout_with_false_and_true(tmp_path, write_rows, hub_folder, tokenizer):
    import datasets

    rows = [{"question": "is it", "passage": "It is.", "label": 1}, {"question": "is it", "passage": "No.", "label": 0}]
    hub = hub_folder("boolq", {"train": rows}, datasets.ClassLabel(names=["False", "True"]))
    write_rows(tmp_path / "BoolQ" / "train.jsonl", [{**row, "label": bool(row["label"])} for row in rows])
    same_examples("BoolQ", tmp_path, hub, tokenizer, "train")


def test_hub_classes_whose_names_and_numbers_are_both_labels(hub_folder):
    """COPA's labels are 0 and 1: classes named 1 and 2 are told by their numbers, all of them."""
    import datasets

    hub = hub_folder("copa", {"train": COPA_ROWS}, datasets.ClassLabel(names=["1", "2"]))
    rows = load_split(load_task("COPA"), "train", None, str(hub)).rows
    assert [row["label"] for row in rows] == ["0", "1"]


def test_hub_rows_without_a_label_are_refused(hub_folder, tokenizer):
    import datasets

    rows = [{**CB_ROWS[0], "label": 1}, {**CB_ROWS[1], "label": -1}]
    hub = hub_folder("cb", {"test": rows}, datasets.ClassLabel(names=CB_NAMES))
    task = load_task("CB")
    with pytest.raises(ValueError, match=r"/cb/test row 1: label '-1' is not one of"):
        tokenise(task, load_split(task, "test", None, str(hub)), tokenizer, 400)


def test_hub_rows_with_a_null_label_are_refused(hub_folder, tokenizer):
    import datasets

    rows = [{**CB_ROWS[0], "label": 1}, {**CB_ROWS[1], "label": None}]
    hub = hub_folder("cb", {"test": rows}, datasets.ClassLabel(names=CB_NAMES))
    task = load_task("CB")
    with pytest.raises(ValueError, match=r"/cb/test row 1: label 'None' is not one of"):
        tokenise(task, load_split(task, "test", None, str(hub)), tokenizer, 400)


def test_hub_errors_are_one_sentence(tmp_path, hub_folder):
    import datasets

    hub = hub_folder("cb", {"train": [{**CB_ROWS[0], "label": 1}]}, datasets.ClassLabel(names=CB_NAMES))
    for task, split, dataset in (("CB", "val", hub), ("CB", "train", tmp_path / "none")):
        name = {"val": "validation"}.get(split, split)
        message = f"--dataset {dataset}: can't load configuration '{task.lower()}', split '{name}' "
        with pytest.raises(ValueError, match="can't load configuration") as caught:
            load_split(load_task(task), split, None, str(dataset))
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("configuration", ["default", "CB", "c-b"])
def test_the_only_configuration_is_read_whatever_its_name(configuration, hub_folder):
    import datasets

    hub = hub_folder(configuration, {"train": [{**CB_ROWS[0], "label": 1}]}, datasets.ClassLabel(names=CB_NAMES))
    found = load_split(load_task("CB"), "train", None, str(hub))
    assert found.where == [f"{hub}/{configuration}/train row 0"]
    assert found.rows[0]["premise"] == CB_ROWS[0]["premise"]
    with pytest.raises(ValueError, match=f"can't load configuration '{configuration}', split 'validation' "):
        load_split(load_task("CB"), "val", None, str(hub))


def test_of_several_configurations_the_template_s_name_chooses(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub, lines = tmp_path / "hub", ["---", "configs:"]
    for name in ("axb", "axg"):
        (hub / name).mkdir(parents=True)
        row = {"sentence1": f"One of {name}.", "sentence2": "Two.", "label": "entailment"}
        (hub / name / "test.jsonl").write_text(json.dumps(row) + "\n")
        lines += [f"- config_name: {name}", "  data_files:", "  - split: test", f"    path: {name}/test.jsonl"]
    (hub / "README.md").write_text("\n".join([*lines, "---", ""]))
    found = load_split(load_task("AX-b"), "test", None, str(hub))
    assert found.rows[0]["sentence1"] == "One of axb."
    assert found.where == [f"{hub}/axb/test row 0"]
    with pytest.raises(ValueError, match="has the configurations") as caught:
        load_split(load_task("RTE"), "test", None, str(hub))
    assert str(caught.value) == (
        f"--dataset {hub} has the configurations axb, axg, and none is called 'rte': the template's name, in small "
        "letters, says which one is read; give the template the name of one of them."
    )


# held-out rows, batches, hands


@pytest.mark.parametrize(("count", "share", "held"), [(100, 0.15, 15), (2, 0.9, 1), (2, 0.01, 1), (5, 0.999, 4)])
def test_hold_out_parts(count, share, held):
    train, select = hold_out(count, share, seed=3)
    assert len(select) == held
    assert sorted(train + select) == list(range(count))
    assert train == sorted(train)
    assert select == sorted(select)


def test_hold_out_is_seeded():
    assert hold_out(100, 0.2, 1) == hold_out(100, 0.2, 1)
    assert hold_out(100, 0.2, 1) != hold_out(100, 0.2, 2)


def test_hold_out_keeps_groups_together():
    groups = [0, 0, -1, 1, 1, 1, -1, 2, 3, 3, -1]
    train, select = hold_out(len(groups), 0.4, 5, groups)
    assert sorted(train + select) == list(range(len(groups)))
    assert not {groups[n] for n in train if groups[n] >= 0} & {groups[n] for n in select if groups[n] >= 0}


def test_hold_out_needs_two_rows():
    with pytest.raises(ValueError, match="Can't hold out rows for selection from 1 training row; give --select_split"):
        hold_out(1, 0.5, 0)


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_every_row_once_an_epoch(count, batch_size):
    order = BatchOrder(count, batch_size, seed=5)
    epochs = 4
    steps = -(-epochs * count // batch_size)
    seen = [row for step in range(steps) for row in order.batch(step)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_batches_depend_on_seed_and_step_alone():
    forward = [BatchOrder(20, 8, 1).batch(step) for step in range(12)]
    torch.manual_seed(99)
    order = BatchOrder(20, 8, 1)
    assert [order.batch(step) for step in reversed(range(12))] == forward[::-1]
    assert [BatchOrder(20, 8, 2).batch(step) for step in range(12)] != forward
    assert forward[0] != forward[5], "epochs are shuffled anew"


def lengths_of(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 300, (count,), generator=generator).tolist()


@pytest.mark.parametrize(("count", "hands"), [(8, 1), (8, 2), (12, 4), (16, 8), (4, 4)])
def test_dealing_is_equal_complete_and_in_order(count, hands):
    lengths = lengths_of(count, count)
    dealt = deal_rows(lengths, hands)
    assert [len(hand) for hand in dealt] == [count // hands] * hands
    assert sorted(place for hand in dealt for place in hand) == list(range(count))
    assert all(hand == sorted(hand) for hand in dealt)
    assert deal_rows(list(lengths), hands) == dealt


def test_dealing_balances_tokens():
    fullest = {"dealt": 0, "in order": 0}
    for seed in range(20):
        lengths = lengths_of(seed, 16)
        in_order = [list(range(start, start + 4)) for start in range(0, 16, 4)]
        for name, hands in (("dealt", deal_rows(lengths, 4)), ("in order", in_order)):
            fullest[name] += max(sum(lengths[place] for place in hand) for hand in hands)
    mean = sum(sum(lengths_of(seed, 16)) / 4 for seed in range(20))
    assert fullest["dealt"] - mean < 0.25 * (fullest["in order"] - mean)


# batches by token budget

LENGTHS = [7, 3, 12, 5, 9, 4, 30, 6]


@pytest.mark.parametrize("budget", [1, 20, 33, 1000])
def test_budget_batches_are_full_and_miss_no_row(budget):
    order = BudgetOrder(LENGTHS, budget, seed=3)
    batches = [order.batch(step) for step in range(12)]
    drawn = [number for batch in batches for number in batch]
    assert drawn == BatchOrder(len(LENGTHS), 1, seed=3)._rows(0, len(drawn))  # the same rows in the same order
    for batch, following in itertools.pairwise(batches):
        tokens = sum(LENGTHS[number] for number in batch)
        assert tokens <= budget or len(batch) == 1
        assert len(batch) == len(LENGTHS) or tokens + LENGTHS[following[0]] > budget
        assert 1 <= len(batch) <= len(LENGTHS)


def test_a_budget_step_is_found_without_the_steps_before():
    whole = BudgetOrder(LENGTHS, 25, seed=0)
    batches = [whole.batch(step) for step in range(9)]
    assert BudgetOrder(LENGTHS, 25, seed=0).batch(8) == batches[8]
    assert batches != [BudgetOrder(LENGTHS, 25, seed=1).batch(step) for step in range(9)]
