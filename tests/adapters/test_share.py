"""Pushing an adapter and taking it by its hub id, against a stand-in for the hub's server: bytes, paths, refusals."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from ptp_ds.adapters.hub import EMBEDDED_ON_THE_HUB, base_model_name, hub_adapter, hub_model, is_hub_id
from ptp_ds.adapters.origin import adapter_model, adapter_rows
from ptp_ds.adapters.read import adapter_folder, read_adapter, read_card
from ptp_ds.adapters.share import push_adapter, require_can_push, shareable_card
from ptp_ds.commands.evaluate import main as evaluate
from ptp_ds.commands.push import main as push
from ptp_ds.commands.train import train
from ptp_ds.config.checks import describe_unread
from ptp_ds.config.flags import parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.tasks import load_task
from tests.support.hub import OWNER, Hub, Repository

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "ptp_ds.json"]


def held(hub: Hub, name: str) -> dict[str, bytes]:
    """The repository's files, without the hub's own."""
    repository = hub.repositories[name]
    files = repository.files("main") or {}
    return {name: files[name] for name in sorted(files) if name != ".gitattributes"}


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_pushed_comes_back_byte_by_byte(hub, made):
    assert push_adapter(made.parent, f"{OWNER}/cb") == f"{hub.endpoint}/{OWNER}/cb"
    pushed = held(hub, f"{OWNER}/cb")
    assert list(pushed) == FILES
    assert pushed["adapter_model.safetensors"] == (made / "adapter_model.safetensors").read_bytes()
    folder = adapter_folder(f"{OWNER}/cb")
    assert {file.name: file.read_bytes() for file in sorted(folder.iterdir())} == pushed
    assert torch.equal(read_adapter(folder), read_adapter(made))
    assert read_card(folder)["task"] == read_card(made)["task"]
    large = [path for method, path in hub.asked if method == "PUT"]
    assert len(large) == 1, "the weights alone go by the hub's way for large files"


def test_a_client_with_xet_commits_the_same(hub, made, monkeypatch):
    """The client's other way, which streams; all files are within the commit: nothing here stores Xet's chunks."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.knows_large_files = False
    push_adapter(made, f"{OWNER}/cb")
    pushed = held(hub, f"{OWNER}/cb")
    assert list(pushed) == FILES
    assert pushed["adapter_model.safetensors"] == (made / "adapter_model.safetensors").read_bytes()
    assert adapter_folder(f"{OWNER}/cb").is_dir()


def test_nothing_pushed_names_a_path_of_this_machine(hub, made, tmp_path, tiny_model):
    push_adapter(made, f"{OWNER}/cb")
    for name, content in held(hub, f"{OWNER}/cb").items():
        for path in (tmp_path, tiny_model, tiny_model.parent, Path.home(), Path(os.getcwd())):
            assert str(path).encode() not in content, (name, path)
    folder = adapter_folder(f"{OWNER}/cb")
    card = read_card(folder)
    assert card["model"] == {"name": None, "width": 32}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    settings = card["result"]["settings"]
    assert (settings["ds_config"], settings["perturbation"], settings["perturbation_args"], settings["model"]) == (
        "zero3.json", "own.py", "table=words.txt", tiny_model.name
    )  # fmt: skip
    assert (settings["output_dir"], settings["data_dir"], settings["lr"]) == (None, None, 0.03)
    assert settings["init_text"] == "/ or \\", "words stay as they are"
    assert card["result"]["metrics"] == read_card(made)["result"]["metrics"]


def test_a_pushed_adapter_asks_for_the_model_and_data_that_it_does_not_name(hub, made, tiny_model):
    push_adapter(made, f"{OWNER}/cb")
    folder = adapter_folder(f"{OWNER}/cb")
    assert "doesn't say which model it was trained on; give --model." in refusal(adapter_model, folder, None)
    assert adapter_model(folder, str(tiny_model)) == str(tiny_model)
    said = refusal(adapter_rows, folder, load_task("CB"))
    assert "was trained on data in a folder of another machine; give --data_dir or --dataset." in said


def test_the_model_s_hub_id_may_be_told(hub, made):
    push_adapter(made, f"{OWNER}/cb", base_model="owner/model")
    folder = adapter_folder(f"{OWNER}/cb")
    assert adapter_model(folder, None) == "owner/model"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/model"
    assert ModelCard((folder / "README.md").read_text()).data.base_model == "owner/model"
    assert "expected its hub id" in refusal(push_adapter, made, f"{OWNER}/cb", base_model="/models/x")


@pytest.mark.parametrize(
    ("name", "base", "hub_id"),
    [
        (EMBEDDED_MODEL, "/old/cache/folder", EMBEDDED_ON_THE_HUB), ("owner/model", None, "owner/model"),
        ("/models/x", "owner/model", None), (None, "owner/model", "owner/model"), (None, "/models/x", None),
        (None, None, None), (3, "../x", None),
    ],
)  # fmt: skip
def test_which_hub_id_a_card_gives(name, base, hub_id):
    assert hub_model(base, {"model": {"name": name}}) == hub_id
    shared = shareable_card({"model": {"name": name}})["model"]["name"]
    assert shared == (name if name in (EMBEDDED_MODEL, "owner/model") else None)


def test_the_base_model_is_the_name_that_was_given():
    assert [base_model_name(name) for name in ("owner/model", "./m", "/m", EMBEDDED_MODEL)] == [
        "owner/model", "./m", "/m", EMBEDDED_ON_THE_HUB
    ]  # fmt: skip


def test_data_of_the_hub_and_of_the_package_stay_on_the_card():
    for data in ({"data_dir": None, "dataset": "owner/data"}, {"data_dir": None, "dataset": None}):
        assert shareable_card({"data": data})["data"] == data
    for data in ({"data_dir": "/data", "dataset": None}, {"data_dir": None, "dataset": "/parquet"}):
        assert shareable_card({"data": data})["data"] == {"data_dir": None, "dataset": None, "elsewhere": True}


def test_a_revision_is_what_it_was(hub, made, tmp_path):
    push_adapter(made, f"{OWNER}/cb")
    first = hub.repositories[f"{OWNER}/cb"].head
    (made / "README.md").write_text("---\nlicense: mit\n---\nby hand\n")
    push_adapter(made, f"{OWNER}/cb")
    assert (adapter_folder(f"{OWNER}/cb") / "README.md").read_text().endswith("by hand\n")
    assert "by hand" not in (adapter_folder(f"{OWNER}/cb@{first}") / "README.md").read_text()
    assert "the hub's repository has no such revision" in refusal(adapter_folder, f"{OWNER}/cb@v9")


def test_a_name_alone_is_the_account_s_own_and_a_repository_may_be_private(hub, made, monkeypatch):
    assert push_adapter(made, "cb", private=True) == f"{hub.endpoint}/{OWNER}/cb"
    assert hub.repositories[f"{OWNER}/cb"].private
    assert f"ptp predict --adapter {OWNER}/cb" in held(hub, f"{OWNER}/cb")["README.md"].decode()
    assert adapter_folder(f"{OWNER}/cb").is_dir()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-empty")
    assert "shows no such repository, or not to this token" in refusal(adapter_folder, f"{OWNER}/cb")


def test_a_readme_of_the_owner_s_is_kept_as_far_as_it_names_no_path(hub, made, tiny_model):
    text = (made / "README.md").read_text().replace("---\n", "---\nlicense: mit\n", 1)
    (made / "README.md").write_text(f"{text}\nAsk me.\n")
    push_adapter(made, f"{OWNER}/cb")
    assert held(hub, f"{OWNER}/cb")["README.md"].decode().endswith("\nAsk me.\n")
    (made / "README.md").write_text(f"---\nlicense: mit\nbase_model: {tiny_model}\n---\nof an older version\n")
    push_adapter(made, f"{OWNER}/cb")
    readme = held(hub, f"{OWNER}/cb")["README.md"].decode()
    assert ModelCard(readme).data.license == "mit"
    assert f"ptp predict --adapter {OWNER}/cb" in readme


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_peft_s_own_adapter_is_pushed_and_peft_loads_it_from_there(hub, tmp_path, tiny_model):
    from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, tokenizer_name_or_path="/models/x")
    trained = get_peft_model(base, config)
    trained.save_pretrained(tmp_path / "theirs")
    push_adapter(tmp_path / "theirs", f"{OWNER}/theirs")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), f"{OWNER}/theirs")
    assert torch.equal(loaded.get_prompt(1), trained.get_prompt(1))
    assert all(str(tiny_model).encode() not in content for content in held(hub, f"{OWNER}/theirs").values())


def test_only_an_adapter_s_files_are_downloaded(hub, made):
    push_adapter(made, f"{OWNER}/cb")
    repository = hub.repositories[f"{OWNER}/cb"]
    repository.commit(
        {**repository.files("main"), "adapter_model.bin": b"x", "model.safetensors": b"y" * 9, "x.py": b""}
    )
    hub.asked.clear()
    assert sorted(file.name for file in adapter_folder(f"{OWNER}/cb").iterdir()) == FILES
    fetched = {path.rpartition("/")[2] for _, path in hub.asked if "/resolve/" in path}
    assert fetched <= set(FILES)


def test_what_was_downloaded_serves_without_the_hub(hub, made, monkeypatch):
    push_adapter(made, f"{OWNER}/cb")
    folder = adapter_folder(f"{OWNER}/cb")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert adapter_folder(f"{OWNER}/cb") == folder
    said = refusal(adapter_folder, f"{OWNER}/other")
    assert said.startswith(
        f"Adapter {OWNER}/other: there is no such folder, and as a hub id it can't be had (HF_HUB_OFFL"
    )


def test_hub_ids_that_hold_nothing(hub):
    assert "shows no such repository" in refusal(adapter_folder, "nobody/nothing")
    repository = hub.repositories[f"{OWNER}/empty"] = Repository()
    repository.commit({"config.json": b"{}"})
    assert f"{OWNER}/empty: that hub repository holds no adapter_config.json" in refusal(
        adapter_folder, f"{OWNER}/empty"
    )


def test_a_hub_that_is_not_there(hub, monkeypatch, made):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub can't be reached, and nothing was downloaded before" in refusal(adapter_folder, f"{OWNER}/cb")
    said = refusal(push_adapter, made, f"{OWNER}/cb")
    assert said.startswith(f"Adapter {made} was not pushed to {OWNER}/cb (ConnectError")


def test_a_folder_goes_before_the_hub(hub, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / OWNER).mkdir()
    made.rename(tmp_path / OWNER / "cb")
    assert adapter_folder(f"{OWNER}/cb") == Path(OWNER) / "cb"
    assert not is_hub_id(f"{OWNER}/cb")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "../x", "a/b/c", "a b/c", "a/b@", "./a"])
def test_names_that_are_no_hub_ids_ask_no_one(hub, name):
    assert hub_adapter(name) is None
    assert refusal(adapter_folder, name).startswith(
        f"Adapter {Path(name)}: there is no such folder; give a run's folder"
    )
    assert hub.asked == []


# what keeps a push from happening


def test_a_push_that_can_not_be_is_refused_before_anything_is_asked(hub, made, monkeypatch):
    assert "that is no name of a hub repository; give owner/name" in refusal(push_adapter, made, "/runs/cb")
    monkeypatch.delenv("HF_TOKEN")
    said = refusal(push_adapter, made, f"{OWNER}/cb")
    assert said.endswith("there is no token of the hub here; log in by `hf auth login`, or set HF_TOKEN to a token "
                         "that may write.")  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it, or push later by `ptp push`." in refusal(require_can_push, f"{OWNER}/cb")
    assert hub.asked == []


def test_a_hub_that_refuses(hub, made, monkeypatch):
    assert "You don't have the rights to create a model under other" in refusal(push_adapter, made, "other/cb")
    hub.refused = "/commit/"
    said = refusal(push_adapter, made, f"{OWNER}/cb")
    assert said.startswith(f"Adapter {made} was not pushed to {OWNER}/cb (")
    assert "You may not write to this repository." in said
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "was not pushed" in refusal(push_adapter, made, f"{OWNER}/new")


def test_what_is_no_whole_adapter_is_not_pushed(hub, made):
    (made / "adapter_model.safetensors").write_bytes(b"x" * 40)
    assert "is damaged" in refusal(push_adapter, made, f"{OWNER}/cb")
    (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
    assert "adapters in pickle files are not loaded" in refusal(push_adapter, made, f"{OWNER}/cb")
    assert hub.asked == []


# the commands


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch) -> RunConfig:
    """A run of two steps on the packaged CB rows."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return RunConfig(
        model=str(tiny_model), task="CB", max_steps=2, prompt_length=4, batch_size=4, perturbation="none", lr=0.3,
        output_dir=str(tmp_path / "run"), push_to_hub=f"{OWNER}/cb", eval_tokens=600,
    )  # fmt: skip


def test_a_run_is_pushed_and_evaluated_by_its_hub_id(hub, run, tmp_path, tiny_model, capfd, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    assert train(replace(run, model=tiny_model.name)) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_model.name, "as --model said it"
    monkeypatch.chdir(tmp_path)
    assert f"pushed: {hub.endpoint}/{OWNER}/cb\n" in capfd.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert all(str(tmp_path).encode() not in content for content in held(hub, f"{OWNER}/cb").values())
    argv = ["--adapter", f"{OWNER}/cb", "--model", str(tiny_model), "--json", str(tmp_path / "scores.json")]
    assert evaluate(argv) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["metrics"] == result["metrics"]
    assert scores["untrained"] == result["untrained"]
    assert evaluate(argv[:2]) == 2
    assert "doesn't say which model it was trained on; give --model." in capfd.readouterr().err


def test_a_failed_push_loses_nothing_and_says_what_to_run(hub, run, tmp_path, capfd):
    hub.refused = "/commit/"
    said = refusal(train, run)
    command = f"ptp push --adapter {tmp_path / 'run'} {OWNER}/cb"
    assert said.endswith(f"; the run is saved whole, so push it by `{command}`.")
    assert (tmp_path / "run" / "result.json").is_file()
    assert push(command.split()[2:]) == 2
    assert "You may not write to this repository." in capfd.readouterr().err
    hub.refused = None
    assert push(command.split()[2:]) == 0
    assert list(held(hub, f"{OWNER}/cb")) == FILES


def test_a_run_that_could_not_push_does_not_start(hub, run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token of the hub here" in refusal(train, run)
    assert not (tmp_path / "run").exists()


def test_a_population_is_not_pushed(run):
    said = refusal(train, replace(run, seeds="0 1"))
    assert said.startswith("--push_to_hub pushes one prompt; leave it out with --seeds and --population")


def test_a_visibility_without_a_push_has_no_effect():
    said = describe_unread(RunConfig(hub_visibility="private"), {"hub_visibility"})
    assert "--hub_visibility has no effect with no --push_to_hub" in said
    assert not [
        one for one in describe_unread(RunConfig(hub_visibility="private", push_to_hub="a/b"), set()) if "hub" in one
    ]


def test_another_run_does_not_push_to_the_first_one_s_repository(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"run": {"task": "CB", "push_to_hub": "a/b", "output_dir": "x"}}))
    run, _ = parse_run(["--config", str(tmp_path / "config.json")])
    assert (run.task, run.push_to_hub, run.output_dir) == ("CB", None, None)
