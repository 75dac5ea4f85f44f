#!/usr/bin/env python
"""Scores trained prompts on rows under noise, masks, typos and word attacks of rising size.

python scripts/robustness.py --adapters runs/plain runs/ptp --output_dir runs/robustness
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
