"""scripts/train.py in a program that has trackers of its own: `diary` writes what it is told, `broken` raises."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker, on_main_process, register_tracker_class

from ptp_ds.commands.train import main
from ptp_ds.ranks.distributed import exit_process


class Diary(GeneralTracker):
    """diary-<run>-<rank>.jsonl in the working folder: a line a call."""

    name, requires_logging_directory = "diary", False

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.run_name = run_name

    @property
    def tracker(self) -> Path:
        return Path(f"diary-{self.run_name}-{os.environ['RANK']}.jsonl")

    def tell(self, what: str, **said: Any) -> None:
        with self.tracker.open("a") as file:
            file.write(json.dumps({"what": what, **said}) + "\n")

    @on_main_process
    def start(self) -> None:
        self.tell("start", name=self.run_name)

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        self.tell("settings", values=values)

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        self.tell("log", values=values, step=step)

    @on_main_process
    def finish(self) -> None:
        self.tell("finish", state=PartialState._shared_state)


class Broken(Diary):
    """Its network goes down behind the first values."""

    name = "broken"

    def tell(self, what: str, **said: Any) -> None:
        if what == "log" and said["step"]:
            raise ConnectionError("the network is down")


register_tracker_class(Diary)
register_tracker_class(Broken)

if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
