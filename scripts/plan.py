#!/usr/bin/env python
"""What a run will need, from the model's configuration alone: memory, bytes moved, time a step, for each ds_config.

    python scripts/plan.py --model llama-70b --hosts 8 --gpus 8 --gpu_memory 80 --perturbation pgd

--model takes a folder, a hub id, or one of llama-8b, llama-70b, llama-405b, mistral-7b and smollm2-135m by their public
dimensions.
"""

import sys

from ptp_ds.commands.ptp import script_main

if __name__ == "__main__":
    sys.exit(script_main(__file__))
