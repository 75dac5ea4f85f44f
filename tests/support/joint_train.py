"""scripts/train.py with joint products, which are off on a CPU."""

import sys
from functools import partial

from ptp_ds.commands.train import main
from ptp_ds.ranks.distributed import exit_process
from ptp_ds.training import start

start.load_backbone = partial(start.load_backbone, joint=True)

if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
