"""What each rank measures for itself, agreed on before anything is decided by it: all decide alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ptp_ds.errors import UserError
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.log import ANY_RANK, get_logger

log = get_logger(__name__)

_MOST = 3  # values of one call: what ranks exchange has one length, whatever it is about


class Agreement:
    """Work that every rank does for itself, with the same calls of `largest` on all of them, one at its end.

    elsewhere: the error of ranks whose own work is well while another's fails. speaks: whether a rank that fails
    tells the others at once; not where they wait for it in other collectives.
    """

    def __init__(self, ranks: Ranks | None, elsewhere: UserError, speaks: bool = True) -> None:
        self._ranks = ranks if ranks is not None and ranks.world > 1 else None
        self._elsewhere, self._speaks, self._known = elsewhere, speaks, False

    def largest(self, *values: float) -> list[float]:
        """Each value's largest over ranks, inf where one is NaN; as they are on one rank. Raises UserError where
        another rank has failed."""
        if self._ranks is None:
            return list(values)
        self._known, _, *found = self._exchange(False, *values)
        if self._known:
            raise self._elsewhere
        return found[: len(values)]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """A ValueError inside is told to the other ranks; where they are well this rank says why, since it may be
        ended before its turn comes."""
        try:
            yield
        except ValueError as error:
            if self._ranks is not None and self._speaks and not self._known:
                _, others_are_well, *_ = self._exchange(True)
                if others_are_well:
                    log.warning("warning: rank %d alone: %s", self._ranks.rank, error, extra=ANY_RANK)
            raise

    def _exchange(self, failed: bool, *values: float) -> tuple[bool, bool, *tuple[float, ...]]:
        """(whether any rank has failed, whether any is well, then each value's largest)."""
        assert self._ranks is not None
        assert len(values) <= _MOST
        own = [float(failed), float(not failed), *values, *[0.0] * (_MOST - len(values))]
        numbers = torch.tensor(own, dtype=torch.float64, device=self._ranks.device)
        any_failed, any_well, *found = self._ranks.max(numbers.nan_to_num(torch.inf, torch.inf, -torch.inf)).tolist()
        return bool(any_failed), bool(any_well), *found
