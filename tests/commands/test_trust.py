"""What a run trusts: no pickle is opened, no code of a model folder runs, no path leads out, no secret is written."""

import ast
import json
import os
import pickle
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptp_ds.adapters.read import adapter_kind, read_adapter, read_card
from ptp_ds.adapters.write import write_adapter
from ptp_ds.backbone.loading import load_backbone
from ptp_ds.backbone.shapes import config_of, shape_of
from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.commands.predict import main as predict
from ptp_ds.files import write_json
from ptp_ds.models.source import load_config, load_tokenizer
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.redact import is_secret, redacted
from ptp_ds.tasks import load_task
from ptp_ds.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tests.support.paths import ROOT

WHOLE = ResolvedDeepSpeed({"zero_optimization": {"stage": 2}}, [], torch.float32)
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
PICKLES = ("adapter_model.bin", "pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin", "state.pkl",
           "mp_rank_00_model_states.pt", "latest", "events.pickle", "prompt.npy", "rng_state.pth")  # fmt: skip
SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnop", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+b",
    "WANDB_API_KEY": "0123456789ab", "MY_SECRET_THING": "quote\"and\\slash", "DB_PASSWORD": "correct horse battery",
}  # fmt: skip


class _Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def plant(tmp_path) -> Callable[[Path], None]:
    """plant(folder) puts every kind of malicious pickle into a folder."""

    def planted(folder: Path) -> None:
        for name in PICKLES:
            (folder / name).write_bytes(pickle.dumps(_Bomb(tmp_path / f"ran-{name}")))

    return planted


@pytest.fixture
def no_pickle(monkeypatch) -> None:
    """Every way into a pickle raises."""

    def refuse(*args: object, **options: object) -> None:
        pytest.fail("a pickle was opened")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)


class _Opened:
    """Names of the files that are opened while it is on; an audit hook stays for the process' life."""

    def __init__(self) -> None:
        self.on, self.names = False, set[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.on and event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            self.names.add(os.path.basename(os.fsdecode(args[0])))


@pytest.fixture(scope="module")
def opened() -> _Opened:
    """The one hook of this module."""
    return _Opened()


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def adapter(tiny_model, tmp_path) -> Path:
    """A prompt of four tokens for RTE."""
    card = {"task": load_task("RTE").spec(), "head": {"kind": "causal"}}
    write_adapter(tmp_path / "adapter", torch.randn(4, 32), "model", load_config(tiny_model), card)
    return tmp_path / "adapter"


# pickles


def test_planted_pickles_are_never_opened(model, adapter, plant, no_pickle, opened, tmp_path, capsys):
    tensors = {name: torch.zeros(4, 32) for name in ("prompt", "exp_avg", "exp_avg_sq")}
    saved = save_checkpoint(tmp_path, Checkpoint(1, {**tensors, "adam_step": torch.ones(1)}, None, {}), keep=1)
    for folder in (model, adapter, saved):
        plant(folder)
    opened.on = True
    try:
        assert load_checkpoint(saved).step == 1
        code = predict(["--adapter", str(adapter), "--model", str(model), "--text", "premise=It rains.",
                        "hypothesis=It is wet.", "--generate", "2"])  # fmt: skip
    finally:
        opened.on = False
    assert code == 0, capsys.readouterr().err
    assert "adapter_config.json" in opened.names, "the hook sees what is opened"
    assert not opened.names & set(PICKLES)
    assert not list(tmp_path.glob("ran-*"))


def test_a_planted_pickle_would_run(plant, tmp_path):
    plant(tmp_path)
    pickle.loads((tmp_path / PICKLES[0]).read_bytes())
    assert (tmp_path / f"ran-{PICKLES[0]}").is_dir(), "or the test above proves nothing"


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_in_pickles_alone_are_refused(model, plant, no_pickle, stage):
    (model / "model.safetensors").unlink()
    plant(model)
    resolved = ResolvedDeepSpeed({"zero_optimization": {"stage": stage}}, [], torch.float32)
    with pytest.raises(ValueError, match=r"holds no model\.safetensors; .*pickle files are never loaded"):
        load_backbone(model, resolved, ALONE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"index\.json names 'pytorch_model\.bin'; only \.safetensors files are loaded"),
        ("../model/model.safetensors", r"index\.json: a file's name is '\.\./model/.*; expected a plain name"),
        ("/etc/passwd", r"index\.json: a file's name is '/etc/passwd'; expected a plain name"),
        (7, r"index\.json names '7'; only \.safetensors files are loaded"),
    ],
)
def test_an_index_that_leads_elsewhere(model, plant, no_pickle, name, message):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    plant(model)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_backbone(model, WHOLE, ALONE)


def test_an_index_within_the_folder_is_followed(model):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_backbone(model, WHOLE, ALONE).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_a_model_folder_that_holds_an_adapter(model, plant, no_pickle):
    plant(model)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ValueError, match=r"model holds adapter_config\.json; give a folder of a whole model"):
        load_backbone(model, WHOLE, ALONE)


def _calls(file: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_source_has_no_way_into_a_pickle():
    files = [*ROOT.glob("ptp_ds/**/*.py"), *ROOT.glob("scripts/**/*.py"), ROOT / "setup.py"]
    loads = []
    for file in files:
        source = file.read_text(encoding="utf-8")
        assert not re.search(r"\b(import|from) (pickle|dill|joblib|marshal|shelve|cloudpickle)\b", source), file
        for name, call in _calls(file):
            options = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in ("torch.load", "np.load", "numpy.load"), file
            assert not name.endswith((".load_checkpoint", "load_state_dict_from_url")), file
            assert options.get("trust_remote_code", "False") == "False", file
            if name.endswith(".from_pretrained") and not re.search("Config|Tokenizer", name):
                loads.append(file.name)
                assert options.get("use_safetensors") == "True" or "gguf_file" in options, (file, name)
    assert sorted(loads) == ["bench_sides.py", "loading.py", "lora_line.py", "served.py", "source.py"]


# code in a model's folder


def _add_code(folder: Path, marker: Path, **config: object) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: ...\n")
    parts = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    for name in ("config.json", "tokenizer_config.json"):
        known = json.loads((folder / name).read_text())
        tokenizer = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        change = {"auto_map": parts, **config} if name == "config.json" else {"auto_map": tokenizer}
        (folder / name).write_text(json.dumps({**known, **change}))


def test_code_of_a_known_family_is_not_run(model, tmp_path):
    _add_code(model, tmp_path / "ran")
    assert load_config(model).model_type == "llama"
    load_tokenizer(model)
    load_backbone(model, WHOLE, ALONE)
    assert not (tmp_path / "ran").exists()


def test_a_family_that_needs_its_own_code_is_refused(model, tmp_path):
    _add_code(model, tmp_path / "ran", model_type="evil")
    with pytest.raises(ValueError, match=r"config\.json describes no model that transformers knows"):
        load_config(model)
    assert not (tmp_path / "ran").exists()


def test_attention_code_from_elsewhere_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/kernel"}))
    with pytest.raises(ValueError, match=r"config\.json asks for attention code from elsewhere, 'someone/kernel'"):
        load_config(model)
    with pytest.raises(ValueError, match=r"config\.json asks for attention code from elsewhere, 'someone/kernel'"):
        config_of(str(model))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_the_attention_that_config_json_names_is_not_asked_for(model, key):
    """Packed rows have ours; its package, or what transformers fetches in its place, isn't needed."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: "flash_attention_2"}))
    assert load_backbone(model, WHOLE, ALONE).model.config.model_type == "llama"
    assert shape_of(config_of(str(model))).count == 2
    parts = {"model_type": "gemma3", "text_config": {key: "flash_attention_2"}, "vision_config": {key: "a/kernel"}}
    (model / "config.json").write_text(json.dumps(parts))
    found = load_config(model)
    assert {part._attn_implementation for part in (found, found.text_config, found.vision_config)} == {None}


# headers and sizes


def _grown_mib(call: Callable[[], object], message: str) -> float:
    """MiB by which a refusal raised this process' peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize(
    ("length", "size", "message"),
    [
        (1 << 60, 1000, "is damaged .its header doesn't fit into its 1000 bytes"),
        ((1 << 64) - 1, 1000, "is damaged .its header doesn't fit"),
        (100 << 20, 200 << 20, r"has a header of 104857600 bytes; expected at most 1048576\."),
    ],
)
def test_huge_headers(adapter, length, size, message):
    with (adapter / "adapter_model.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(size)
    assert _grown_mib(lambda: read_adapter(adapter), rf"adapter_model\.safetensors {message}") < 16


def test_a_json_file_of_100_mb(adapter):
    with (adapter / "adapter_config.json").open("wb") as file:
        file.truncate(100 << 20)
    message = r"adapter_config\.json: 104857600 bytes; expected at most 16777216\."
    assert _grown_mib(lambda: adapter_kind(adapter), message) < 16


def test_a_prompt_of_absurd_shape(adapter):
    shape = [1 << 14, 1 << 16]  # 4 GiB that the disk doesn't hold
    header = json.dumps({"prompt_embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 32]}}).encode()
    with (adapter / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 32))
    message = r"prompt_embeddings' has shape \(16384, 65536\), more than 268435456 numbers"
    assert _grown_mib(lambda: read_adapter(adapter), message) < 16


def test_prompts_of_whole_numbers_are_refused(adapter):
    save_file({"prompt_embeddings": torch.ones(4, 32, dtype=torch.int64)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="'prompt_embeddings' is of type I64; expected one of F64, F32, F16, BF16"):
        read_adapter(adapter)


def test_a_file_that_may_not_be_read(adapter, monkeypatch):
    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ptp_ds.files.os.open", refuse)
    for read in (adapter_kind, read_card):
        with pytest.raises(ValueError, match=r"^Adapter .*\.json: Permission denied\.$"):
            read(adapter)


# secrets


@pytest.fixture
def secrets(monkeypatch) -> None:
    """SECRETS in this process' environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_which_variables_are_secret():
    held = ["HF_TOKEN", "OPENAI_API_KEY", "MLFLOW_TRACKING_PASSWORD", "my_secret", "AWS_SECRET_ACCESS_KEY", "KEY"]
    assert all(map(is_secret, held))
    free = ["TOKENIZERS_PARALLELISM", "PATH", "PWD", "KEYBOARD", "MASTER_ADDR", "NCCL_SOCKET_IFNAME", "OLDPWD"]
    assert not any(map(is_secret, free))


def test_redacted_data_keeps_the_rest():
    environment = {"HF_TOKEN": "hf_abcdefgh", "LONG_KEY": "hf_abcdefghijk", "SHORT_KEY": "cb", "HOME": "/home/someone"}
    value = {"model": "https://u:hf_abcdefghijk@host", "text": "cb hf_abcdefgh.", "list": ["/home/someone", 1.5, None]}
    expected = {"model": "https://u:[secret]@host", "text": "cb [secret].", "list": ["/home/someone", 1.5, None]}
    assert redacted(value, environment) == expected
    assert redacted(value, {}) == value


def test_json_and_adapters_hold_no_secret(secrets, tmp_path, tiny_model):
    said = " ".join(SECRETS.values())
    write_json(tmp_path / "config.json", {"run": {"init_text": said, "seed": 3}})
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "run": {"init_text": " ".join(["[secret]"] * 5), "seed": 3}
    }
    card = {"task": {"name": "CB", "text": said}, "result": {"model": said}}
    write_adapter(tmp_path / "adapter", torch.zeros(4, 32), f"/models/{said}", load_config(tiny_model), card)
    assert leaks(tmp_path) == []


def leaks(folder: Path, *texts: str) -> list[str]:
    """Where a secret stands: files below a folder, or texts; as it is, or as JSON spells it."""
    places = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    places |= {f"text {number}": text.encode() for number, text in enumerate(texts)}
    spelled = {
        part.encode() for value in SECRETS.values() for part in (value, json.dumps(value)[1:-1], repr(value)[1:-1])
    }
    return [place for place, content in places.items() if any(secret in content for secret in spelled)]


def test_a_run_writes_no_secret(run_train, tmp_path, tiny_model):
    said = " ".join(["shown", *SECRETS.values()])
    base = ["--model", str(tiny_model), "--task", "CB", "--prompt_length", "4", "--max_steps", "1", "--ds_config",
            "ds_configs/zero2.json", "--log_every", "1", "--output_dir", "out"]  # fmt: skip
    done = run_train([*base, "--prompt_init", "text", "--init_text", said], env=SECRETS)
    assert done.returncode == 0, done.stderr
    written = {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {"config.json", "result.json", "log.jsonl", "state.json", "ptp_ds.json"} <= written
    assert json.loads((tmp_path / "out" / "config.json").read_text())["run"]["init_text"].startswith("shown [secret] ")
    assert leaks(tmp_path, done.stdout, done.stderr) == []


def test_error_messages_hold_no_secret(secrets, tmp_path, monkeypatch, capfd):
    from ptp_ds.commands.train import main

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(["--model", f"https://user:{SECRETS['HF_TOKEN']}@host/x"]) == 2
    printed = capfd.readouterr()
    assert "error: Unknown model 'https://user:[secret]@host/x'" in printed.err
    assert leaks(tmp_path, printed.out, printed.err) == []
