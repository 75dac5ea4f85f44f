"""scripts/evaluate.py and predict.py know the run that an adapter comes from: nothing but --adapter need be given."""

import dataclasses
import json
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ptp_ds.adapters.origin import adapter_rows
from ptp_ds.adapters.served import alone, serve, whole
from ptp_ds.commands.evaluate import _write, main
from ptp_ds.commands.overall import group_results, read_result, table_of
from ptp_ds.commands.predict import main as predict
from ptp_ds.config.flags import parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import Split, load_split
from ptp_ds.training.evaluate import evaluation_of
from tests.support.zygote import run_script

pytestmark = pytest.mark.usefixtures("no_launcher")


def script(name: str, argv: list, cwd: Path) -> subprocess.CompletedProcess:
    done = run_script(name, argv, cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A folder with `model`, `data` (CB: 12 rows to train on, 7 to report) and `run`, trained with relative paths."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_model, folder / "model")
    (folder / "data" / "CB").mkdir(parents=True)
    for split, count in (("train", 12), ("dev", 7)):
        rows = [
            {"premise": f"It rains for {n} {split} days.", "hypothesis": "It is wet.", "label": label}
            for n, label in zip(range(count), ("entailment", "neutral", "contradiction") * 4, strict=False)
        ]
        (folder / "data" / "CB" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", "model", "--data_dir", "data", "--task", "CB", "--eval_split", "dev", "--max_steps", 2,
             "--prompt_length", 4, "--batch_size", 4, "--perturbation", "none", "--max_length", 60, "--seed", 3,
             "--lr", 0.3, "--output_dir", "run"]  # fmt: skip
    script("train.py", flags, folder)
    return folder


@pytest.fixture
def refuse(trained, tmp_path, monkeypatch, capfd):
    """refuse(argv) checks that evaluate.py refuses before it starts processes, and returns the sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "ptp_ds.commands.evaluate.start_processes", lambda: pytest.fail("a bad command must not start processes")
    )

    def run(argv: list[str]) -> str:
        assert main(argv) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return run


def test_the_adapter_alone_gives_the_run_s_scores(trained, tmp_path):
    report = tmp_path / "again" / "result.json"
    done = script("evaluate.py", ["--adapter", trained / "run", "--json", report], tmp_path)
    found, result = json.loads(report.read_text()), json.loads((trained / "run" / "result.json").read_text())
    assert found["metrics"] == result["metrics"]
    assert found["cross_entropy"] == result["eval_cross_entropy"]
    assert found["untrained"] == result["untrained"]
    assert f"untrained accuracy {result['untrained']['accuracy']:.4f}" in done.stdout
    assert (found["examples"], found["split"]) == (7, "dev")
    assert "CB dev (7 rows): " in done.stdout
    assert f"data of the adapter's run: {trained / 'data'}\n" in done.stdout
    assert found["settings"] == result["settings"]
    assert found["template"] == json.loads((trained / "run" / "config.json").read_text())["task"]
    assert found["model"] == result["model"] == "model"
    assert read_result(str(report.parent)).seed == 3


def test_overall_tells_the_same_tables_of_evaluate_s_files(trained, tmp_path):
    """Two runs of other training rows stay apart; scores that were made with other settings than the run's say so."""
    for seed, digest in ((3, "a" * 64), (4, "b" * 64)):
        run = tmp_path / f"run{seed}"
        shutil.copytree(trained / "run", run)
        card = json.loads((run / "adapter" / "ptp_ds.json").read_text())
        card["result"] |= {"seed": seed, "training_data_sha256": digest}
        (run / "adapter" / "ptp_ds.json").write_text(json.dumps(card))
        (run / "result.json").write_text(json.dumps(card["result"]))

    def scored(seed: int, *more: str) -> Path:
        file = tmp_path / f"again{len(list(tmp_path.iterdir()))}" / "result.json"
        assert main(["--adapter", str(tmp_path / f"run{seed}"), "--json", str(file), *more]) == 0
        return file.parent

    def tables(*folders: Path) -> list[dict]:
        return [table_of(*found) for found in group_results(read_result(str(folder)) for folder in folders)]

    again = [scored(seed) for seed in (3, 4)]
    assert [table["settings"] for table in tables(*again)] == [{"training_data_sha256": one * 8} for one in "ab"]
    assert tables(*again) == tables(tmp_path / "run3", tmp_path / "run4")
    other = scored(3, "--max_length", "50", "--precision", "bf16", "--task", "CB.pet")
    settings = json.loads((other / "result.json").read_text())["settings"]
    assert (settings["max_length"], settings["precision"], settings["task"]) == (50, "bf16", "CB.pet")
    assert settings | {"max_length": 60, "precision": "auto", "task": "CB"} == read_settings(trained / "run")
    assert len(tables(again[0], other)) == 2


def read_settings(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())["settings"]


def test_every_rank_ends_where_rank_0_can_not_write(tmp_path):
    """None is left waiting for it; only rank 0 knows why."""
    (tmp_path / "file").write_text("")
    args = Namespace(json=str(tmp_path / "file" / "new" / "a.json"), predictions=None)
    for rank, message in enumerate((r"a\.json can't be written \(Not a directory\); make room", "^Another rank can't")):
        ranks = SimpleNamespace(is_main=rank == 0, host_max=lambda failed, rank=rank: max(failed, rank))
        with pytest.raises(UserError, match=message):
            _write(args, ranks, {}, Split([], [], ""), load_task("CB"), torch.zeros(0, 3))


@pytest.fixture
def shows_untrained(tmp_path, monkeypatch, capsys):
    """shows_untrained(argv): whether evaluate.py shows an untrained score, and what it warns of; the model is left
    out."""
    monkeypatch.setattr("ptp_ds.adapters.served.Served.load", lambda *rest: None)
    monkeypatch.setattr("ptp_ds.adapters.served.Served.score", lambda self, _, examples, *rest: torch.zeros(7, 3))
    monkeypatch.setattr("ptp_ds.commands.evaluate.start_processes", alone)
    monkeypatch.setattr("ptp_ds.ranks.distributed.Ranks.barrier", lambda self: None)

    def run(*argv) -> tuple[bool, str]:
        assert main([*map(str, argv), "--json", str(tmp_path / "out.json")]) == 0
        printed = capsys.readouterr()
        shown = "untrained" in json.loads((tmp_path / "out.json").read_text())
        assert ("|  untrained" in printed.out) == shown
        return shown, printed.err

    return run


@pytest.mark.parametrize(
    ("flags", "shown"),
    [([], True), (["--task", "CB"], True), (["--max_length", "60"], True), (["--max_length", "50"], False),
     (["--task", "CB.pet"], False)],
)  # fmt: skip
def test_the_untrained_score_is_of_the_same_rows_read_alike(trained, flags, shown, shows_untrained):
    """CB.pet has CB's name, rows and answers, and another text."""
    assert shows_untrained("--adapter", trained / "run", *flags)[0] == shown


def test_the_untrained_score_is_of_these_very_rows(trained, tmp_path, shows_untrained):
    """As many rows of the same split with another label are other rows, and the same ones elsewhere are the same."""
    run, data = (Path(shutil.copytree(trained / name, tmp_path / name)) for name in ("run", "data"))
    card, rows = run / "adapter" / "ptp_ds.json", data / "CB" / "dev.jsonl"
    card.write_text(card.read_text().replace(str(trained / "data"), str(data)))
    assert shows_untrained("--adapter", run) == (True, "")
    assert shows_untrained("--adapter", run, "--data_dir", trained / "data") == (True, "")
    rows.write_text(rows.read_text().replace("entailment", "neutral", 1))
    shown, warned = shows_untrained("--adapter", run)
    assert not shown
    assert "split 'dev' holds other rows than the run of adapter" in warned
    assert shows_untrained("--adapter", run, "--data_dir", data) == (False, "")
    assert shows_untrained("--adapter", run, "--data_dir", trained / "data") == (True, "")


def test_an_older_run_doesn_t_say_which_rows_it_scored(trained, tmp_path, shows_untrained):
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    card = json.loads((run / "adapter" / "ptp_ds.json").read_text())
    assert card["result"].pop("rows").keys() == {"train", "eval"}
    (run / "adapter" / "ptp_ds.json").write_text(json.dumps(card))
    assert shows_untrained("--adapter", run) == (False, "")


def test_a_run_that_was_moved_takes_its_data_and_template_along(tiny_model, tmp_path, monkeypatch, capfd):
    """Another run in its old place is not scored for it, and its settings train on."""
    from ptp_ds.api.run import train

    monkeypatch.chdir(tmp_path)
    template = {"name": "Tone", "text": "{line}\nTone:", "label": "tone", "metrics": ["accuracy"],
                "verbalizers": {"warm": " warm", "cold": " cold"}}  # fmt: skip

    def rows(word: str) -> list[dict[str, str]]:
        return [{"line": f"{word} {n}.", "tone": ("warm", "cold")[n % 2]} for n in range(10)]

    settings = {"model": str(tiny_model), "task": template, "max_steps": 2, "prompt_length": 3, "batch_size": 2}
    first = train(data=rows("Yes"), output_dir="r/tone", perturbation="none", verbose=False, **settings)
    Path("r/tone").rename("r/old")
    train(data=rows("No"), output_dir="r/tone", perturbation="none", verbose=False, **settings)
    Path("away").mkdir()
    Path("r/old").rename("away/old")
    capfd.readouterr()
    assert main(["--adapter", "away/old", "--json", "out.json"]) == 0
    printed = capfd.readouterr()
    assert f"data of the adapter's run: {tmp_path / 'away' / 'old' / 'data'}\n" in printed.out
    assert "holds other rows" not in printed.err
    found = json.loads(Path("out.json").read_text())
    assert (found["metrics"], found["untrained"]) == (first.metrics, first.untrained)
    shutil.rmtree("r")
    run, _ = parse_run(["--config", "away/old/config.json", "--output_dir", "away/old", "--resume", "auto"])
    assert (run.task, run.data_dir) == ("away/old/task.json", "away/old/data")
    longer = train("away/old/config.json", output_dir="away/old", resume="auto", max_steps=3, verbose=False)
    assert longer.record["steps"] == 3


def test_the_check_tries_rows_as_long_as_those_that_are_scored(trained, monkeypatch):
    """A window that only long rows cross is met here as in training."""
    served, seen = serve([trained / "run"]), []
    examples = served.examples(adapter_rows(trained / "run" / "adapter", served.task))

    def checked(backbone, longest=0, ranks=None):
        seen.append(longest)
        return backbone, ""

    monkeypatch.setattr("ptp_ds.adapters.served.checked_backbone", checked)
    served.load(whole(), alone(), examples)
    rows = [len(e.context_ids) + max(len(answer) for answer in e.candidate_ids) for e in examples]
    assert 0 <= served.prompt_length + max(rows) - seen[0] <= 1  # nothing is scored at an answer's last token


def test_result_json_holds_every_setting(trained):
    settings = json.loads((trained / "run" / "result.json").read_text())["settings"]
    assert settings.keys() == {field.name for field in dataclasses.fields(RunConfig)}
    config = json.loads((trained / "run" / "config.json").read_text())
    assert settings == config["run"]
    assert (settings["seed"], settings["lr"], settings["data_dir"]) == (3, 0.3, "data")


def test_a_run_s_config_json_is_the_run_s_settings(trained):
    run, explicit = parse_run(["--config", str(trained / "run" / "config.json"), "--seed", "4"])
    before = json.loads((trained / "run" / "config.json").read_text())["run"]
    assert dataclasses.asdict(run) == before | {"seed": 4, "output_dir": None}
    assert explicit == {"model", "data_dir", "task", "eval_split", "max_steps", "prompt_length", "batch_size",
                        "perturbation", "max_length", "seed", "lr"}  # fmt: skip


def test_the_adapter_s_card(trained):
    card = json.loads((trained / "run" / "adapter" / "ptp_ds.json").read_text())
    assert card["model"]["name"] == str(trained / "model")
    assert card["model"].keys() == {
        "name",
        "family",
        "width",
        "layers",
        "vocabulary",
        "weights_sha256",
        "config_sha256",
    }
    assert card["data"] == {"data_dir": str(trained / "data"), "dataset": None}
    assert card["head"]["kind"] == "causal"


def test_predict_takes_the_run_folder_alone(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert predict(["--adapter", str(trained / "run"), "--text", "premise=It rains.", "hypothesis=It is wet."]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {
        "entailment", "neutral", "contradiction"
    }  # fmt: skip


def test_a_python_caller_needs_no_command(trained):
    served = serve([trained / "run"])
    split = load_split(served.task, "dev", str(trained / "data"), None)
    examples, ranks = served.examples(split, labelled=True), alone()
    scores_NC = served.score(served.load(whole("fp32"), ranks), examples, ranks)
    assert scores_NC.shape == (7, 3)
    result = json.loads((trained / "run" / "result.json").read_text())
    found = evaluation_of(scores_NC, examples, served.task)
    assert found.metrics == result["metrics"]
    torch.testing.assert_close(found.cross_entropy, result["eval_cross_entropy"])


@pytest.fixture
def loads_with(trained, monkeypatch):
    """loads_with(ds_config, *flags): the DeepSpeed configuration that evaluate.py loads the model with."""
    seen = []
    monkeypatch.setattr("ptp_ds.adapters.served.Served.load", lambda self, resolved, *rest: seen.append(resolved))
    monkeypatch.setattr("ptp_ds.adapters.served.Served.score", lambda self, _, examples, *rest: torch.zeros(7, 3))
    monkeypatch.setattr("ptp_ds.commands.evaluate.start_processes", alone)

    def run(ds_config, *flags) -> dict:
        assert main(["--adapter", str(trained / "run"), "--ds_config", str(ds_config), *map(str, flags)]) == 0
        return seen[-1].config

    return run


def test_a_ds_config_s_batches_and_gradients_are_trainings_alone(loads_with, tmp_path):
    own = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2,
           "gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(own))
    found = loads_with(tmp_path / "ds.json")
    assert (found["zero_optimization"]["stage"], found["train_batch_size"]) == (3, 1)


def test_hosts_and_nvme_are_as_for_train(loads_with, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert loads_with("zero3_hpz")["zero_optimization"]["zero_hpz_partition_size"] == 2
    monkeypatch.setattr("ptp_ds.config.zero_options.require_async_io", lambda file: None)
    offload = loads_with("zero3_nvme", "--nvme_path", tmp_path)["zero_optimization"]["offload_param"]
    assert offload["nvme_path"] == str(tmp_path)
    assert offload["buffer_count"] > 2, "for the shards of two layers"


def test_nvme_asks_for_its_folder(trained, refuse):
    said = refuse(["--adapter", str(trained / "run"), "--ds_config", "zero3_nvme"])
    assert "keeps weights on NVMe: give --nvme_path, a folder on each host's own NVMe disk." in said


def test_another_model_at_equal_width(trained, refuse, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(trained / "model", num_hidden_layers=1)
    shutil.copytree(trained / "model", tmp_path / "other")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    adapter = str(trained / "run" / "adapter")
    assert refuse(["--adapter", adapter, "--model", "other"]) == (
        f"error: Adapter {adapter} was trained on {trained / 'model'}, and other is another model: its "
        "number of layers is 1, not 2; give the one that it was trained on, or leave --model out."
    )


def test_a_moved_model_folder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "model", tmp_path / "moved")
    texts = ["--text", "premise=It rains.", "hypothesis=It is wet."]
    printed = []
    for model in ([], ["--model", "moved"]):
        assert predict(["--adapter", str(trained / "run"), *model, *texts]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_data_that_is_gone(trained, refuse, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    card = tmp_path / "run" / "adapter" / "ptp_ds.json"
    card.write_text(card.read_text().replace(str(trained / "data"), "/nowhere/data"))
    assert refuse(["--adapter", "run"]) == (
        "error: Adapter run/adapter was trained on data in /nowhere/data, which is gone; give --data_dir or --dataset."
    )


def test_folders_that_hold_no_adapter(refuse, tmp_path):
    assert refuse(["--adapter", "nowhere"]).startswith("error: Adapter nowhere: there is no such folder; give a run's ")
    (tmp_path / "empty").mkdir()
    assert refuse(["--adapter", "empty"]).startswith(
        "error: Adapter empty: no adapter_config.json there; give a run's "
    )


def test_a_run_s_folder_starts_another(trained, tmp_path, monkeypatch):
    from ptp_ds.commands.train import prepare

    monkeypatch.chdir(trained)
    run, explicit = parse_run(["--config", "run/config.json", "--prompt_init", "adapter", "--init_adapter", "run"])
    adapter = prepare(run, explicit).adapter
    assert adapter is not None
    assert adapter.shape == (4, 32)
