"""What a user can get wrong, end to end: exit code 2, one sentence on stderr, no traceback, nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.train import main, prepare
from ptp_ds.config.flags import parse_run
from ptp_ds.files import lock
from ptp_ds.models.source import load_config
from ptp_ds.training.checkpoint import Checkpoint, save_checkpoint

CB_ROW = {"premise": "It rains, he said.", "hypothesis": "it rains", "label": "neutral"}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def sentence(stderr: str) -> str:
    """The one error line of a run."""
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, stderr
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


@pytest.fixture
def base(tiny_model) -> list[str]:
    """Flags of a run that would work: two steps on the demo data."""
    return ["--model", str(tiny_model), "--task", "CB", "--prompt_length", "4", "--max_steps", "2"]


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd) -> Callable[[list[str]], str]:
    """refuse(argv) runs it in tmp_path, checks that it is refused and leaves no trace, and returns the sentence."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        "ptp_ds.commands.train.start_processes", lambda: pytest.fail("a bad run must not start processes")
    )

    def run(argv: list[str]) -> str:
        before = snapshot(tmp_path)
        capfd.readouterr()
        assert main(argv) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert snapshot(tmp_path) == before
        return sentence(printed.err)

    return run


def test_the_flags_below_would_work(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared = prepare(*parse_run([*base, "--output_dir", "out"]))
    found = prepared.examples
    assert (len(found.train), len(found.select), len(found.evaluation)) == (82, 14, 48)
    assert snapshot(tmp_path) == {}, "preparing a run must not write"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--promt_length", "3"], "Unknown argument '--promt_length' (did you mean '--prompt_length'?). See --help."),
        (["--max_steps", "many"], "Argument --max_steps: invalid int value: 'many'. See --help."),
        (["--sigma", "-1"], "--sigma is -1.0; expected a finite number of 0 or more."),
        (["--mask_token", "two words"], "--mask_token 'two words' is "),
        (["--task", "CD"], "Unknown task 'CD' (did you mean CB?): give one of "),
        (["--model", "no-one/nothing"], "Model 'no-one/nothing' is no folder here and can't be had from the hub: "),
        (["--model", "a/b/c"], "Unknown model 'a/b/c': it is neither a folder nor a hub id. Give --model a folder"),
        (["--model", "."], "--model .: the folder holds no config.json; give a folder saved by save_pretrained."),
        (["--data_dir", "nowhere"], "--data_dir nowhere: there is no such folder."),
        (["--eval_split", "dev"], "No file "),
        (["--predict_split", "test"], "No file "),
        (
            ["--ds_config", "none.json"],
            "--ds_config none.json: No such file or directory; give a file, or one of zero2",
        ),
        (["--config", "none.json"], "--config none.json: No such file or directory."),
        (
            ["--resume", "nowhere"],
            "--resume nowhere: there is no such folder; give a checkpoints/step-... folder or auto.",
        ),
        (["--prompt_length", "600"], "--prompt_length 600 leaves no room in the backbone's context of 512 tokens."),
        (["--prompt_length", "512"], "--prompt_length 512 leaves no room in the backbone's context of 512 tokens."),
        (["--max_length", "513"], "--max_length 513 must lie between the prompt's"),
        (["--prompt_init", "adapter", "--init_adapter", "no"], "Adapter no: there is no such folder; "),
        (
            ["--task", "COPA", "--prompt_init", "labels"],
            "--prompt_init labels starts at a task's class words, and COPA has none: its answers differ from row to "
            "row; give --prompt_init vocab or text.",
        ),
        (
            ["--task", "bare.json", "--prompt_init", "text"],
            "--prompt_init text begins at --init_text 'some words' or at the task's instruction, and the template of "
            "Bare has none; give one of the two.",
        ),
        (["--task", "WSC", "--prompt_init", "labels"], "--prompt_init labels starts at a task's class words, and WSC"),
        (
            ["--tokens_per_step", "60", "--gradient_accumulation_steps", "4"],
            "--tokens_per_step 60 holds 1 of the 82 training rows in batch 1, and each of the 4 micro-batches (ranks ",
        ),
        (["--dataset", "no-such-folder"], "--dataset no-such-folder: can't load configuration 'cb', split 'train' "),
    ],
)
def test_flags(base, refuse, extra, message, tmp_path):
    template = {"name": "Bare", "text": "{line}:", "label": "tone", "verbalizers": {"a": " a", "b": " b"}}
    (tmp_path / "bare.json").write_text(json.dumps({**template, "metrics": ["accuracy"]}))
    assert refuse([*base, *extra]).startswith(message)


def test_rows_that_the_prompt_leaves_no_room_for(base, refuse):
    found = refuse([*base, "--prompt_length", "500"])
    assert "tokens longer than the 12 that fit behind the prompt" in found
    assert "CB/train.jsonl:1: " in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"premise": "It', ":2: not valid JSON (Unterminated string"),
        ("[1, 2]", ":2: expected a JSON object, found list."),
        (
            json.dumps({**CB_ROW, "label": "maybe"}),
            ":2: label 'maybe' is not one of entailment, contradiction, neutral",
        ),
        (
            json.dumps({"premise": "It", "label": "neutral"}),
            ":2: the row has no field 'hypothesis', or an empty cell; task CB needs it (the row has premise, label).",
        ),
        (json.dumps({**CB_ROW, "premise": None}), ":2: field 'premise' must be non-empty text, not None."),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_rows(base, refuse, tmp_path, write_rows, split, line, message):
    for name in ("train", "val"):
        write_rows(tmp_path / "data" / "CB" / f"{name}.jsonl", [CB_ROW, line if name == split else CB_ROW])
    assert refuse([*base, "--data_dir", "data"]).startswith(f"data/CB/{split}.jsonl{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 64, "zero_optimization": {"stage": 3}},
         'ds.json says train_batch_size = 64, but the default of --batch_size makes it 8; set it to "auto"'),
        ({"optimizer": {}, "zero_optimization": {"stage": 3}}, "--ds_config ds.json: remove 'optimizer': "),
        ({"zero_optimization": {"stage": 1}}, "--ds_config ds.json: zero_optimization.stage must be 2 or 3"),
        ({"zero_optimization": {"stage": 3, "stagee": 3}},
         "--ds_config ds.json: unknown key 'zero_optimization.stagee' (did you mean 'stage'?)."),
    ],
)  # fmt: skip
def test_deepspeed_files(base, refuse, tmp_path, content, message):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    assert refuse([*base, "--ds_config", "ds.json"]).startswith(message)


def test_batch_that_ranks_cannot_share(base, refuse, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert refuse([*base, "--batch_size", "8"]).startswith(
        "--batch_size 8 can't be dealt to 3 ranks x 1 micro-batches in equal parts; use 6 or 9."
    )


@pytest.mark.parametrize(
    "held", ["adapter/x", "result.json", "checkpoints/step-000001/state.json", "checkpoints/step-000001.damaged/x"]
)
def test_output_folder_of_another_run(base, refuse, tmp_path, held):
    (tmp_path / "out" / held).parent.mkdir(parents=True)
    (tmp_path / "out" / held).write_text("kept")
    found = refuse([*base, "--output_dir", "out"])
    assert found == "--output_dir out holds another run; continue it with --resume auto or give a new folder."


def test_a_run_that_failed_before_its_first_checkpoint_leaves_its_folder_free(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "log.jsonl"):
        (tmp_path / "out" / name).write_text("{}")
    assert prepare(*parse_run([*base, "--output_dir", "out"])).continuation.checkpoint is None


def test_a_folder_that_a_run_is_writing_is_refused(base, refuse, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "log.jsonl", "w") as log:
        lock(log)
        for extra in ([], ["--resume", "auto"]):
            found = refuse([*base, "--output_dir", "out", *extra])
            assert found == "--output_dir out is being written by a run that still goes on; give another folder."


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--epsilon", "0.5"], ["--epsilon has no effect with --perturbation gaussian"]),
        (["--reg_weight", "0", "--sigma", "0.1"], ["--sigma has no effect with --reg_weight 0"]),
        (
            ["--sigma", "0", "--divergence", "js"],
            ["--divergence has no effect with a --perturbation gaussian of size 0"],
        ),
        (["--preset", "r3f", "--epsilon", "0.5"], ["--epsilon has no effect with --perturbation uniform"]),
    ],
)
def test_settings_that_nothing_reads_are_named_once(base, extra, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(*parse_run([*base, *extra]))
    assert capsys.readouterr().err.splitlines() == [f"warning: {sentence}" for sentence in said]


def test_output_folder_that_is_a_file(base, refuse, tmp_path):
    (tmp_path / "out").write_text("kept")
    assert refuse([*base, "--output_dir", "out"]) == "--output_dir out is a file; give a folder."


@pytest.fixture
def saved(base, tmp_path, monkeypatch) -> Path:
    """out/checkpoints/step-000001 of the run of `base`."""
    monkeypatch.chdir(tmp_path)
    identity = prepare(*parse_run(base)).identity
    tensors = {name: torch.zeros(4, 32) for name in ("prompt", "exp_avg", "exp_avg_sq")}
    tensors["adam_step"] = torch.zeros(1)
    return save_checkpoint(Path("out/checkpoints"), Checkpoint(1, tensors, None, identity), keep=1)


def test_a_checkpoint_of_the_same_run_is_accepted(base, saved):
    for resume in ("auto", str(saved)):
        prepared = prepare(*parse_run([*base, "--output_dir", "out", "--resume", resume]))
        assert prepared.continuation.checkpoint is not None
        assert prepared.continuation.checkpoint.step == 1


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            ["--max_steps", "30"],
            ["--max_steps was 2 and is 30 now", "learning rate ended at step 2 and ends at step 30 now"],
        ),
        (
            ["--max_steps", "30", "--schedule_steps", "2"],
            ["--max_steps was 2 and is 30 now", "--schedule_steps 2 ends before --max_steps 30"],
        ),
        (["--schedule_steps", "9"], ["from step 2 on it is another (--schedule_steps 2 keeps the old)"]),
        (["--precision", "bf16"], ["precision was fp32 and is bf16 now: the steps from 2 on are not those"]),
        (["--patience", "3", "--save_every", "1"], []),
    ],
)
def test_a_resumed_run_may_be_longer_and_says_what_changes(base, saved, extra, said, capsys):
    prepare(*parse_run([*base, *extra, "--output_dir", "out", "--resume", "auto"]))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(said)
    assert all(part in warning for part, warning in zip(said, warnings, strict=True))


def test_what_is_advised_to_keep_the_old_schedule_trains_to_the_end(base, saved, capsys):
    """A schedule that ended before the new steps would leave them at a rate of 0: it isn't advised."""
    prepare(*parse_run([*base, "--max_steps", "30", "--output_dir", "out", "--resume", "auto"]))
    assert "keeps the old" not in capsys.readouterr().err


def test_a_constant_rate_has_no_schedule_that_ends(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    constant = [*base, "--lr_schedule", "constant"]
    identity = prepare(*parse_run(constant)).identity
    tensors = {name: torch.zeros(4, 32) for name in ("prompt", "exp_avg", "exp_avg_sq")}
    save_checkpoint(Path("out/checkpoints"), Checkpoint(2, {**tensors, "adam_step": torch.zeros(1)}, None, identity), 1)
    prepare(*parse_run([*constant, "--max_steps", "30", "--output_dir", "out", "--resume", "auto"]))
    assert capsys.readouterr().err == "warning: --max_steps was 2 and is 30 now\n"


def test_a_resumed_run_may_not_end_before_its_checkpoint(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    identity = prepare(*parse_run(base)).identity
    tensors = {name: torch.zeros(4, 32) for name in ("prompt", "exp_avg", "exp_avg_sq")}
    save_checkpoint(Path("out/checkpoints"), Checkpoint(2, {**tensors, "adam_step": torch.zeros(1)}, None, identity), 1)
    with pytest.raises(ValueError, match=r"--max_steps is 1 and out/checkpoints/step-000002 has 2 steps behind it"):
        prepare(*parse_run([*base, "--max_steps", "1", "--output_dir", "out", "--resume", "auto"]))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--task", "RTE"], "its task name is 'CB'"),
        (["--seed", "1"], "its seed is 0, this run's is 1."),
        (["--prompt_length", "5"], "its prompt_length is 4, this run's is 5."),
        (["--perturbation", "pgd"], "its perturbation is 'gaussian', this run's is 'pgd'."),
        (["--train_split", "val", "--eval_split", "train"], "its training data is '"),
        (["--select_split", "train"], "its selection data is None, this run's is '"),
        (["--prompt_init", "labels"], "its prompt_init is 'vocab', this run's is 'labels'."),
    ],
)
def test_checkpoint_of_another_run(base, refuse, saved, extra, named):
    found = refuse([*base, "--output_dir", "out", "--resume", "auto", *extra])
    assert found.startswith(f"out/checkpoints/step-000001 is a checkpoint of another run: {named}")


def test_damaged_checkpoint(base, refuse, saved):
    with open(saved / "state.safetensors", "ab") as file:
        file.write(b"more")
    altered = "out/checkpoints/step-000001/state.safetensors is missing or altered (its sha256 differs)"
    found = refuse([*base, "--output_dir", "out", "--resume", "out/checkpoints/step-000001"])
    assert found.startswith(altered)
    found = refuse([*base, "--output_dir", "out", "--resume", "auto"])
    assert found.startswith(f"No checkpoint in out/checkpoints is whole: {altered}. Put a copy back, or start")


def test_damaged_checkpoint_before_a_whole_one(base, saved, capsys):
    newer = Path("out/checkpoints/step-000002")
    shutil.copytree(saved, newer)
    os.truncate(newer / "state.safetensors", 50)
    prepared = prepare(*parse_run([*base, "--output_dir", "out", "--resume", "auto"]))
    assert prepared.continuation.checkpoint is not None
    assert prepared.continuation.checkpoint.step == 1
    assert prepared.continuation.skipped
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {newer}/state.safetensors is missing or altered (its sha256 differs)")
    assert line.endswith("; going on from step-000001, the one before\n")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 16), "Adapter other has width 16, the model's is 32: another model's adapter."),
        ((7, 32), "Adapter other has 7 tokens; set --prompt_length 7."),
    ],
)
def test_adapter_of_another_run(base, refuse, tmp_path, tiny_model, shape, message):
    write_adapter(tmp_path / "other", torch.zeros(shape), "model", load_config(tiny_model), {})
    assert refuse([*base, "--prompt_init", "adapter", "--init_adapter", "other"]) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "model/config.json describes no model that transformers knows ("),
        ('{"model_type": "no-such-family"}', "model/config.json describes no model that transformers knows ("),
        ('{"model_type": "vit"}', "model: model family 'vit' has no causal language model in transformers."),
    ],
)
def test_model_folders_of_another_kind(base, refuse, tmp_path, content, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    assert refuse([*base, "--model", "model"]).startswith(message)


def test_model_folder_without_a_tokenizer(base, refuse, tmp_path, tiny_model):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert refuse([*base, "--model", "model"]).startswith("model holds no tokenizer that transformers can load (")


# the same through scripts/train.py


def test_script_refuses_an_unknown_flag(run_train, base, tmp_path):
    done = run_train([*base, "--max_step", "1"])
    assert done.returncode == 2
    assert sentence(done.stderr) == "Unknown argument '--max_step' (did you mean '--max_steps'?). See --help."
    assert snapshot(tmp_path) == {}


def test_script_refuses_a_malformed_line(run_train, base, tmp_path, write_rows):
    write_rows(tmp_path / "data" / "CB" / "train.jsonl", [CB_ROW, "{"])
    before = snapshot(tmp_path)
    done = run_train([*base, "--data_dir", "data", "--output_dir", "out"])
    assert done.returncode == 2
    assert sentence(done.stderr).startswith("data/CB/train.jsonl:2: not valid JSON (")
    assert done.stdout == ""
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("first_starts_last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_print_one_sentence(run_train, base, tmp_path, first_starts_last):
    environment = None
    if first_starts_last:  # rank 0's sentence must come all the same
        late = tmp_path / "late" / "sitecustomize.py"
        late.parent.mkdir()
        late.write_text("import os, time\ntime.sleep(2 * (os.environ.get('LOCAL_RANK') == '0'))\n")
        environment = {"PYTHONPATH": os.pathsep.join([str(late.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = run_train([*base, "--prompt_length", "600", "--output_dir", "out"], env=environment, nproc=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: --prompt_length 600 leaves no room in the backbone's context of 512 tokens."]
    assert not (tmp_path / "out").exists()
