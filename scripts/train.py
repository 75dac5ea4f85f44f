#!/usr/bin/env python
"""Trains a soft prompt in front of a frozen model with PTP's perturbation regulariser.

    deepspeed --hostfile hostfiles/local scripts/train.py --ds_config ds_configs/zero3.json --task CB \
        --data_dir DATA --perturbation pgd --output_dir runs/cb

deepspeed, torchrun and plain python (one process) start the same run.
"""

from ptp_ds.commands.train import main
from ptp_ds.ranks.distributed import exit_process

if __name__ == "__main__":
    exit_process(main(description=__doc__.split("\n")[0]))
