"""What a study file may say, and the tables over its rows."""

import json
from dataclasses import asdict, replace

import pytest

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.studies.report import ALL, Cells, markdown, write_csv
from ptp_ds.studies.study import Row, finished, read_study, rows_of, with_one_batch
from ptp_ds.tasks.template import load_task
from tests.support.paths import ROOT

STUDY = """
settings: {model: MODEL, max_steps: 3, lr: 1e-2}
seeds: 0-2
draws: [13, 21]
tasks:
  SST2: {task: Reviews, data_dir: D, train_split: "few-{draw}", select_split: "dev-{draw}"}
  COPA: {task: COPA, max_steps: 4}
methods:
  plain: {perturbation: none}
  noise: {perturbation: gaussian, sigma: 0.5, max_steps: 2}
  smart: {preset: smart}
"""


def written(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    return str(tmp_path / "study.yaml")


def test_a_study_is_its_cells(tmp_path):
    study = read_study(written(tmp_path, STUDY))
    assert (study.tasks, study.methods, study.baseline) == (["SST2", "COPA"], ["plain", "noise", "smart"], "plain")
    cells = {cell.name: cell for cell in study.cells}
    noise = cells["SST2/noise"]
    assert (noise.run.lr, noise.run.max_steps, noise.run.sigma, noise.run.data_dir) == (0.01, 2, 0.5, "D")
    assert noise.members == {
        "seed-0": {"seed": 0, "train_split": "few-13", "select_split": "dev-13"},
        "seed-1": {"seed": 1, "train_split": "few-21", "select_split": "dev-21"},
        "seed-2": {"seed": 2, "train_split": "few-13", "select_split": "dev-13"},
    }
    assert cells["COPA/noise"].run.max_steps == 4, "a task's settings win"
    assert cells["COPA/smart"].run.divergence == "sym_kl"
    assert study.part(["noise"], None).tasks == ["SST2", "COPA"]
    with pytest.raises(
        UserError, match=r"--methods nose: the study has plain, noise, smart \(did you mean 'noise'\?\)"
    ):
        study.part(["nose"], None)


def test_a_task_without_a_template_is_the_built_in_one_of_its_name(tmp_path):
    text = "tasks: {CB: {}, RTE.pet: {train_split: a}}\nmethods: {plain: {}}"
    assert [cell.run.task for cell in read_study(written(tmp_path, text)).cells] == ["CB", "RTE.pet"]
    shared = f"settings: {{task: COPA}}\n{text}"
    assert [cell.run.task for cell in read_study(written(tmp_path, shared)).cells] == ["COPA", "COPA"]


def test_prompts_that_start_as_text_begin_at_their_task_s_instruction(tmp_path):
    """A cell's settings are then those that its runs have on record; words of its own win; a task without is named."""
    methods = "methods: {plain: {}, text: {prompt_init: text}, own: {prompt_init: text, init_text: Go on.}}"
    cells = {
        cell.name: cell for cell in read_study(written(tmp_path, f"tasks: {{CB: {{}}, COPA: {{}}}}\n{methods}")).cells
    }
    words = {name: {run.init_text for run in cell.runs.values()} for name, cell in cells.items()}
    assert words["CB/plain"] == {None}
    assert words["CB/text"] == {load_task("CB").instruction} != words["COPA/text"]
    assert words["CB/own"] == words["COPA/own"] == {"Go on."}
    bare = {"name": "Bare", "text": "{line}:", "label": "tone", "verbalizers": {"a": " a", "b": " b"}}
    (tmp_path / "bare.json").write_text(json.dumps({**bare, "metrics": ["accuracy"]}))
    text = f"tasks: {{Bare: {{task: {tmp_path / 'bare.json'}}}}}\n{methods}"
    with pytest.raises(UserError, match=r"study\.yaml: text on Bare: --prompt_init text begins at .* Bare has none"):
        read_study(written(tmp_path, text))


def test_cells_that_give_no_batch_size_have_one(tmp_path):
    """On 6 ranks, in 1 and 4 micro-batches each; what has begun in the folder goes on with its own, on any ranks."""
    text = STUDY.replace("noise: {", "noise: {gradient_accumulation_steps: 4, ").replace(
        "smart: {", "smart: {batch_size: 60, "
    )
    study = read_study(written(tmp_path, text))
    assert {cell.run.batch_size for cell in with_one_batch(study, tmp_path, 1).cells} == {8, 60}
    cells = {cell.name: cell for cell in with_one_batch(study, tmp_path, 6).cells}
    assert [cells[f"SST2/{name}"].run.batch_size for name in study.methods] == [24, 24, 60]
    assert all("batch_size" in cell.explicit for cell in cells.values())
    begun = cells["COPA/noise"].folder(tmp_path) / "members" / "seed-0"
    begun.mkdir(parents=True)
    (begun / "config.json").write_text(json.dumps({"run": {"batch_size": 24}}))
    assert {cell.run.batch_size for cell in with_one_batch(study, tmp_path, 1).cells} == {24, 60}


@pytest.mark.parametrize(
    ("common", "method", "task", "expected"),
    [
        ("{sigma: 0.3, reg_weight: 2}", "{preset: ptp-rn}", "{}", ("gaussian", 1.0, 1.0, "ptp-rn")),
        ("{}", "{perturbation: gaussian, sigma: 0.3}", "{preset: ptp-adv}", ("pgd", 0.3, 1.0, "ptp-adv")),
        ("{preset: vat}", "{preset: ptp-rn, sigma: 2.0}", "{reg_weight: 3}", ("gaussian", 2.0, 3.0, "ptp-rn")),
        ("{preset: ptp-rn}", "{perturbation: uniform}", "{}", ("uniform", 1.0, 1.0, "ptp-rn")),
        ("{preset: vat}", "{preset: null}", "{}", ("gaussian", 1.0, 1.0, None)),
    ],
)
def test_a_layers_preset_wins_over_what_is_below(tmp_path, common, method, task, expected):
    text = f"settings: {common}\ntasks: {{CB: {task}}}\nmethods: {{m: {method}}}"
    (cell,) = read_study(written(tmp_path, text)).cells
    run = cell.run
    assert (run.perturbation, run.sigma, run.reg_weight, run.preset) == expected
    assert run.units == "relative", "nothing of a preset that another one replaces"
    assert "divergence" not in cell.explicit, "what a preset sets was not written"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: Reviews, ", "", "tasks: SST2 is no built-in task; say which one it is of, by `task: NAME`"),
        ("settings:", "setings:", r"unknown key 'setings' \(did you mean 'settings'\?\)"),
        ("lr: 1e-2", "lr: fast", "settings: 'lr' must be float, not 'fast'"),
        ("lr: 1e-2", "seed: 3", "settings: unknown setting 'seed'"),
        ("lr: 1e-2", "lr: -1", "plain on SST2: --lr is -1.0; expected a finite number above 0"),
        ("seeds: 0-2", "seeds: 2-0", "seeds '2-0': '2-0' is no seed"),
        ("seeds: 0-2", "seeds: [0, 0]", "seeds '0 0': expected 1 to 1000 seeds, each once"),
        ("seeds: 0-2", "seeds: {a: 1}", "expected seeds such as 0-9"),
        ("draws: [13, 21]", "", r"SST2: train_split has \{draw\}, and there are no draws"),
        ("draws: [13, 21]", "draws: few", "draws is 'few'; expected a list"),
        ("data_dir: D", 'prompt: "{draw}"', "'prompt' is '{draw}'; choose from soft, deep"),
        ("plain: {perturbation: none}", "a/b: {}", "methods: a name"),
        ("plain: {", "plain: {push_to_hub: me/it, ", "plain on SST2: --push_to_hub pushes one prompt"),
        ("plain: {", "plain: {precision: fp16, ", "plain on SST2: --precision fp16 scales one run's loss"),
        ("methods:", "baseline: best\nmethods:", "baseline is 'best'; expected one of plain, noise, smart"),
    ],
)
def test_wrong_studies_are_one_sentence(tmp_path, old, new, message):
    assert old in STUDY
    with pytest.raises(UserError, match=f"^Study .*{message}"):
        read_study(written(tmp_path, STUDY.replace(old, new)))


def test_a_study_needs_tasks_and_methods(tmp_path):
    for text in ("[]", "{}", "tasks: {a: {}}", "methods: {a: }\ntasks: {}"):
        with pytest.raises(UserError, match=r"^Study "):
            read_study(written(tmp_path, text))


def record(cell, tmp_path, **changes):
    """population.json of a cell, as its population would have written it."""
    members = [
        {"name": name, "task": "t", "settings": {**asdict(replace(cell.run, **own)), **changes},
         "metrics": {"accuracy": 0.5 + 0.1 * own["seed"], "f1": 0.5}, "untrained": {"accuracy": 0.25}, "majority": 0.5,
         "best_step": 2, "steps": 3, "failed": None}
        for name, own in cell.members.items()
    ]  # fmt: skip
    members[-1] |= {"metrics": None, "failed": "The loss is not finite at step 2"}
    folder = cell.folder(tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "population.json").write_text(json.dumps({"members": members}))


def test_finished_cells_are_known_by_their_settings(tmp_path):
    cell = read_study(written(tmp_path, STUDY)).cells[1]
    assert not finished(cell, tmp_path)
    record(cell, tmp_path, output_dir="elsewhere", resume="auto")
    assert finished(cell, tmp_path)
    rows = rows_of(cell, tmp_path)
    assert [(row.seed, row.score) for row in rows] == [(0, 0.5), (1, pytest.approx(0.55)), (2, None)]
    assert rows[2].failed.startswith("The loss")
    record(cell, tmp_path, sigma=2.0)
    with pytest.raises(UserError, match=r"was run with sigma 2\.0, the study says 0\.5; give another --output_dir"):
        finished(cell, tmp_path)
    record(cell, tmp_path)
    file = cell.folder(tmp_path) / "population.json"
    found = json.loads(file.read_text())
    for one in found["members"]:
        del one["settings"]["reg_schedule"], one["settings"]["divergence_gradient"]
    file.write_text(json.dumps(found))
    before = replace(cell, run=replace(cell.run, divergence_gradient="both"))
    assert finished(before, tmp_path), "what older versions did"
    for other in ({"reg_schedule": "linear"}, {"divergence_gradient": "clean_fixed"}):
        with pytest.raises(UserError, match=f"was run with {next(iter(other))} '(constant|both)', the study says"):
            finished(replace(before, run=replace(before.run, **other)), tmp_path)
    (cell.folder(tmp_path) / "population.json").write_text('{"members": 3}')
    with pytest.raises(UserError, match="no record of a population"):
        finished(cell, tmp_path)
    assert isinstance(cell.run, RunConfig)


def row(task, method, seed, score, failed=None):
    metrics = None if score is None else {"accuracy": score}
    nats = None if score is None else 2 * score
    return Row(task, method, seed, metrics, {"accuracy": 0.25}, 0.5, failed, {"lr": 0.1}, None, 2, 3, None, None, nats)


def test_tables_of_a_small_study(tmp_path):
    rows = [
        *(row("A", "plain", seed, score) for seed, score in enumerate((0.5, 0.6, 0.7))),
        *(row("A", "noise", seed, score) for seed, score in enumerate((0.6, 0.65, 0.7))),
        *(row("B", "plain", seed, score) for seed, score in enumerate((0.4, 0.5, 0.6))),
        row("B", "noise", 0, 0.5), row("B", "noise", 1, None, "The loss is not finite at step 2"),
        row("B", "noise", 2, 0.7),
    ]  # fmt: skip
    cells = Cells(rows, ["A", "B"], ["plain", "noise"], "plain")
    text = markdown(cells, "study", ["A.png"])
    assert "| A | plain | 3 | 0.600 | 0.100 | 0.500 | 0.100 | 1.200 | 0 | 0.250 | 0.500 |" in text
    assert "| B | noise | 3 | 0.600 | 0.141 | 0.500 | 0.100 | 1.200 | 1 | 0.250 | 0.500 |" in text
    assert f"| {ALL} | noise | | 0.625 | 0.096 | 0.550 | 0.075 | | | | |" in text
    found = cells.comparison("A", "noise")
    assert (found.pairs, found.gain) == (3, pytest.approx(0.05))
    assert "| A | noise | 3 | +0.050 |" in text
    assert "| B | noise | 2 | +0.100 |" in text, "the seed that failed has no pair"
    assert cells.comparison(ALL, "noise").pairs == 5
    assert "![A](A.png)" in text
    write_csv(tmp_path / "rows.csv", rows)
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[0] == "task,method,seed,score,cross_entropy,untrained,majority,best_step,steps,seconds,failed,accuracy"
    assert lines[11] == "B,noise,1,,,0.25,0.5,2,3,,The loss is not finite at step 2,"


def test_the_majority_beside_a_score_is_a_mean_of_metrics(tmp_path):
    """An older run tells its accuracy alone, which is no score where there are other metrics."""
    two = {"accuracy": 0.5, "macro_f1": 0.25}
    new = replace(row("A", "plain", 0, 0.5), metrics=two, untrained=two, majority_metrics={**two, "macro_f1": 1 / 3})
    old = replace(new, majority_metrics=None)
    for rows, shown, cell in (([new], "0.417", new.majority_score), ([old], "-", None)):
        assert f"| A | plain | 1 | 0.375 | - | 0.375 | 0.000 | 1.000 | 0 | 0.375 | {shown} |" in markdown(
            Cells(rows, ["A"], ["plain"], "plain"), "study"
        )
        write_csv(tmp_path / "rows.csv", rows)
        assert (tmp_path / "rows.csv").read_text().splitlines()[1].split(",")[6] == ("" if cell is None else str(cell))
    assert new.majority_score == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert row("A", "plain", 0, 0.5).majority_score == 0.5


def test_all_tasks_are_every_task(tmp_path):
    """A method that has run on one task of two, or has no pair on one, is not told of all tasks."""
    rows = [row(task, "plain", seed, 0.5) for task in "AB" for seed in range(3)]
    rows += [row("A", method, seed, 0.6) for method in ("noise", "both") for seed in range(3)]
    rows += [row("B", "both", 0, 0.7), row("B", "failing", 0, None, "The loss is not finite at step 2")]
    rows += [row("A", "failing", 0, 0.6)]
    text = markdown(Cells(rows, ["A", "B"], ["plain", "noise", "both", "failing"], "plain"), "study")
    _, compared = text.split("Against plain")
    lines = [line.split(" | ")[:3] for line in compared.splitlines() if line.startswith("| ")][1:]
    assert lines == [
        ["| A", "noise", "3"], ["| A", "both", "3"], ["| B", "both", "1"], [f"| {ALL}", "both", "4"],
        ["| A", "failing", "1"],
    ]  # fmt: skip


def test_the_docs_study_is_the_file_that_they_name():
    file = ROOT / "docs" / "small_study.yaml"
    study = read_study(str(file))
    assert [cell.name for cell in study.cells] == ["Reviews/plain", "Reviews/noise"]
    shown = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    text = (ROOT / "docs" / "studies.md").read_text().splitlines()
    start = text.index(f"    {shown[0]}")
    assert [line[4:] for line in text[start : start + len(shown)]] == shown
