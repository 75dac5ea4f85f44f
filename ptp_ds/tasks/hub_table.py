"""A split of a hub data set, or of a local folder in the hub's layout: which of its configurations is read."""

from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import listed


def load_table(dataset: str, name: str, split: str) -> tuple[Any, str]:
    """(the table, its configuration) of a task's name: the configuration of that name in small letters, else the one
    that differs from it in case, hyphens and the like alone, else the only one that there is.

    Raises UserError where none of them is there, or what is there can't be loaded.
    """
    import datasets

    named = name.lower()
    try:
        return datasets.load_dataset(dataset, named, split=split), named
    except Exception as error:  # the loader raises many types: offline, unknown repository, configuration or split
        first = error
    found = _configurations(dataset)
    if not found or named in found:
        raise _unloaded(dataset, named, split, first)
    near = [one for one in found if _letters(one) == _letters(name)]
    chosen = near if len(near) == 1 else found
    if len(chosen) > 1:
        raise UserError(
            f"--dataset {dataset} has the configurations {listed(found)}, and none is called {named!r}: the template's "
            "name, in small letters, says which one is read; give the template the name of one of them."
        )
    try:
        return datasets.load_dataset(dataset, chosen[0], split=split), chosen[0]
    except Exception as error:  # as above
        raise _unloaded(dataset, chosen[0], split, error) from None


def _configurations(dataset: str) -> list[str]:
    """Names of the data set's configurations; none where they can't be told."""
    import datasets

    try:
        return datasets.get_dataset_config_names(dataset)
    except Exception:  # as above; what load_dataset raised says why
        return []


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _unloaded(dataset: str, configuration: str, split: str, error: Exception) -> UserError:
    said = str(error).strip().split("\n")[0].rstrip(".")
    return UserError(
        f"--dataset {dataset}: can't load configuration {configuration!r}, split {split!r} "
        f"({type(error).__name__}: {said})."
    )
