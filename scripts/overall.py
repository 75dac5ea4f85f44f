#!/usr/bin/env python
"""SuperGLUE's overall score of several runs: mean and standard deviation over seeds, a table for each kind of run.

    python scripts/overall.py runs/*/ --json overall.json

A folder's result.json is one that train.py wrote, or evaluate.py --json FOLDER/result.json (AX-b, AX-g).
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
