#!/usr/bin/env python
"""Trains methods x tasks x seeds, the seeds of each cell at once, and writes tables, comparisons and pictures.

python scripts/study.py study.yaml --output_dir runs/study
deepspeed --hostfile hostfiles/local scripts/study.py study.yaml --output_dir runs/study
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
