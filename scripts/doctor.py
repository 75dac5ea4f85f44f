#!/usr/bin/env python
"""Checks every host of a hostfile before a run: reachable, alike, able to talk to each other; a table and a remedy.

    python scripts/doctor.py --hostfile hostfiles/node8 --model MODEL --output_dir runs/cb

Exit code 0: no fault; 1: faults, each in a sentence; 2: a wrong command line.
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
