#!/usr/bin/env python
"""Scores trained prompts on rows under noise, masks, typos and word attacks of rising size.

python scripts/robustness.py --adapters runs/plain runs/ptp --output_dir runs/robustness
"""

from ptp_ds.commands.robustness import main
from ptp_ds.ranks.distributed import exit_process

if __name__ == "__main__":
    exit_process(main(description=__doc__.split("\n")[0]))
