#!/usr/bin/env python
"""Few-shot draws of a file of labelled rows, for a study over draws.

    python scripts/draw.py rows.jsonl --task tone.json --rows 16 --test 300 --data_dir data

A draw is 16 rows of each label to train on and 16 others to select on. The same file gives the same draws everywhere.
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
