"""Cells of a study that don't belong together are refused: other rows, another template, another task."""

import json
from dataclasses import asdict, replace

import pytest

from ptp_ds.errors import UserError
from ptp_ds.studies.same_rows import require_one_task, require_rows, require_scored_alike
from ptp_ds.studies.study import read_study, rows_of
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import load_split
from ptp_ds.training.examples import split_names

LABELS = {"good": "positive", "bad": "negative"}
ROWS = {
    split: [{"review": f"{word} {split}", "label": label} for word, label in LABELS.items()]
    for split in ("train", "val", "other")
}


@pytest.fixture
def study(tmp_path, write_rows):
    for split, rows in ROWS.items():
        write_rows(tmp_path / "data" / "Reviews" / f"{split}.jsonl", rows)

    def made(plain="{}", noise="{}", tasks="{Reviews: {}}"):
        text = f"settings: {{data_dir: {tmp_path / 'data'}}}\nseeds: 0-1\ntasks: {tasks}\n"
        (tmp_path / "study.yaml").write_text(f"{text}methods: {{plain: {plain}, noise: {noise}}}\n")
        return read_study(str(tmp_path / "study.yaml"))

    return made


@pytest.fixture
def own_templates(tmp_path):
    """own_templates(**changes): a template for each of the two draws, of texts of their own; changes: the second's."""

    def made(**changes):
        for draw, other in (("1", {}), ("2", {"text": "{review}\nAll in all", **changes})):
            spec = {"name": "Reviews", "text": "{review}\nIt was", "truncate": "review", "label": "label",
                    "verbalizers": {"positive": " good", "negative": " bad"}, "metrics": ["accuracy"],
                    **other}  # fmt: skip
            (tmp_path / f"t-{draw}.json").write_text(json.dumps(spec))
        return f'{{Reviews: {{task: "{tmp_path}/t-{{draw}}.json"}}}}\ndraws: [1, 2]'

    return made


def record(cell, out, **changes):
    """population.json of a cell whose runs have just ended."""
    members = []
    for name, run in cell.runs.items():
        task = load_task(run.task)
        rows = {use: load_split(task, split, run.data_dir, None).digest for use, split in split_names(run).items()}
        members.append({"name": name, "settings": asdict(run), "metrics": {"accuracy": 0.5}, "majority": 0.5,
                        "untrained": {"accuracy": 0.5}, "failed": None, "best_step": 1, "steps": 1, "rows": rows,
                        "template": task.spec(), **changes})  # fmt: skip
    cell.folder(out).mkdir(parents=True, exist_ok=True)
    (cell.folder(out) / "population.json").write_text(json.dumps({"members": members}))


def test_rows_that_changed_behind_a_finished_cell(study, tmp_path, write_rows):
    found = study()
    record(found.cells[0], tmp_path)
    require_rows(found, tmp_path)
    write_rows(tmp_path / "data" / "Reviews" / "val.jsonl", ROWS["val"] * 2)
    with pytest.raises(UserError, match=r"Reviews/plain/population\.json was run with other eval rows than the files"):
        require_rows(found, tmp_path)
    require_rows(found.part(["noise"], None), tmp_path)
    spec = load_task("Reviews").spec()
    turned = {**spec, "answers": dict(reversed(spec["answers"].items()))}
    for other in ({"name": "Reviews"}, turned):
        record(found.cells[0], tmp_path, template=other)
        with pytest.raises(UserError, match="other template"):
            require_rows(found, tmp_path)


def test_a_record_that_does_not_tell_its_rows_is_taken(study, tmp_path, write_rows):
    found = study()
    record(found.cells[0], tmp_path)
    file = found.cells[0].folder(tmp_path) / "population.json"
    members = [{k: v for k, v in one.items() if k not in ("rows", "template")}
               for one in json.loads(file.read_text())["members"]]  # fmt: skip
    file.write_text(json.dumps({"members": members}))
    write_rows(tmp_path / "data" / "Reviews" / "val.jsonl", ROWS["val"] * 2)
    require_rows(found, tmp_path)
    assert [row.rows for row in rows_of(found.cells[0], tmp_path)] == [None, None]


def test_methods_that_report_other_rows(study, tmp_path):
    require_rows(study(noise="{train_split: other}"), tmp_path)
    with pytest.raises(UserError, match="Reviews/noise and Reviews/plain report other rows of seed-0"):
        require_rows(study(noise="{eval_split: other}"), tmp_path)
    with pytest.raises(UserError, match=r"Cell Reviews/noise, seed-0: No file .*none"):
        require_rows(study(noise="{train_split: none}"), tmp_path)


def test_methods_of_two_tasks(study):
    require_one_task(study())
    with pytest.raises(UserError, match=r"Reviews/noise is of task COPA \(accuracy\), Reviews/plain of Reviews"):
        require_one_task(study(noise="{task: COPA}"))
    require_one_task(study(plain="{task: RTE}", noise="{task: RTE.pet}", tasks="{RTE: {data_dir: d}}"))


def test_records_that_were_scored_on_other_rows(study, tmp_path):
    cells = study().cells
    for cell in cells:
        record(cell, tmp_path)
    rows = [row for cell in cells for row in rows_of(cell, tmp_path)]
    require_scored_alike(rows)
    other = [*rows[:-1], replace(rows[-1], rows={"train": "a", "eval": "b"})]
    with pytest.raises(UserError, match="Reviews/noise and Reviews/plain were scored on other rows of seed 1"):
        require_scored_alike(other)
    require_scored_alike([*rows[:-1], replace(rows[-1], rows=None)])


def test_a_template_that_changes_while_the_process_lives(study, tmp_path):
    """As in a notebook that starts a study twice."""
    file = tmp_path / "own.json"
    spec = {"name": "Reviews", "text": "{review}\nIt was", "truncate": "review", "label": "label",
            "verbalizers": {"positive": " good", "negative": " bad"}, "metrics": ["accuracy"]}  # fmt: skip
    file.write_text(json.dumps(spec))
    found = study(tasks=f"{{Reviews: {{task: {file}}}}}")
    record(found.cells[0], tmp_path)
    require_rows(found, tmp_path)
    file.write_text(json.dumps({**spec, "text": "{review}\nAll in all"}))
    with pytest.raises(UserError, match="other template"):
        require_rows(found, tmp_path)


def test_a_template_for_each_draw(study, tmp_path, own_templates):
    """Each seed's record is compared with that seed's template."""
    found = study(tasks=own_templates())
    require_one_task(found)
    record(found.cells[0], tmp_path)
    require_rows(found, tmp_path)
    own_templates(text="{review}\nTo sum up")
    with pytest.raises(UserError, match="other template"):
        require_rows(found, tmp_path)


def test_seeds_of_two_tasks(study, own_templates):
    found = study(tasks=own_templates(name="Films"))
    with pytest.raises(UserError, match=r"Reviews/plain, seed-1, is of task Films \(accuracy\), Reviews/plain of Rev"):
        require_one_task(found)
