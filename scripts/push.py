#!/usr/bin/env python
"""Pushes a saved adapter (ours or peft's) to the hub.

    python scripts/push.py --adapter runs/cb OWNER/NAME
    python scripts/push.py --adapter runs/cb OWNER/NAME --private

Needs a token that may write: `hf auth login`, or HF_TOKEN.
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
