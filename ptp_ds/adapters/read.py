"""Reading an adapter, ours or peft's: the prompt, a trained classifier, our card. All is checked before it is used."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptp_ds.adapters.hub import hub_adapter
from ptp_ds.adapters.peft_format import CARD_FILE, CONFIG_FILE, HEAD_PREFIX, PROMPT_KEY, PROMPT_OF_TYPE, WEIGHTS_FILE
from ptp_ds.choices import HEADS
from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, is_folder, listed, open_tensors, read_json, tensor_shape
from ptp_ds.training.checkpoint import saved_steps


def adapter_folder(given: str | Path) -> Path:
    """The adapter's folder: its own, its run's, or that of a hub id, owner/name or owner/name@revision, where no such
    folder is here. ValueError that says what is missing.
    """
    folder = Path(given)
    for found in (folder, folder / "adapter"):
        if is_file(found / CONFIG_FILE):
            return found
    if not is_folder(folder):
        if (downloaded := hub_adapter(str(given))) is not None:
            return downloaded
        raise UserError(
            f"Adapter {folder}: there is no such folder; give a run's folder, or an adapter's, ours or peft's, or its "
            "hub id, owner/name."
        )
    if is_file(folder / "population.json"):
        raise UserError(f"Adapter {folder} holds several prompts; give one of them, {folder / 'members'}/NAME.")
    if is_file(folder / "config.json") and (is_folder(folder / "checkpoints") or is_file(folder / "log.jsonl")):
        steps = saved_steps(folder / "checkpoints")
        ends = f", and with --max_steps {steps[-1]} it ends at its newest checkpoint" if steps else ""
        raise UserError(
            f"Adapter {folder}: the run in that folder has written no adapter yet; let it end, --resume auto goes on "
            f"with it{ends}."
        )
    raise UserError(f"Adapter {folder}: no {CONFIG_FILE} there; give a run's folder, or an adapter's, ours or peft's.")


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json; ValueError where there is none, or no JSON object."""
    folder = Path(folder)
    if not is_file(folder / CONFIG_FILE):
        raise UserError(f"Adapter {folder}: no {CONFIG_FILE} there; give a folder written by this project or peft.")
    config = read_json(folder / CONFIG_FILE, f"Adapter {folder}: {CONFIG_FILE}")
    if not isinstance(config, dict):
        raise UserError(f"Adapter {folder}: {CONFIG_FILE}: expected a JSON object, found {type(config).__name__}.")
    return config


def adapter_kind(folder: str | Path) -> str:
    """soft or deep; ValueError for a folder that holds neither."""
    kind = adapter_config(folder).get("peft_type")
    if not isinstance(kind, str) or kind not in PROMPT_OF_TYPE:
        raise UserError(f"Adapter {folder} is of peft type {brief(kind)}; expected {', '.join(PROMPT_OF_TYPE)}.")
    return PROMPT_OF_TYPE[kind]


def read_adapter(
    folder: str | Path, width: int | None = None, length: int | None = None, kind: str | None = None
) -> Tensor:
    """The prompt [P, H], or [P, D] of a deep one, fp32. width, length, kind: what the run needs, checked if given.

    Reads the header before the data and loads safetensors only. Raises ValueError with what is wrong.
    """
    folder = Path(folder)
    found = adapter_kind(folder)
    if kind is not None and found != kind:
        raise UserError(f"Adapter {folder} holds a {found} prompt; set --prompt {found}.")
    file, where = folder / WEIGHTS_FILE, f"Adapter {folder}: {WEIGHTS_FILE}"
    if not is_file(file):
        raise UserError(f"Adapter {folder}: no {WEIGHTS_FILE}; adapters in pickle files are not loaded.")
    with open_tensors(file, where) as handle:
        names = list(handle.keys())
        if [name for name in names if not name.startswith(HEAD_PREFIX)] != [PROMPT_KEY]:
            raise UserError(f"Adapter {folder} holds {listed(names)}; expected {PROMPT_KEY} alone.")
        shape = tensor_shape(handle, PROMPT_KEY, where)
        if len(shape) != 2 or not all(shape):
            raise UserError(f"Adapter {folder}: the prompt has shape {brief(shape)}; expected [length, width].")
        if width is not None and shape[1] != width:
            raise UserError(f"Adapter {folder} has width {shape[1]}, the model's is {width}: another model's adapter.")
        tokens = _tokens_used(folder, shape[0])
        if length is not None and tokens != length:
            raise UserError(f"Adapter {folder} has {tokens} tokens; set --prompt_length {tokens}.")
        prompt = handle.get_tensor(PROMPT_KEY)[:tokens].float()
    if not bool(torch.isfinite(prompt).all()):
        raise UserError(f"Adapter {folder}: the prompt holds values that are not finite.")
    return prompt


def _tokens_used(folder: Path, rows: int) -> int:
    """How many of a prompt's saved rows stand before the input: num_virtual_tokens, all of them as a rule.

    peft saves a soft prompt of an encoder-decoder once for each of num_transformer_submodules, and uses (and trains)
    the first alone. ValueError where the rows are of another number.
    """
    config = adapter_config(folder)
    tokens, submodules = config.get("num_virtual_tokens"), config.get("num_transformer_submodules") or 1
    if tokens in (None, rows):
        return rows
    if isinstance(tokens, int) and adapter_kind(folder) == "soft" and rows == tokens * submodules:
        return tokens
    raise UserError(
        f"Adapter {folder}: the prompt has {rows} rows, and {CONFIG_FILE} says num_virtual_tokens {brief(tokens)}; "
        "expected a row for each, so give both files as they were saved together."
    )


def read_head(
    folder: str | Path, wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The trained head's tensors beside an adapter's prompt, fp32, by the model's names.

    wanted: names and shapes that the model has. held: see Head; what an adapter lacks of it, from before it was
    trained, is as the model has it. ValueError where the adapter's differ.
    """
    return fitted_head(folder, stored_head(folder), wanted, held)


def stored_head(folder: str | Path) -> dict[str, Tensor]:
    """All that was trained beside an adapter's prompt, fp32, by the file's names; {} for a prompt alone."""
    where = f"Adapter {folder}: {WEIGHTS_FILE}"
    with open_tensors(Path(folder) / WEIGHTS_FILE, where) as handle:
        names = _head_names(handle)
        for name in names:
            tensor_shape(handle, name, where)
        return {name: handle.get_tensor(name).float() for name in names}


def fitted_head(
    folder: str | Path, stored: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]],
    held: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What `stored_head` found in `folder`, as a model has it; see read_head."""
    found = {name.removeprefix(HEAD_PREFIX): tensor for name, tensor in stored.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    lacking = {name: tensor for name, tensor in (held or {}).items() if shapes and name not in shapes}
    if shapes != {name: shape for name, shape in wanted.items() if name not in lacking} or len(shapes) < len(stored):
        raise UserError(
            f"Adapter {folder} holds a head of {brief(shapes) if shapes else 'nothing'}; "
            f"this model and task need {dict(wanted) or 'none'}."
        )
    for name, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"Adapter {folder}: {name} holds values that are not finite.")
    return {name: found[name] if name in found else lacking[name] for name in wanted}


def head_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names, the model's, and shapes of what was trained beside an adapter's prompt; {} for a prompt alone."""
    where = f"Adapter {folder}: {WEIGHTS_FILE}"
    with open_tensors(Path(folder) / WEIGHTS_FILE, where) as handle:
        return {name.removeprefix(HEAD_PREFIX): tensor_shape(handle, name, where) for name in _head_names(handle)}


def _head_names(handle: Any) -> list[str]:
    return [name for name in handle.keys() if name != PROMPT_KEY]  # noqa: SIM118


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card beside an adapter of ours, empty for one of peft's own; ValueError for one that isn't as we write it."""
    file = Path(folder) / CARD_FILE
    if not os.path.lexists(file):
        return {}
    where = f"Adapter {folder}: {CARD_FILE}"
    card = read_json(file, where)
    if not isinstance(card, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(card).__name__}.")
    for name in ("task", "head", "result", "model", "data"):
        if not isinstance(card.get(name), dict | None):
            raise UserError(f"{where}: {name} is {brief(card[name])}; expected a JSON object.")
    kind, answers = (card.get("head") or {}).get("kind", HEADS[0]), (card.get("task") or {}).get("answers")
    if kind not in HEADS:
        raise UserError(f"{where}: the head is of kind {brief(kind)}; expected {', '.join(HEADS)}.")
    if not isinstance(answers, dict | None):
        raise UserError(f"{where}: the task's answers are {brief(answers)}; expected a JSON object.")
    return card
