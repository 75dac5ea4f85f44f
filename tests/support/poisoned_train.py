"""scripts/train.py with a gradient that is NaN in one step: python poisoned_train.py STEP FIRST LAST [flags].

Of rows FIRST to LAST of all that is trained, on the last rank alone; the loss is as it would be.
"""

import sys

import torch

from ptp_ds.commands.train import main
from ptp_ds.ranks.distributed import exit_process
from ptp_ds.training.engine import Engine

STEP, FIRST, LAST = map(int, sys.argv[1:4])
_trained, _steps = Engine.trained, iter(range(1, 1000))


def trained(engine: Engine) -> torch.Tensor:
    """Engine.trained, once a step."""
    found = _trained(engine)
    if next(_steps) == STEP and engine.ranks.rank == engine.ranks.world - 1:
        rows = torch.arange(len(found))[:, None]
        found.register_hook(lambda gradient: torch.where((rows >= FIRST) & (rows < LAST), torch.nan, gradient))
    return found


Engine.trained = trained

if __name__ == "__main__":
    exit_process(main(sys.argv[4:]))
