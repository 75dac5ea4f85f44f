#!/usr/bin/env python
"""Draws the cross-entropy around trained prompts, in input-embedding space and in prompt space, on one scale.

python scripts/landscape.py --adapters runs/plain runs/ptp --output_dir runs/landscape
"""

from ptp_ds.commands.landscape import main
from ptp_ds.ranks.distributed import exit_process

if __name__ == "__main__":
    exit_process(main(description=__doc__.split("\n")[0]))
