"""Which models' files this machine holds: a folder, the hub client's cache, or the embedded model once converted."""

import os
from pathlib import Path

EMBEDDED_MODEL = "smollm2-135m"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the wheel's file
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what is downloaded of a hub repository


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
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except Exception:  # the hub client raises many types; all of them mean that it isn't there
        return None
