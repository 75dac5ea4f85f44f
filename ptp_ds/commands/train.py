"""scripts/train.py: one run, or a population of them, to its files; a Python caller hands `train` a RunConfig."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace

from ptp_ds.backbone.families import describe_families
from ptp_ds.commands.exits import run_command
from ptp_ds.commands.one_run import prepare, train_run
from ptp_ds.commands.population import train_population
from ptp_ds.config.flags import dump_config, dumped_to, parse_run
from ptp_ds.config.population import is_population
from ptp_ds.config.run_config import RunConfig
from ptp_ds.ranks.distributed import env_rank, is_launched, prepare_environment, start_processes, stop_processes
from ptp_ds.ranks.signals import end_at_once
from ptp_ds.ranks.watchdog import Watchdog
from ptp_ds.training.fingerprints import fingerprints, require_agreement
from ptp_ds.training.monitor import Listener


def train(run: RunConfig, explicit: Collection[str] = (), listeners: Sequence[Listener] = ()) -> int:
    """One run on the ranks that this process is one of; returns the exit code. Raises UserError (see prepare).

    A program may call it again, with the same model or another: each run gives what it would in a process of its own.
    One at a time, in any thread; in one that isn't the main thread, stop signals (Ctrl-C, SIGTERM, SIGUSR1) are not
    taken, and the run goes on to its end. listeners: called on rank 0 with every line of the log; every rank must be
    given as many. One that raises StopRun ends the run as its last step would.
    """
    prepare_environment()
    if is_population(run):
        return train_population(run, explicit, listeners=listeners)
    alone = not is_launched()
    prepared = replace(prepare(run, explicit), listeners=tuple(listeners))
    watchdog = Watchdog(run.stall_timeout, env_rank())
    try:
        ranks = start_processes()
        seen = fingerprints(
            prepared.digests, prepared.source.folder, prepared.continuation.checkpoint, prepared.identity,
            prepared.resolved.dtype,
        )  # fmt: skip
        require_agreement(ranks, seen)
        return train_run(prepared, ranks, watchdog)
    finally:
        watchdog.stop()
        if alone:
            stop_processes()


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """scripts/train.py: returns the exit code; user errors are one sentence on rank 0."""
    argv = sys.argv[1:] if argv is None else argv
    if "--list_families" in argv:
        print(describe_families())
        return 0
    if any(word.split("=")[0] == "--dump_config" for word in argv):
        return run_command(lambda: _dump(argv, description))
    end_at_once()
    prepare_environment()
    return run_command(lambda: train(*parse_run(argv, description)))


def _dump(argv: Sequence[str], description: str) -> None:
    file = dumped_to(argv)
    if file is not None and env_rank() == 0:
        dump_config(parse_run(argv, description)[0], file)
