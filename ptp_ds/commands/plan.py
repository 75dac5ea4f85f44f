"""scripts/plan.py: the plans of all ds_configs for a model, a cluster and a run's flags, as a table or JSON."""

import json
import sys
from collections.abc import Sequence

from ptp_ds.commands.exits import run_command
from ptp_ds.config.checks import describe_unread
from ptp_ds.config.flags import parse_run
from ptp_ds.config.parsers import CLUSTER, plan_parser
from ptp_ds.config.population import is_population
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import require_writable, write_json
from ptp_ds.planning.report import report
from ptp_ds.planning.work import Cluster
from ptp_ds.ranks.distributed import prepare_environment
from ptp_ds.ranks.log import get_logger

log = get_logger(__name__)
_GB, _GIB = 1e9, 2.0**30


def parse_plan(argv: Sequence[str], description: str = "") -> tuple[Cluster, RunConfig, set[str], str | None, int]:
    """(cluster, run, the run's flags that were given, --json's file, --members). Raises ValueError."""
    values, rest = plan_parser(description).parse_known_args(argv)
    for name in CLUSTER:
        if not getattr(values, name) > 0:
            raise UserError(f"--{name} is {getattr(values, name)}; expected a number above 0.")
    if values.usable > 1:
        raise UserError(f"--usable is {values.usable}; expected a share of at most 1.")
    if values.members < 1:
        raise UserError(f"--members is {values.members}; expected a whole number of 1 or more.")
    run, explicit = parse_run(rest)
    if values.members > 1 and is_population(run):
        raise UserError("--members and --seeds or --population both say how many prompts train; give one of them.")
    cluster = Cluster(
        hosts=values.hosts, gpus=values.gpus, gpu_memory=values.gpu_memory * _GIB * values.usable,
        interconnect=values.interconnect * _GB, local=values.local_interconnect * _GB,
        memory=values.memory_bandwidth * _GB, link=values.host_link * _GB, disk=values.disk * _GB,
        operations=values.tflops * 1e12,
    )  # fmt: skip
    return cluster, run, explicit, values.json, values.members


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """scripts/plan.py: the exit code; user errors are one sentence."""
    prepare_environment()
    return run_command(lambda: _plan(sys.argv[1:] if argv is None else argv, description))


def _plan(argv: Sequence[str], description: str) -> None:
    cluster, run, explicit, file, members = parse_plan(argv, description)
    target = None if file is None else require_writable("--json", file)
    for sentence in describe_unread(run, explicit):
        log.warning("warning: %s", sentence)
    text, data = report(cluster, run, explicit, members)
    print(text)
    if target is not None:
        write_json(target, json.loads(json.dumps(data)))
