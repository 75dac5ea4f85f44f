"""Several runs in one process, as a Python program makes them: python runs_worker.py '[{...}, ...]'.

Each object holds RunConfig's fields and, as "thread", whether the run goes on in a thread of its own. Prints a line of
JSON a run: its exit code, or the user's error, and what it left behind in the process.
"""

import json
import os
import sys
import threading

import torch

from ptp_ds.commands.train import train
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def outcome(fields: dict) -> int | str:
    try:
        return train(RunConfig(**fields))
    except UserError as error:
        return str(error)


def main(runs: list[dict]) -> None:
    linear = torch.nn.functional.linear
    for fields in runs:
        found: list[int | str] = []
        if fields.pop("thread"):
            thread = threading.Thread(target=lambda fields=fields, found=found: found.append(outcome(fields)))
            thread.start()
            thread.join()
        else:
            found.append(outcome(fields))
        left = {
            "variables": [name for name in _LAUNCHER if name in os.environ],
            "group": torch.distributed.is_initialized(), "linear": torch.nn.functional.linear is not linear,
        }  # fmt: skip
        print(json.dumps({"found": found, "left": left}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
