"""Why the hub can't be had, in words."""

from ptp_ds.files import brief


def hub_reason(error: BaseException) -> str:
    """Why the hub refused or could not be reached, on one line."""
    from huggingface_hub import errors

    held = "not all of it" if isinstance(error, errors.IncompleteSnapshotError) else "nothing"
    known = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
        errors.LocalEntryNotFoundError: f"the hub can't be reached, and {held} was downloaded before",
        errors.GatedRepoError: "the hub gives it to those alone who accepted its terms: accept them on its page there, "
        "and run `hf auth login`, or set HF_TOKEN",
        errors.RepositoryNotFoundError: "the hub shows no such repository, or not to this token",
        errors.RevisionNotFoundError: "the hub's repository has no such revision",
    }
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {held} was downloaded before"
    for kind, words in known.items():
        if isinstance(error, kind):
            return words
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {brief(first, 160)[1:-1]}" if first else type(error).__name__
