"""Where an adapter comes from: the model and the data of its run, on its card, and what a command that asks for less or
for something else gets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptp_ds.adapters.read import adapter_config, read_card
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import brief, in_moved_run, is_file, is_folder
from ptp_ds.models.identity import difference, model_identity
from ptp_ds.models.source import BackboneSource
from ptp_ds.ranks.log import get_logger
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split, load_split
from ptp_ds.training.checkpoint import gone_on

log = get_logger(__name__)


def model_record(run: RunConfig, source: BackboneSource) -> dict[str, Any]:
    """The card's `model`: name, what --model said, a folder by its absolute path; see model_identity for the rest."""
    return {"name": _lasting(run.model), **model_identity(source.folder, source.config)}


def data_record(run: RunConfig) -> dict[str, Any]:
    """The card's `data`: data_dir or dataset, folders by their absolute paths; neither for the packaged demo data."""
    found = {"data_dir": run.data_dir, "dataset": run.dataset}
    return {name: None if said is None else _lasting(said) for name, said in found.items()}


def _lasting(said: str) -> str:
    return str(Path(said).absolute()) if is_folder(said) else said


def _shown(said: Any) -> str:
    return brief(said)[1:-1] if isinstance(said, str) else brief(said)


def adapter_model(folder: Path, given: str | None) -> str:
    """The model to take: the given one, the one of the adapter's run, or the one that peft's adapter_config.json names.

    Raises ValueError where nothing says, where that model's folder is gone, or where peft names a revision of it.
    """
    if given is not None:
        return given
    card, config = read_card(folder).get("model") or {}, adapter_config(folder)
    for said in (card.get("name"), config.get("base_model_name_or_path")):
        if not isinstance(said, str) or not said:
            continue
        if Path(said).is_absolute() and not is_folder(said):
            raise UserError(
                f"Adapter {folder} was trained on the model in {_shown(said)}, which is gone; give --model."
            )
        if not card and config.get("revision") not in (None, "main") and not is_folder(said):
            raise UserError(
                f"Adapter {folder} was trained on revision {brief(config['revision'])} of {_shown(said)}, and a hub id "
                f"is read at main; give --model a folder with that revision, or --model {_shown(said)} for main."
            )
        return said
    raise UserError(f"Adapter {folder} doesn't say which model it was trained on; give --model.")


def require_trained_on(adapters: Sequence[Path], model: str, folder: Path, config: Any) -> None:
    """ValueError where a model isn't the one of an adapter's run; warns where its config.json alone is another.

    model: as it was asked for. folder, config: where it lies, transformers' configuration. Adapters without our card
    don't say, and pass.
    """
    cards = {adapter: read_card(adapter).get("model") or {} for adapter in adapters}
    if not any(cards.values()):
        return
    identity = model_identity(folder, config)
    for adapter, card in cards.items():
        if why := difference(card, identity):
            theirs = _shown(card["name"]) if card.get("name") is not None else "a model that it doesn't name"
            raise UserError(
                f"Adapter {adapter} was trained on {theirs}, and {model} is another model: {why}; "
                "give the one that it was trained on, or leave --model out."
            )
        if card.get("config_sha256") not in (None, identity["config_sha256"]):
            log.warning(
                "warning: the config.json of %s is not the one that adapter %s was trained with, though family, sizes "
                "and weights are", model, adapter,
            )  # fmt: skip


def warn_if_overtaken(folder: Path) -> None:
    """Warns of an adapter whose run has gone on since it was written; see gone_on."""
    place, result = folder.resolve(), read_card(folder).get("result") or {}
    if place.name == "adapter" and (said := gone_on(place.parent, result.get("steps"))):
        log.warning("warning: adapter %s %s", folder, said)


def adapter_rows(
    folder: Path, task: Task, split: str | None = None, data_dir: str | None = None, dataset: str | None = None
) -> Split:
    """Rows to score an adapter on: of the data that is given, else of its run's. split: None for the one that the run
    reported.

    Warns where the run's data holds other rows in that split by now. Raises ValueError where it is gone, and
    load_split's.
    """
    split = split or adapter_split(folder, task)
    if data_dir is not None or dataset is not None:
        return load_split(task, split, data_dir, dataset)
    found = load_split(task, split, *_trained_data(folder))
    if _digest_on_record(folder, task, split) not in (None, found.digest):
        log.warning(
            "warning: split %r holds other rows than the run of adapter %s read there: they were changed, or another "
            "run's lie in their place; the score is of those that are there now", split, folder,
        )  # fmt: skip
    return found


def reported_rows(folder: Path) -> str | None:
    """The digest of the rows that the adapter's run reported its scores on, None where an older one doesn't say."""
    return _digests(folder).get("eval")


def _digests(folder: Path) -> dict[str, Any]:
    """Of the run's rows, by what they are for."""
    said = (read_card(folder).get("result") or {}).get("rows")
    return said if isinstance(said, dict) else {}


def _digest_on_record(folder: Path, task: Task, split: str) -> str | None:
    """That of the split's rows as the run read them; None for a split that it didn't read, and for another task, whose
    rows are others, or have other labels."""
    spec = read_card(folder).get("task") or {}
    if (spec.get("name"), spec.get("label"), set(spec.get("answers") or ())) != (
        task.name, task.label, set(task.labels)
    ):  # fmt: skip
        return None
    settings = _settings(folder)
    return next((of for use, of in _digests(folder).items() if settings.get(f"{use}_split") == split), None)


def _settings(folder: Path) -> dict[str, Any]:
    """Those of the adapter's run, {} where the card holds none."""
    said = (read_card(folder).get("result") or {}).get("settings")
    return said if isinstance(said, dict) else {}


def adapter_split(folder: Path, task: Task) -> str:
    """The split that the adapter's run reported, where that was of the same task; RunConfig's default otherwise."""
    card = read_card(folder)
    said = (card.get("result") or {}).get("eval_split")
    same = (card.get("task") or {}).get("name") == task.name
    return said if same and isinstance(said, str) and said else RunConfig().eval_split


def _trained_data(folder: Path) -> tuple[str | None, str | None]:
    """(data_dir, dataset) of the adapter's run; says which one is taken. Data in a run's folder moves with it."""
    found = read_card(folder).get("data")
    if found is None:
        log.warning(
            "warning: adapter %s doesn't say which data it was trained on; its score is on the packaged demo rows "
            "without --data_dir or --dataset", folder,
        )  # fmt: skip
        return None, None
    if found.get("elsewhere") is True:
        raise UserError(
            f"Adapter {folder} was trained on data in a folder of another machine; give --data_dir or --dataset."
        )
    for name in ("data_dir", "dataset"):
        said = found.get(name)
        if said is None:
            continue
        if not isinstance(said, str):
            raise UserError(f"Adapter {folder}: the card's {name} is {brief(said)}; expected text or null.")
        if Path(said).is_absolute():
            said = _beside(folder, name) or said
        if (name == "data_dir" or Path(said).is_absolute()) and not is_folder(said):
            raise UserError(
                f"Adapter {folder} was trained on data in {_shown(said)}, which is gone; give --data_dir or --dataset."
            )
        log.info("data of the adapter's run: %s", _shown(said))
        return (said, None) if name == "data_dir" else (None, said)
    return None, None


def _beside(folder: Path, name: str) -> str | None:
    """The data that setting `name` says, in the folder of the run that the adapter lies in; None where it isn't there.

    An adapter that was taken out of its run has no config.json above it.
    """
    run = folder.absolute().parent
    settings = _settings(folder)
    found = in_moved_run(settings.get(name), settings.get("output_dir"), run) if is_file(run / "config.json") else None
    return found if found is not None and is_folder(found) else None


def trained_max_length(folder: Path) -> int | None:
    """--max_length of the adapter's run, None where it had none or doesn't say."""
    said = _settings(folder).get("max_length")
    return said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else None
