"""Live bytes of a piece of work, counted tensor by tensor: the same on every machine."""

import sys
from collections.abc import Callable, Iterable

from torch import Tensor

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from bench_measure import PeakMemory


def peak_of(work: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Most bytes of tensors made by `work` and alive at one time; `known` were there before."""
    with PeakMemory(list(known)) as memory:
        work()
    return memory.peak
