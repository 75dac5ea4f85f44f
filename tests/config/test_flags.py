"""Flags and --config files: parsing, merging, suggestions, ranges, contradictions, derived values."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from ptp_ds.choices import ELSEWHERE
from ptp_ds.config.checks import describe_unread, require_valid, unsuited, without_effect
from ptp_ds.config.flags import build_parser, dump_config, dumped_to, given_settings, parse_run
from ptp_ds.config.parsers import PARSERS
from ptp_ds.config.population import members_of
from ptp_ds.config.presets import with_preset
from ptp_ds.config.run_config import GROUPS, RunConfig, recorded_settings
from ptp_ds.files import nearest

AT_LEAST_ONE = (
    "prompt_length", "batch_size", "gradient_accumulation_steps", "max_steps", "ascent_steps", "log_every",
    "eval_tokens", "keep_checkpoints", "a2t_neighbours",
)  # fmt: skip
A2T = {"a2t_share", "a2t_neighbours", "a2t_min_cosine"}
NOISE, ASCENT, MASK = {"sigma"}, {"epsilon", "alpha", "ascent_steps", "norm"}, {"mask_share", "mask_token"}
NOT_NEGATIVE = ("reg_warmup_steps", "warmup_steps", "eval_every", "save_every", "seed")
FINITE = ("reg_weight", "sigma", "epsilon", "weight_decay", "max_grad_norm")


def config_file(folder: Path, content: object) -> str:
    file = folder / "run.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def test_no_flags_give_the_defaults():
    assert parse_run([]) == (RunConfig(), set())


def test_flags_are_parsed_with_their_types():
    argv = ["--task", "CB", "--prompt_length", "7", "--lr=0.5", "--perturbation", "pgd", "--norm", "linf"]
    run, explicit = parse_run(argv)
    assert (run.task, run.prompt_length, run.lr, run.perturbation, run.norm) == ("CB", 7, 0.5, "pgd", "linf")
    assert explicit == {"task", "prompt_length", "lr", "perturbation", "norm"}
    assert run.batch_size == RunConfig.batch_size


def test_every_field_is_a_flag_with_help():
    text = build_parser("about").format_help()
    for field in dataclasses.fields(RunConfig):
        assert f"--{field.name} " in text
        assert field.metadata["help"]
    assert "--local_rank" not in text


def test_launcher_flag_is_accepted_and_ignored():
    assert parse_run(["--local_rank", "1"]) == (RunConfig(), set())


def test_config_file_is_merged_and_flags_win(tmp_path):
    file = config_file(tmp_path, {"task": "CB", "lr": 1, "max_length": None, "seed": 4})
    run, explicit = parse_run(["--config", file, "--seed", "9"])
    assert (run.task, run.lr, run.max_length, run.seed) == ("CB", 1, None, 9)
    assert explicit == {"task", "lr", "max_length", "seed"}


def test_a_whole_number_is_a_float_where_the_setting_is_one(tmp_path):
    """Else the record of a run says 1, that of another 1.0, and tables take them for two methods."""
    run = parse_run(["--config", config_file(tmp_path, {"reg_weight": 2, "alpha": 1, "max_steps": 3})])[0]
    (member,) = members_of(RunConfig(sigma=1), {"a": {"epsilon": 1}}).values()
    recorded = recorded_settings({"sigma": 1, "epsilon": 1, "alpha": None, "max_steps": 1, "lr": True, "average": "x"})
    told = [str(one) for one in (run.reg_weight, run.alpha, member.sigma, member.epsilon, recorded["sigma"])]
    assert told == ["2.0", "1.0", "1.0", "1.0", "1.0"]
    assert (run.max_steps, recorded["alpha"], recorded["max_steps"]) == (3, None, 1)
    assert (recorded["lr"], recorded["average"]) == (True, "x"), "what is no number of a record stays"


def test_config_file_can_hold_a_whole_run(tmp_path):
    run = RunConfig(task="COPA", perturbation="pgd", alpha=0.1, select_split="dev")
    assert parse_run(["--config", config_file(tmp_path, dataclasses.asdict(run))])[0] == run


def test_a_run_s_config_json_is_taken_without_its_folder(tmp_path, capsys):
    run = RunConfig(task="COPA", preset="r3f", sigma=0.3, output_dir="runs/old", resume="auto", lr=0.1)
    made = with_preset({"preset": "r3f", "task": "COPA", "sigma": 0.3, "lr": 0.1})
    record = {"run": dataclasses.asdict(run) | made, "deepspeed": {}, "world_size": 2}
    found, explicit = parse_run(["--config", config_file(tmp_path, record), "--lr", "0.2"])
    assert found == RunConfig(**made | {"lr": 0.2})
    assert explicit == {"task", "preset", "sigma", "lr"}, "what the preset and the defaults give anyway isn't explicit"
    assert "run.json, without its output_dir, resume and push_to_hub\n" in capsys.readouterr().out


def test_an_older_record_keeps_what_its_version_did(tmp_path):
    """Before --divergence_gradient the gradient flowed to both predictions, which isn't the default any more."""
    older = dataclasses.asdict(RunConfig(sigma=0.3))
    del older["divergence_gradient"]
    found, _ = parse_run(["--config", config_file(tmp_path, {"run": older})])
    assert found == RunConfig(sigma=0.3, divergence_gradient="both")
    assert parse_run(["--config", config_file(tmp_path, {"sigma": 0.3})])[0] == RunConfig(sigma=0.3)


def test_a_secret_that_a_record_lacks_is_asked_for(tmp_path):
    file = config_file(tmp_path, {"run": {"prompt_init": "text", "init_text": "shown [secret]"}})
    with pytest.raises(ValueError, match=r"'init_text' held a secret, which is not on record; give --init_text\.$"):
        parse_run(["--config", file])
    assert parse_run(["--config", file, "--init_text", "words"])[0].init_text == "words"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"run": [1]}, r"run\.json: 'run' is \[1\]; expected a run's config\.json, or settings alone\."),
        ({"run": {"promt_length": 3}}, r"unknown key 'promt_length' \(did you mean"),
        ({"run": {"seed": 1.5}}, r"'seed' must be int, not 1\.5\."),
        ({"promt_length": 3}, r"unknown key 'promt_length' \(did you mean 'prompt_length'\?\)\."),
        ({"zzzz": 3}, r"unknown key 'zzzz'\."),
        ({"seed": 1.5}, r"'seed' must be int, not 1\.5\."),
        ({"seed": True}, r"'seed' must be int, not True\."),
        ({"lr": "fast"}, r"'lr' must be float, not 'fast'\."),
        ({"task": None}, r"'task' must be str, not None\."),
        ({"norm": "l7"}, r"'norm' is 'l7'; choose from frobenius, token_l2, linf"),
        ([1], "expected settings, a name and a value each, in YAML or JSON"),
        ("{", r"not valid JSON \("),
        ({"lr": 0}, r"--lr is 0\.0; expected a finite number above 0"),
    ],
)
def test_config_file_errors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", config_file(tmp_path, content)])


def test_missing_config_file(tmp_path):
    with pytest.raises(ValueError, match=r"--config .*none\.json: No such file or directory\."):
        parse_run(["--config", str(tmp_path / "none.json")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--promt_length", "3"],
            r"Unknown argument '--promt_length' \(did you mean '--prompt_length'\?\)\. See --help",
        ),
        (["--epsilom=1"], r"Unknown argument '--epsilom=1' \(did you mean '--epsilon'\?\)"),
        (["--zzzz"], r"Unknown argument '--zzzz'\. See"),
        (["extra"], "Unknown argument 'extra'"),
        (["--prompt_len", "3"], r"did you mean '--prompt_length'\?"),
        (["--max_steps", "ten"], "Argument --max_steps: invalid int value: 'ten'"),
        (["--lr"], "Argument --lr: expected one argument"),
        (["--divergence", "l2"], r"Argument --divergence: invalid choice: 'l2' \(choose from .*sym_kl"),
    ],
)
def test_flag_errors(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_run(argv)


@pytest.mark.parametrize(
    ("command", "flag"),
    [(command, one.option_strings[0]) for command, make in PARSERS.items() for one in make("")._actions
     if one.nargs == "+" and one.option_strings and not isinstance(one, argparse._ExtendAction)],
)  # fmt: skip
def test_a_flag_of_several_values_comes_once(command, flag):
    """Of every command: the first ones would be left out without a word."""
    parser = PARSERS[command]("")
    value = str((parser._option_string_actions[flag].choices or ["1"])[0])
    with pytest.raises(ValueError, match=f"{flag} comes twice; give "):
        parser.parse_args([flag, value, flag, value])


def test_a_flag_of_one_value_may_come_again_and_the_last_one_counts():
    assert given_settings(["--lr", "1", "--lr", "2"]) == {"lr": 2}
    found = given_settings(["--perturbation_args", "a=1", "--perturbation_args", "b=2"])
    assert found == {"perturbation_args": "a=1 b=2"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *[(name, "0", "a whole number of 1 or more") for name in AT_LEAST_ONE],
        *[(name, "-1", "a whole number of 0 or more") for name in NOT_NEGATIVE],
        *[(name, value, "a finite number of 0 or more") for name in FINITE for value in ("-0.1", "inf", "nan")],
        *[(name, value, "a finite number above 0") for name in ("lr", "alpha") for value in ("0", "-1", "inf", "nan")],
        *[("holdout", value, "a share between 0 and 1") for value in ("0", "1", "-0.5", "nan")],
        *[("mask_share", value, "a share between 0 and 1") for value in ("-0.1", "1.5", "nan")],
        ("max_length", "20", "more than the prompt's 20 tokens"),
    ],
)
def test_ranges(name, value, expected):
    with pytest.raises(ValueError, match=rf"^--{name} is {value}(\.0)?; expected {expected}\.$"):
        parse_run([f"--{name}={value}"])


@pytest.mark.parametrize(("name", "value"), [(name, 1) for name in AT_LEAST_ONE] + [(name, 0) for name in NOT_NEGATIVE])
def test_smallest_values_are_accepted(name, value):
    assert getattr(parse_run([f"--{name}={value}"])[0], name) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_dir": "a", "dataset": "b"}, "Can't read both --data_dir and --dataset; choose one"),
        ({"select_split": "val"}, r"--select_split and --eval_split are both 'val': .* must not be chosen"),
        ({"init_text": "words"}, "--init_text is where --prompt_init text begins, not vocab; give both or neither"),
        ({"prompt_init": "adapter"}, "--prompt_init adapter and --init_adapter go together"),
        ({"init_adapter": "folder", "prompt_init": "labels"}, "--prompt_init adapter and --init_adapter go together"),
        ({"resume": "auto"}, "--resume auto needs the --output_dir of the run that it continues"),
    ],
)
def test_contradictions(settings, message):
    with pytest.raises(ValueError, match=message):
        require_valid(RunConfig(**settings))


@pytest.mark.parametrize(
    ("perturbation", "unread"),
    [
        (
            "none",
            {
                *NOISE,
                *ASCENT,
                *MASK,
                *A2T,
                "units",
                "target",
                "reg_weight",
                "reg_warmup_steps",
                "reg_schedule",
                "min_confidence",
                "confidence_in",
                "divergence",
                "divergence_gradient",
            },
        ),
        ("gaussian", {*ASCENT, *MASK, *A2T}),
        ("free", {*NOISE, *MASK, *A2T}),
        ("uniform", {*ASCENT, *MASK, *A2T}),
        ("pgd", {*NOISE, *MASK, *A2T}),
        ("mask", {*NOISE, *ASCENT, *A2T, "units", "target"}),
        ("mask+gaussian", {*ASCENT, *A2T}),
        ("a2t", {*NOISE, *ASCENT, *MASK, "units", "target"}),
        ("a2t+gaussian", {*ASCENT, *MASK}),
    ],
)
def test_without_effect(perturbation, unread):
    names = {field.name for field in dataclasses.fields(RunConfig)}
    run = RunConfig(perturbation=perturbation)
    assert without_effect(run, names) == sorted({*unread, "hub_visibility", "confidence_in"})  # nothing is pushed
    assert without_effect(run, set()) == []
    assert without_effect(run, {"lr"}) == []


def test_nothing_of_a_perturbation_that_is_turned_off_has_an_effect():
    given = {"reg_weight", "sigma", "divergence", "reg_warmup_steps", "lr"}
    assert without_effect(RunConfig(reg_weight=0.0), given) == ["divergence", "reg_warmup_steps", "sigma"]
    assert without_effect(RunConfig(sigma=0.0), given) == ["divergence", "reg_warmup_steps", "reg_weight"]


def test_whose_confidence_it_is_has_an_effect_where_there_is_a_least_one():
    given = {"confidence_in", "min_confidence"}
    assert describe_unread(RunConfig(confidence_in="label"), given) == [
        "--confidence_in has no effect with --min_confidence 0"
    ]
    assert describe_unread(RunConfig(confidence_in="label", min_confidence=0.8), given) == []
    assert describe_unread(RunConfig(perturbation="none", min_confidence=0.8, confidence_in="label"), given) == [
        "--confidence_in and --min_confidence have no effect with --perturbation none"
    ]


def test_defaults_that_do_not_suit():
    said = ["--prompt_mlp trains more than a prompt: --lr 0.03, the default, is likely too high, try 0.001"]
    assert unsuited(RunConfig(prompt_mlp=64), {"prompt_mlp"}) == said
    assert unsuited(RunConfig(prompt_mlp=64), {"prompt_mlp", "lr"}) == unsuited(RunConfig(), set()) == []


def test_step_length():
    assert RunConfig(epsilon=0.4, ascent_steps=3).step_length == pytest.approx(0.2)
    assert RunConfig(epsilon=0.4, ascent_steps=3, alpha=0.7).step_length == 0.7


@pytest.mark.parametrize(
    ("settings", "perturbs"),
    [
        ({}, True),
        ({"perturbation": "pgd"}, True),
        ({"perturbation": "none"}, False),
        ({"reg_weight": 0.0}, False),
        ({"sigma": 0.0}, False),
        ({"perturbation": "uniform", "sigma": 0.0}, False),
        ({"perturbation": "pgd", "epsilon": 0.0}, False),
        ({"perturbation": "pgd", "sigma": 0.0}, True),
        ({"perturbation": "gaussian", "epsilon": 0.0}, True),
    ],
)
def test_perturbs(settings, perturbs):
    assert RunConfig(**settings).perturbs is perturbs


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("learning_rate", "--lr"),
        ("num_train_epochs", "--max_steps, in optimizer steps: epochs aren't counted"),
        ("epochs", "--max_steps, in optimizer steps: epochs aren't counted"),
        ("per_device_train_batch_size", "--batch_size, the rows of a step over all ranks"),
        ("per-device-train-batch-size", "--batch_size, the rows of a step over all ranks"),
        ("batch", "--batch_size, the rows of a step over all ranks"),
        ("lr_scheduler_type", "--lr_schedule"),
        ("output", "--output_dir"),
        ("gradient_checkpointing", "--activations, set to recompute"),
        ("bf16", "--precision, set to bf16"),
    ],
)
def test_names_of_other_trainers(tmp_path, name, said):
    with pytest.raises(ValueError, match=rf"^Unknown argument '--{name}=3' \(here that is {said}\)\. See --help\.$"):
        parse_run([f"--{name}=3"])
    with pytest.raises(ValueError, match=rf"unknown key '{name}' \(here that is {said[2:]}\)\.$"):
        parse_run(["--config", config_file(tmp_path, {name: 3})])


def test_another_trainers_names_lead_to_settings_that_there_are():
    known = [field.name for field in dataclasses.fields(RunConfig)]
    assert {setting for setting, _ in ELSEWHERE.values()} <= set(known)
    assert not ELSEWHERE.keys() & set(known)
    assert "here that is" not in nearest("output", ["input"])


def test_nearest():
    assert nearest("stagee", ["stage", "other"]) == " (did you mean 'stage'?)"
    assert nearest("qqq", ["stage"]) == ""


def test_a_yaml_file_is_read_as_json_is(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# a comment\ntask: CB\nlr: 1e-3\nseeds: 0-2\nmax_length: null\n", encoding="utf-8")
    run, explicit = parse_run(["--config", str(file), "--lr", "0.5"])
    assert (run.task, run.lr, run.seeds, run.max_length) == ("CB", 0.5, "0-2", None)
    assert explicit == {"task", "lr", "seeds", "max_length"}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--task", "CB", "--lr", "1e-7", "--seeds", "0-4", "--init_text", "no", "--prompt_init", "text"],
        ["--preset", "smart", "--reg_weight", "2", "--divergence", "kl"],
        ["--mask_token", '\'#: "x"\n', "--data_dir", "a: b", "--alpha", "0.1", "--perturbation", "pgd"],
    ],
)
def test_dumped_settings_are_read_back_as_they_were(tmp_path, argv):
    """Nothing that is as usual counts as given: it would be warned of where it has no effect."""
    run, explicit = parse_run(argv)
    file = tmp_path / "deep" / "run.yaml"
    dump_config(run, str(file))
    again, given = parse_run(["--config", str(file)])
    assert again == run
    assert given <= explicit
    text = file.read_text()
    assert all(f"# {group}: " in text for group in GROUPS)
    assert "\n# Not in here are output_dir, resume and push_to_hub, one run's own: give them as flags.\n" in text


def test_dump_config_names_a_file_and_writes_no_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_12345678")
    assert dumped_to(["--task", "CB", "--dump_config", "a.yaml"]) == "a.yaml"
    assert dumped_to(["--task", "CB"]) is None
    run, _ = parse_run(["--dataset", "owner/hf_12345678", "--dump_config", "-"])
    dump_config(run, "-")
    out = capsys.readouterr().out
    assert "dataset: owner/[secret]" in out
    with pytest.raises(ValueError, match="--dump_config"):
        dump_config(run, str(tmp_path))
