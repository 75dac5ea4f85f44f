"""SuperGLUE's flat rows on the hub are read as the official files' nested ones: the same examples and prediction files.

The rows are laid flat here as the hub's loading script does it (its version 1.0.3): a row an answer of MultiRC and a
query of ReCoRD, WSC's spans beside the text, entities with the place behind them, labels as numbers, -1 for none.
"""

import copy
import json
from pathlib import Path

import datasets
import pytest

from ptp_ds.api.data import rows_by_split, rows_of
from ptp_ds.errors import UserError
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import Split, is_labelled, load_split, tokenise
from ptp_ds.tasks.hub_rows import official_rows
from ptp_ds.tasks.predictions import prediction_lines

MANY = 100_000  # tokens of a row; nothing is cut
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int32")
TRUTH = datasets.ClassLabel(names=["False", "True"])
FEATURES = {
    "WSC": {"text": TEXT, "span1_index": NUMBER, "span2_index": NUMBER, "span1_text": TEXT, "span2_text": TEXT,
            "idx": NUMBER, "label": TRUTH},
    "MultiRC": {"paragraph": TEXT, "question": TEXT, "answer": TEXT,
                "idx": {"paragraph": NUMBER, "question": NUMBER, "answer": NUMBER}, "label": TRUTH},
    "ReCoRD": {"passage": TEXT, "query": TEXT, "entities": datasets.List(TEXT),
               "entity_spans": {"text": datasets.List(TEXT), "start": datasets.List(NUMBER),
                                "end": datasets.List(NUMBER)},
               "answers": datasets.List(TEXT), "idx": {"passage": NUMBER, "query": NUMBER}},
}  # fmt: skip
ROWS = {
    "WSC": [
        {"text": "Ann told the old doctor that she was late.", "idx": 4, "label": True,
         "target": {"span1_index": 0, "span1_text": "Ann", "span2_index": 6, "span2_text": "she"}},
        {"text": "Ann told the old doctor that she was late.", "idx": 5, "label": False,
         "target": {"span1_index": 3, "span1_text": "old doctor", "span2_index": 6, "span2_text": "she"}},
    ],
    "MultiRC": [
        {"idx": 7, "passage": {"text": "Ann sleeps. Bo reads.", "questions": [
            {"idx": 20, "question": "Who sleeps?", "answers": [
                {"idx": 90, "text": "Ann", "label": 1}, {"idx": 91, "text": "Bo", "label": 0}]},
            {"idx": 21, "question": "Who reads?", "answers": [{"idx": 92, "text": "Bo", "label": 1}]}]}},
        {"idx": 8, "passage": {"text": "It rains.", "questions": [
            {"idx": 22, "question": "Who sleeps?", "answers": [{"idx": 93, "text": "nobody", "label": 0}]}]}},
    ],
    "ReCoRD": [
        {"idx": 3, "passage": {"text": "Bo and Ann met.\n@highlight\nAnn left", "entities": [
            {"start": 27, "end": 29}, {"start": 7, "end": 9}, {"start": 0, "end": 1}]},
         "qas": [{"idx": 30, "query": "So @placeholder went home.", "answers": [
                     {"start": 27, "end": 29, "text": "Ann"}, {"start": 7, "end": 9, "text": "Ann"}]},
                 {"idx": 31, "query": "And (@placeholder) sat.", "answers": [{"start": 0, "end": 1, "text": "Bo"}]}]},
        {"idx": 9, "passage": {"text": "Cy slept.", "entities": [{"start": 0, "end": 1}]},
         "qas": [{"idx": 32, "query": "@placeholder woke.", "answers": [{"start": 0, "end": 1, "text": "Cy"}]}]},
    ],
}  # fmt: skip


def laid_flat(name: str, rows: list[dict]) -> list[dict]:
    found = []
    for row in rows:
        if name == "WSC":
            found.append({"text": row["text"], **row["target"], "idx": row["idx"], "label": int(row.get("label", -1))})
        elif name == "MultiRC":
            found += [
                {"paragraph": row["passage"]["text"], "question": question["question"], "answer": answer["text"],
                 "label": answer.get("label", -1),
                 "idx": {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]}}
                for question in row["passage"]["questions"] for answer in question["answers"]
            ]  # fmt: skip
        else:
            text = row["passage"]["text"]
            spans = sorted(
                ((one["start"], one["end"] + 1) for one in row["passage"]["entities"]), key=lambda one: one[0]
            )
            names = [text[start:end] for start, end in spans]
            columns = {"text": names, "start": [start for start, _ in spans], "end": [end for _, end in spans]}
            found += [
                {"passage": text, "query": query["query"], "entities": sorted(set(names)), "entity_spans": columns,
                 "answers": sorted({answer["text"] for answer in query.get("answers", ())}),
                 "idx": {"passage": row["idx"], "query": query["idx"]}}
                for query in row["qas"]
            ]  # fmt: skip
    return found


def unlabelled(rows: list[dict]) -> list[dict]:
    rows = copy.deepcopy(rows)
    for row in rows:
        row.pop("label", None)
        for query in row.get("qas", ()):
            del query["answers"]
        for question in row.get("passage", {}).get("questions", ()):
            for answer in question["answers"]:
                del answer["label"]
    return rows


def table_of(name: str, rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(laid_flat(name, rows), features=datasets.Features(FEATURES[name]))


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """on_hub(task, rows): the rows' table as a folder in the hub's parquet layout, its split train read as a split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def read(name: str, rows: list[dict]) -> Split:
        folder, part = tmp_path / "hub", name.lower()
        table_of(name, rows).to_parquet(folder / part / "train-00000-of-00001.parquet")
        lines = ["---", "configs:", f"- config_name: {part}", "  data_files:", "  - split: train",
                 f"    path: {part}/train-*", "---", ""]  # fmt: skip
        (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
        return load_split(load_task(name), "train", None, str(folder))

    return read


def official(rows: list[dict]) -> Split:
    return Split(rows, [f"row {number}" for number in range(len(rows))], "")


def require_same(name: str, hub: Split, rows: list[dict], tokenizer) -> None:
    """Examples, so golds, groups and options, and the lines of a prediction file, are those of the official rows."""
    task, labelled = load_task(name), is_labelled(load_task(name), official(rows))
    assert is_labelled(task, hub) == labelled
    found = tokenise(task, hub, tokenizer, MANY, labelled)
    assert found == tokenise(task, official(rows), tokenizer, MANY, labelled)
    chosen = [example.index % len(example.candidate_ids) for example in found.examples]
    assert prediction_lines(task, hub, chosen) == prediction_lines(task, official(rows), chosen)


@pytest.mark.parametrize("labels", ["with", "without"])
@pytest.mark.parametrize("name", ROWS)
def test_flat_rows_give_the_official_examples(name, labels, on_hub, tokenizer):
    rows = ROWS[name] if labels == "with" else unlabelled(ROWS[name])
    require_same(name, on_hub(name, rows), rows, tokenizer)


@pytest.mark.parametrize(
    ("name", "file"),
    [("WSC", "superglue/WSC/val"), ("MultiRC", "superglue/MultiRC/val"), ("ReCoRD", "fewglue/ReCoRD/dev32")],
)
def test_the_real_rows_laid_flat_give_the_official_examples(name, file, superglue, on_hub, tokenizer):
    text = Path(superglue.parent / f"{file}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()][:20]
    require_same(name, on_hub(name, rows), rows, tokenizer)


def test_a_place_names_the_tables_rows(on_hub):
    places = on_hub("MultiRC", ROWS["MultiRC"]).where
    assert [place.rpartition("/")[2] for place in places] == ["train rows 0 to 2", "train row 3"]
    assert [place.rpartition("/")[2] for place in on_hub("WSC", ROWS["WSC"]).where] == ["train row 0", "train row 1"]


@pytest.mark.parametrize("name", ROWS)
def test_rows_out_of_order_are_joined_by_their_numbers(name):
    flat = laid_flat(name, ROWS[name])
    mixed = [flat[0], flat[-1], *flat[1:-1]]
    joined, _ = official_rows(mixed, load_task(name).reader, "table")
    in_order, _ = official_rows(flat, load_task(name).reader, "table")
    assert sorted(map(json.dumps, joined)) == sorted(map(json.dumps, in_order))


@pytest.mark.parametrize("name", ROWS)
def test_official_rows_stay_as_they_are(name):
    joined, places = official_rows(ROWS[name], load_task(name).reader, "table")
    assert joined is ROWS[name]
    assert places == ["table row 0", "table row 1"]


def test_other_spellings_of_spans():
    """By rows in the place of columns, as a program's own list of dicts may have them."""
    flat = laid_flat("ReCoRD", ROWS["ReCoRD"])
    by_row = []
    for row in flat:
        starts, ends = row["entity_spans"]["start"], row["entity_spans"]["end"]
        spans = [{"start": start, "end": end} for start, end in zip(starts, ends, strict=True)]
        by_row.append({**row, "entity_spans": spans})
    assert official_rows(by_row, "record", "table") == official_rows(flat, "record", "table")


@pytest.mark.parametrize("name", ROWS)
def test_a_table_in_memory_gives_the_official_examples(name, tokenizer):
    task, table = load_task(name), table_of(name, ROWS[name])
    by_split = rows_by_split({"train": table, "val": table}, task, ("train", "val"), 0)
    require_same(name, official(by_split["train"]), ROWS[name], tokenizer)
    asked = rows_of(table_of(name, unlabelled(ROWS[name])), task)
    require_same(name, official(asked), unlabelled(ROWS[name]), tokenizer)
    (one,) = rows_of(laid_flat(name, ROWS[name])[0], task)
    assert task.entries(one, "here")[0] == task.entries(ROWS[name][0], "here")[0]


@pytest.mark.parametrize("idx", [3, None, {"paragraph": 1, "question": 2}])
def test_rows_without_the_numbers_that_join_them_are_refused(idx):
    rows = [{**row, "idx": idx} for row in laid_flat("MultiRC", ROWS["MultiRC"])]
    with pytest.raises(UserError, match=r"^hub/x/train row 0: idx is .*; expected the whole numbers paragraph, quest"):
        official_rows(rows, "multirc", "hub/x/train")


@pytest.mark.parametrize("spans", [None, {}, [], {"start": [0], "end": ["a"]}, [3], "a"])
def test_entities_without_their_places_are_refused(spans):
    """Copies of before the script's version 1.0.3 have texts of entities alone."""
    rows = [{**row, "entity_spans": spans} for row in laid_flat("ReCoRD", ROWS["ReCoRD"])]
    with pytest.raises(UserError, match=r"^table row 0: the row has no entity_spans .*files with --data_dir\.$"):
        official_rows(rows, "record", "table")
    for row in rows:
        del row["entity_spans"]
    with pytest.raises(UserError, match="no entity_spans"):
        official_rows(rows, "record", "table")


def test_what_is_wrong_with_a_flat_row_names_its_place():
    (row,), (place,) = official_rows([{**laid_flat("WSC", ROWS["WSC"])[0], "span1_text": None}], "wsc", "hub/wsc/train")
    with pytest.raises(UserError, match=r"^hub/wsc/train row 0: the row has no text in target\.span1_text"):
        load_task("WSC").entries(row, place)
