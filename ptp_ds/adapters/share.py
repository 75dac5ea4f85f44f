"""Pushing an adapter to the hub: its files without a path of this machine, under a name that others can load."""

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ptp_ds.adapters.card import OWN_ID, model_card
from ptp_ds.adapters.hub import hub_model, is_hub_id, is_repo_name
from ptp_ds.adapters.origin import warn_if_overtaken
from ptp_ds.adapters.peft_format import CARD_FILE, CONFIG_FILE, README_FILE, WEIGHTS_FILE
from ptp_ds.adapters.read import adapter_config, adapter_folder, read_adapter, read_card
from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, read_text, shipped_names
from ptp_ds.hosts.hub import hub_reason
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.ranks.log import get_logger
from ptp_ds.redact import redacted

log = get_logger(__name__)
_OF_THE_MACHINE = ("output_dir", "resume", "nvme_path", "init_adapter", "population", "data_dir")  # settings: its paths
_FILES = ("ds_config", "perturbation", "task")  # settings that may be files, whose last part tells
_OWN_WORDS = ("init_text", "mask_token")  # settings that are words, whatever they look like
_PATH = re.compile(r"(?<![\w.:/~-])(?:~/|/)[^\s'\"`,;:()\[\]{}]+")  # absolute, or below a home, in a text
_TAG = re.compile("^base_model:adapter:")  # in tags that peft writes: the model behind it
_OWNERS = ("license", "license_name", "license_link", "language")  # of README.md: what an owner adds


def push_adapter(folder: str | Path, repo_id: str, private: bool = False, *, base_model: str | None = None) -> str:
    """Makes a repository of the hub, where there is none, and commits the adapter's files to it; returns its URL.

    folder: an adapter's, ours or peft's, or its run's. repo_id: owner/name, or a name in the token's own account.
    private: whether a new repository is; one that exists keeps what it is. base_model: the model's hub id, for an
    adapter that was trained on a folder. What is pushed names no path of this machine (see shared_files). Raises
    UserError for what is no adapter, without a token, and where the hub refuses or can't be reached.
    """
    folder = adapter_folder(folder)
    require_can_push(repo_id)
    read_adapter(folder)
    if base_model is not None and not is_repo_name(base_model):
        raise UserError(f"The base model is {brief(base_model)}; expected its hub id, owner/name.")
    files = shared_files(folder, base_model)
    warn_if_overtaken(folder)
    if json.loads(files[CONFIG_FILE])["base_model_name_or_path"] is None:
        log.warning(
            "warning: the adapter was trained on a model in a folder, which is not named where it is pushed to; "
            "--base_model gives its hub id"
        )
    try:
        return _upload(folder, files, repo_id, private)
    except Exception as error:  # the hub client raises many types: 401, 403, no connection, timeouts
        raise UserError(f"Adapter {folder} was not pushed to {repo_id} ({hub_reason(error)}).") from error


def require_can_push(repo_id: str) -> None:
    """UserError where nothing could be pushed from here: no repository's name, no token, HF_HUB_OFFLINE. Asks none."""
    from huggingface_hub import get_token, is_offline_mode

    why = f"Can't push to {brief(repo_id)}"
    if not is_repo_name(repo_id):
        raise UserError(f"{why}: that is no name of a hub repository; give owner/name, or a name for your own account.")
    if is_offline_mode():
        raise UserError(f"{why}: HF_HUB_OFFLINE is set; unset it, or push later by `ptp push`.")
    try:
        token = get_token()
    except Exception as error:  # tokens of other services are fetched, and may fail in many ways
        raise UserError(f"{why}: its token can't be had ({hub_reason(error)}).") from None
    if token is None:
        raise UserError(
            f"{why}: there is no token of the hub here; log in by `hf auth login`, or set HF_TOKEN to a token that may "
            "write."
        )


def _upload(folder: Path, files: Mapping[str, str], repo_id: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi(library_name="ptp_ds")
    with _without_bars(), tempfile.TemporaryDirectory(prefix="ptp_ds-push-") as work:
        made = api.create_repo(repo_id, private=private or None, exist_ok=True)
        for name, text in files.items():
            (Path(work) / name).write_text(text.replace(OWN_ID, made.repo_id), encoding="utf-8")
        shutil.copyfile(folder / WEIGHTS_FILE, Path(work) / WEIGHTS_FILE)
        api.upload_folder(repo_id=made.repo_id, folder_path=work, commit_message="Adapter by ptp_ds")
    return str(made)


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def shared_files(folder: Path, base_model: str | None = None) -> dict[str, str]:
    """The adapter's texts as others may read them, by file; its weights are shared as they are.

    adapter_config.json and ptp_ds.json name models and data by their hub ids alone; README.md is the folder's, as its
    owner left it, or one made anew where it isn't there or names a path of this machine, with a warning where that
    drops words that aren't ours. base_model: see push_adapter.
    """
    config, card = redacted(adapter_config(folder)), redacted(read_card(folder))
    model = base_model or hub_model(config.get("base_model_name_or_path"), card)
    shared = shareable_card(card, base_model)
    own = config | {"base_model_name_or_path": model}
    if "tokenizer_name_or_path" in config:
        own["tokenizer_name_or_path"] = config["tokenizer_name_or_path"] and model
    texts = {CONFIG_FILE: json.dumps(own, indent=2) + "\n"}
    if card:
        texts[CARD_FILE] = json.dumps(shared, indent=2) + "\n"
    paths = [*_paths_of(config, card), *_base_models(folder, model)]
    first = model_card(config.get("base_model_name_or_path"), card)
    return texts | {README_FILE: _readme(folder, model_card(model, shared), first, paths, base_model is not None)}


def _paths_of(config: Mapping[str, Any], card: Mapping[str, Any]) -> list[str]:
    """The paths of this machine in an adapter's texts: absolute ones, and whatever else others don't get of them.

    A name without a slash may be any word of a text, and what the package brings lies on every machine; they are no
    paths here.
    """
    told = {name: part for name, part in card.items() if name != "task"}
    model = hub_model(config.get("base_model_name_or_path"), card)
    names = {name: config.get(name) for name in ("base_model_name_or_path", "tokenizer_name_or_path")}
    left = [*_dropped(names, dict.fromkeys(names, model)), *_dropped(told, shareable_card(card))]
    ours = {f"ds_configs/{name}" for name in shipped_names("ds_configs", ".json")}
    absolute = _PATH.findall(json.dumps([config, told], ensure_ascii=False))
    return [*absolute, *(path for path in left if "/" in path and path not in ours)]


def _dropped(before: Any, after: Any) -> Iterator[str]:
    """The texts of plain data that are others, or missing, in what is shared of it."""
    if isinstance(before, str) and before != after:
        yield before
    elif isinstance(before, dict):
        for name, part in before.items():
            yield from _dropped(part, after.get(name) if isinstance(after, dict) else None)
    elif isinstance(before, list):
        same = isinstance(after, list) and len(after) == len(before)
        for part, shared in zip(before, after if same else [None] * len(before), strict=True):
            yield from _dropped(part, shared)


def _base_models(folder: Path, model: str | None) -> list[str]:
    """Models in the metadata of the folder's README.md, peft's tags included, that are no hub ids, nor the one that is
    pushed."""
    from huggingface_hub import ModelCard

    file = folder / README_FILE
    try:
        held = ModelCard(read_text(file, str(file))).data.to_dict() if is_file(file) else {}
    except Exception:  # of YAML, and of the hub client's checks: a README of no metadata
        return []
    said, tags = held.get("base_model"), held.get("tags")
    found = [*(said if isinstance(said, list) else [said])]
    found += [_TAG.sub("", tag) for tag in (tags if isinstance(tags, list) else []) if _TAG.match(str(tag))]
    return [name for name in found if isinstance(name, str) and name != model and not is_hub_id(name)]


def _readme(folder: Path, made: str, first: str, paths: list[str], anew: bool) -> str:
    """The folder's README.md; `made`, with what an owner adds to the metadata, where that one can't be shared.

    first: as the adapter was written with. paths: of this machine. anew: whether it says too little anyway.
    """
    from huggingface_hub import ModelCard

    file, where = folder / README_FILE, f"Adapter {folder}: {README_FILE}"
    if not is_file(file):
        return made
    text = read_text(file, where)
    named = next((path for path in paths if _names(text, path)), None)
    if not anew and named is None:
        return text
    if text != first:
        why = "doesn't know what --base_model says" if named is None else f"names {brief(named)} of this machine"
        log.warning(
            "warning: %s %s, so one made anew is pushed, with its license and language but without its text, which "
            "can be added on the hub", where, why,
        )  # fmt: skip
    try:
        own = ModelCard(text).data.to_dict()
    except Exception as error:  # of YAML, and of the hub client's checks
        raise UserError(f"{where}: its metadata can't be read ({hub_reason(error)}); mend or remove it.") from None
    card = ModelCard(made)
    for name in _OWNERS:
        if name in own:
            card.data[name] = own[name]
    return str(card)


def _names(text: str, path: str) -> bool:
    """Whether a text names a path, or one below it, and not an address or another path that holds the same letters."""
    return re.search(rf"(?<![\w.~-]){re.escape(path)}(?![\w~-]|\.\w)", text) is not None


def shareable_card(card: Mapping[str, Any], base_model: str | None = None) -> dict[str, Any]:
    """ptp_ds.json for others: folders of this machine are left out, files are named by their last part.

    The task, whose text may look like anything, stays as it is. base_model: the hub id that the model gets.
    """
    shared = dict(card)
    model, data, result = (card.get(name) or {} for name in ("model", "data", "result"))
    said = {"model": model.get("name"), "dataset": data.get("dataset")}
    folders = [name for name, own in said.items() if own not in (None, EMBEDDED_MODEL) and not is_hub_id(own)]
    if model:
        shared["model"] = {**model, "name": base_model or (None if "model" in folders else said["model"])}
    if data.get("data_dir") is not None or "dataset" in folders:
        shared["data"] = {"data_dir": None, "dataset": None, "elsewhere": True}
    if result:
        shared["result"] = _named(result, folders)
        if isinstance(settings := result.get("settings"), dict):
            shared["result"]["settings"] = _named(settings, folders)
    return {name: part if name == "task" else _without_paths(part) for name, part in shared.items()}


def _named(settings: Mapping[str, Any], folders: Collection[str]) -> dict[str, Any]:
    """Settings, or a result, without paths of the machine; files, and those of `folders`, by their last part."""
    found = {name: None if name in _OF_THE_MACHINE else value for name, value in settings.items()}
    for name in (*_FILES, *folders):
        if isinstance(value := found.get(name), str):
            found[name] = PurePosixPath(value).name
    return found


def _without_paths(value: Any) -> Any:
    """Plain data whose texts hold no absolute path: what stands for one is its last part."""
    if isinstance(value, str):
        return _PATH.sub(lambda found: PurePosixPath(found[0]).name, value)
    if isinstance(value, dict):
        return {name: part if name in _OWN_WORDS else _without_paths(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(part) for part in value]
    return value
