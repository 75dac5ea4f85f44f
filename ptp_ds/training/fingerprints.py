"""Do all ranks see the same? Hosts with disks of their own may hold another data file, model or checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ptp_ds.errors import UserError
from ptp_ds.files import sha256_of
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.checkpoint import WEIGHTS, Checkpoint

_PRECISION = "the precision that auto chooses"
_REMEDY = "put it on a disk that all hosts share, or copy the same to each host"
_REMEDIES = {_PRECISION: "the hosts' processors differ: give --precision"}


def fingerprints(
    digests: Mapping[str, str], model_folder: Path, checkpoint: Checkpoint | None, identity: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, str]:  # fmt: skip
    """What must be the same on every rank, by name; equal texts mean equal things. digests: of each split's rows.

    dtype: the backbone's, which --precision auto takes from each host's processor.
    """
    found = {f"the {name} split's rows": digest for name, digest in digests.items()}
    found["the model's files"] = f"{_model_files(model_folder)} {identity.get(WEIGHTS)}"
    found["the checkpoint to resume from"] = _checkpoint(checkpoint)
    found[_PRECISION] = str(dtype)  # before the settings, which hold it, too
    found["the run's settings"] = json.dumps(identity)  # in their order, for a task's answers have one
    return found


def _model_files(folder: Path) -> str:
    """JSON files (config, tokenizer) by content, the others by size alone: of weights, an identity has a sample."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json", ".model", ".txt")]
    return repr([(file.name, sha256_of(file) if file.suffix == ".json" else file.stat().st_size) for file in files])


def _checkpoint(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "none"
    digest = hashlib.sha256(f"{checkpoint.step}".encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name in checkpoint.carried.values():
        digest.update(name.encode())
    return digest.hexdigest()


def require_agreement(ranks: Ranks, seen: Mapping[str, str]) -> None:
    """ValueError, on every rank, that names the first thing that some rank sees otherwise than rank 0, and the ranks.

    One gathered row of 8 bytes an entry, over host memory; every rank must call it with the same names.
    """
    if ranks.world == 1:
        return
    numbers = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True) for text in seen.values()]
    own = torch.tensor(numbers, dtype=torch.int64)
    rows = [torch.empty_like(own) for _ in range(ranks.world)]
    torch.distributed.all_gather(rows, own, group=ranks.host_group)
    for place, name in enumerate(seen):
        others = [rank for rank, row in enumerate(rows) if row[place] != rows[0][place]]
        if others:
            listed = ", ".join(map(str, others[:8])) + (" and more" if len(others) > 8 else "")
            raise UserError(
                f"Rank {listed} of {ranks.world} sees another version of {name} than rank 0 does; "
                f"{_REMEDIES.get(name, _REMEDY)}."
            )
