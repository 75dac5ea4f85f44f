#!/usr/bin/env python
"""Trains methods x tasks x seeds, the seeds of each cell at once, and writes tables, comparisons and pictures.

python scripts/study.py study.yaml --output_dir runs/study
deepspeed --hostfile hostfiles/local scripts/study.py study.yaml --output_dir runs/study
"""

from ptp_ds.commands.study import main
from ptp_ds.ranks.distributed import exit_process

if __name__ == "__main__":
    exit_process(main(description=__doc__.split("\n")[0]))
