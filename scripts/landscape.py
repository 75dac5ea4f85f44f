#!/usr/bin/env python
"""Draws the cross-entropy around trained prompts, in input-embedding space and in prompt space, on one scale.

python scripts/landscape.py --adapters runs/plain runs/ptp --output_dir runs/landscape
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
