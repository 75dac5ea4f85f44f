"""scripts/push.py: pushes a saved adapter to the hub, where others load it by its name."""

import argparse
import sys
from collections.abc import Sequence

from ptp_ds.adapters.share import push_adapter
from ptp_ds.commands.exits import run_command
from ptp_ds.config.flags import StrictParser
from ptp_ds.ranks.log import get_logger

log = get_logger(__name__)


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of scripts/push.py."""
    made = StrictParser(description=description, allow_abbrev=False)
    made.add_argument("repo_id", metavar="OWNER/NAME", help="the hub repository, made where there is none")
    made.add_argument("--adapter", required=True, help="a run's folder, or an adapter's, ours or peft's")
    made.add_argument("--private", action="store_true", help="a new repository is private; one that exists stays as "
                        "it is")  # fmt: skip
    made.add_argument("--base_model", help="hub id of the model, where the adapter was trained on a folder")
    return made


def _push(argv: Sequence[str], description: str) -> None:
    args = parser(description).parse_args(argv)
    url = push_adapter(args.adapter, args.repo_id, args.private, base_model=args.base_model)
    log.info("pushed: %s", url)


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence."""
    return run_command(lambda: _push(sys.argv[1:] if argv is None else argv, description))
