#!/usr/bin/env python
"""Scores a saved adapter (ours or peft's) on a split.

    python scripts/evaluate.py --adapter runs/cb --json scores.json
    python scripts/evaluate.py --adapter runs/cb --split test --predictions CB.jsonl

Model, task, data and split are those of the adapter's run unless others are given.
Starts like train.py: plain python, torchrun or deepspeed.
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
