"""scripts/push.py: pushes a saved adapter to the hub, where others load it by its name."""

import sys
from collections.abc import Sequence

from ptp_ds.adapters.share import push_adapter
from ptp_ds.commands.exits import run_command
from ptp_ds.config.parsers import push_parser
from ptp_ds.ranks.log import get_logger

log = get_logger(__name__)


def _push(argv: Sequence[str], description: str) -> None:
    args = push_parser(description).parse_args(argv)
    url = push_adapter(args.adapter, args.repo_id, args.private, base_model=args.base_model)
    log.info("pushed: %s", url)


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence."""
    return run_command(lambda: _push(sys.argv[1:] if argv is None else argv, description))
