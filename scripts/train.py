#!/usr/bin/env python
"""Trains a soft prompt in front of a frozen model with PTP's perturbation regulariser.

    deepspeed --hostfile hostfiles/local scripts/train.py --ds_config ds_configs/zero3.json --task CB \
        --data_dir DATA --perturbation pgd --output_dir runs/cb

deepspeed, torchrun and plain python (one process) start the same run.
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
