"""Deltas that one step hands to the next (free): a rank holds its own, a checkpoint a file for each rank.

Rank 0 alone writes to --output_dir. It takes the others' parts over host memory, one at a time as it writes them, so
that no device and no file ever holds the whole batch's. A run on another number of ranks finds each example's deltas in
whichever file has them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptp_ds.errors import UserError
from ptp_ds.files import open_tensors, tensor_shape
from ptp_ds.ranks.distributed import Ranks

Part = tuple[Sequence[int], Tensor]  # places of a rank's examples in the global batch; their deltas [T, H], one by one


@dataclass
class Carried:
    """Deltas for the next step's batch, its second use or later. mine: this rank's [T, H].

    files: each rank's part in a checkpoint. whole: all ranks' [T', H] in the order of the global batch, as checkpoints
    of format 1 hold them. Either until `mine` is found there.
    """

    mine: Tensor | None = None
    files: tuple[Path, ...] = ()
    whole: Tensor | None = None

    def of(self, lengths: Sequence[int], places: Sequence[int], device: torch.device) -> Tensor:
        """[T, H] deltas of the examples at `places` of the batch. lengths: tokens of each example of the batch.

        Raises ValueError for files of another batch.
        """
        if self.mine is None:
            if self.whole is not None:
                parts: Mapping[int, Tensor] = dict(enumerate(self.whole.split(list(lengths))))
            else:
                parts = _read(self.files, lengths, set(places))
            self.mine = torch.cat([parts[place] for place in places]).to(device)
            self.files, self.whole = (), None
        return self.mine


def gather(ranks: Ranks, mine_TH: Tensor, hands: Sequence[Sequence[int]], lengths: Sequence[int]) -> Iterator[Part]:
    """On rank 0 every rank's part, each received when it is asked for: all of them must be. Other ranks send theirs.

    hands: each rank's places in the batch. All ranks must call it.
    """
    if not ranks.is_main:
        ranks.send_main(mine_TH.cpu())
        return iter(())
    return _received(ranks, mine_TH.cpu(), hands, lengths)


def _received(ranks: Ranks, own_TH: Tensor, hands: Sequence[Sequence[int]], lengths: Sequence[int]) -> Iterator[Part]:
    yield hands[0], own_TH
    for rank in range(1, ranks.world):
        tokens = sum(lengths[place] for place in hands[rank])
        yield hands[rank], ranks.received(rank, own_TH.new_empty(tokens, own_TH.shape[1]))


def part_name(rank: int) -> str:
    """A part's file in a checkpoint."""
    return f"carried-{rank:05d}.safetensors"


def write_part(file: Path, part: Part) -> None:
    """One rank's part as a file."""
    places, deltas_TH = part
    save_file({"places": torch.tensor(places, dtype=torch.int64), "deltas": deltas_TH.contiguous()}, file)


def check_part(file: Path, hint: str) -> None:
    """ValueError for a file that write_part never wrote. hint: what to do then."""
    with open_tensors(file, str(file), hint) as handle:
        if sorted(handle.keys()) != ["deltas", "places"]:
            raise UserError(f"{file} holds other tensors than deltas and places{hint}.")
        places, shape = handle.get_slice("places"), tensor_shape(handle, "deltas", str(file), most=None)
        if len(places.get_shape()) != 1 or places.get_dtype() != "I64" or len(shape) != 2:
            raise UserError(f"{file} holds no list of places, or deltas of shape {shape}{hint}.")
        if not bool(torch.isfinite(handle.get_tensor("deltas")).all()):
            raise UserError(f"{file} holds deltas that are not finite{hint}.")


def _read(files: Sequence[Path], lengths: Sequence[int], wanted: set[int]) -> dict[int, Tensor]:
    """The wanted places' deltas; only these are read."""
    found, seen = {}, []
    for file in files:
        with open_tensors(file, str(file), "; resume from another checkpoint") as handle:
            places, rows, start = handle.get_tensor("places").tolist(), handle.get_slice("deltas"), 0
            if not all(0 <= place < len(lengths) for place in places) or (
                sum(lengths[place] for place in places) != rows.get_shape()[0]
            ):
                raise _other_batch(file)
            for place in places:
                stop = start + lengths[place]
                if place in wanted:
                    found[place] = rows[start:stop]
                start = stop
        seen += places
    if sorted(seen) != list(range(len(lengths))):
        raise _other_batch(files[0])
    return found


def _other_batch(file: Path) -> UserError:
    return UserError(f"{file} holds deltas of another batch than the run's next one; resume from another checkpoint.")
