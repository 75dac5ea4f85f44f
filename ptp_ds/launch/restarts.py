"""--max_restarts of the launcher: what the next attempt's command line is, and on which hosts it runs."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ptp_ds.config.batch import default_batch
from ptp_ds.config.flags import given_settings
from ptp_ds.config.parsers import PARSERS, study_parser
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.hosts.hostfile import deepspeed_refusals
from ptp_ds.hosts.remote import ssh_command
from ptp_ds.ranks.faults import USER_ERROR, is_stop
from ptp_ds.settings_file import read_settings
from ptp_ds.training.checkpoint import left_behind, list_checkpoints

_SECONDS = 30
_HANDS_OVER = b"script_main(__file__)"  # in each file of scripts/ that starts a command (ptp_ds.commands.ptp)
Slots = dict[str, list[int]]  # by host, in the hostfile's order
Left = frozenset[tuple[Path, int]]  # checkpoints: folder and inode, as a run may save another under the same name


def should_restart(code: int) -> bool:
    """Whether an attempt that ended with this code is repeated: not after success, a stop or a user's error."""
    return code not in (0, USER_ERROR) and not is_stop(code)


def check_script(script: Sequence[str]) -> None:
    """UserError where there is nothing to go on from: another command than train and study, or no folder of train's.

    script: its path and its arguments. A script of the user's own is taken to have train's.
    """
    name = _command(script)
    if name not in (None, "train", "study"):
        raise UserError(f"--max_restarts is for train and study, which go on where they were left; {name} starts anew "
                        "each time, so give none.")  # fmt: skip
    if name == "study":
        study_parser().parse_args(script[1:])
    elif not given_settings(script[1:]).get("output_dir"):
        raise UserError("--max_restarts goes on from the checkpoints in --output_dir; give train.py that folder.")


def _command(script: Sequence[str]) -> str | None:
    """The command that a script of ours starts: one that leaves that to its name. None for a user's own."""
    file = Path(script[0]) if script else Path()
    if file.stem not in PARSERS or (file.is_file() and _HANDS_OVER not in file.read_bytes()):
        return None
    return file.stem


def settings_of_runs(script: Sequence[str]) -> list[dict[str, Any]]:
    """What is set of each run that the script starts: one of train's, a cell each of a study's file."""
    if _command(script) != "study":
        return [given_settings(script[1:])]
    file = study_parser().parse_args(script[1:]).study
    given = _mapping(read_settings(file, f"Study {file}"))
    common, tasks, methods = (_mapping(given.get(name)) for name in ("settings", "tasks", "methods"))
    return [{**common, **_mapping(m), **_mapping(t)} for t in tasks.values() for m in methods.values()]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}  # what else it is, the study itself refuses


def start_of(script: Sequence[str], left: Left = frozenset()) -> str:
    """What the next attempt goes on from, in words. left: see with_resume."""
    if _command(script) == "study":
        return "the cells that aren't finished"
    if (named := _named(script)) and _stays(script, left):
        return named
    return newest_checkpoint(script) or "the start, there is no checkpoint yet"


def newest_checkpoint(script: Sequence[str]) -> str | None:
    """Name of the newest checkpoint in --output_dir, or of its members, where this machine sees it."""
    folder = Path(given_settings(script[1:])["output_dir"])
    found = [path for each in (folder, *folder.glob("members/*")) for path in list_checkpoints(each / "checkpoints")]
    return max((path.name for path in found), default=None)


def checkpoints_left(script: Sequence[str]) -> Left:
    """Before the first attempt: the checkpoints that it sets aside to go on from the one that --resume names."""
    named = None if _command(script) == "study" else _named(script)
    if named is None or not Path(named).is_dir():
        return frozenset()
    root = Path(given_settings(script[1:])["output_dir"]) / "checkpoints"
    return frozenset((folder, folder.stat().st_ino) for folder in left_behind(root, Path(named)))


def with_resume(script: Sequence[str], left: Left = frozenset()) -> list[str]:
    """The script and its arguments with --resume auto; a study's as they are, whose cells always go on.

    A folder that --resume names stays until --output_dir has a checkpoint of this run, and none any more of one that
    was left, whose newest auto would take. left: see checkpoints_left.
    """
    if _command(script) == "study" or (_named(script) and _stays(script, left)):
        return list(script)
    return [*script, "--resume", "auto"]  # the last one counts


def _named(script: Sequence[str]) -> str | None:
    """The checkpoint that --resume names."""
    named = given_settings(script[1:]).get("resume")
    return None if named == "auto" else named


def _stays(script: Sequence[str], left: Left) -> bool:
    return newest_checkpoint(script) is None or any(f.is_dir() and f.stat().st_ino == inode for f, inode in left)


def ssh_reaches(host: str, port: int | None) -> bool:
    """Whether a command runs on `host` by ssh without a password, within some seconds."""
    try:
        done = subprocess.run([*ssh_command(host, port), "true"], capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def on_hosts_left(
    own: Sequence[str], script: Sequence[str], hostfile: Path,
    reaches: Callable[[str, int | None], bool] = ssh_reaches,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """The launcher's own flags without lost hosts, and what changed; `hostfile` is written where one was lost."""
    slots, port = asked_slots([*own, *script])
    left, told = slots_left(slots, port, settings_of_runs(script), reaches) if slots else (slots, [])
    if not told:
        return list(own), []
    return flags_for(own, left, hostfile, new_first=next(iter(slots)) not in left), told


def asked_slots(argv: Sequence[str]) -> tuple[Slots, int | None]:
    """The hosts and slots of a `deepspeed` command line, by DeepSpeed's own rules, and ssh's port.

    No slots where ssh isn't used: no hostfile, --no_ssh, one host without --force_multi, or another launcher than pdsh.
    """
    from deepspeed.launcher.runner import (
        apply_num_nodes_and_gpus,
        fetch_hostfile,
        parse_args,
        parse_inclusion_exclusion,
    )

    args = parse_args(list(argv))
    if not Path(args.hostfile).is_file() or args.no_ssh or args.launcher.lower() != "pdsh":
        return {}, args.ssh_port
    with deepspeed_refusals():
        active = parse_inclusion_exclusion(fetch_hostfile(args.hostfile), args.include, args.exclude)
    slots = dict(apply_num_nodes_and_gpus(active, args.num_nodes, args.num_gpus))
    return (slots if len(slots) > 1 or args.force_multi else {}), args.ssh_port


def slots_left(
    slots: Slots, port: int | None, runs: Sequence[Mapping[str, Any]],
    reaches: Callable[[str, int | None], bool],
) -> tuple[Slots, list[str]]:  # fmt: skip
    """The slots on hosts that can be reached, and a sentence for each thing that changed.

    Where a run's batch doesn't deal out in equal parts to the ranks that are left, the last slots stay free. runs: the
    settings of each. Raises ValueError where no host is left.
    """
    with ThreadPoolExecutor(32) as pool:
        reached = dict(zip(slots, pool.map(lambda host: reaches(host, port), slots), strict=True))
    lost = [host for host in slots if not reached[host]]
    if not lost:
        return slots, []
    left = {host: list(slots[host]) for host in slots if reached[host]}
    if not left:
        raise UserError(f"None of the hosts {', '.join(lost)} can be reached by ssh; there is none to go on with.")
    told = [f"{host} can't be reached by ssh and is left out" for host in lost]
    ranks, before = sum(map(len, left.values())), sum(map(len, slots.values()))
    fits = (number for number in range(ranks, 0, -1) if all(dealt_ranks(number, run, before) == number for run in runs))
    wanted = next(fits)
    if wanted < ranks:
        told.append(f"the batch deals out in equal parts to {wanted} of the {ranks} ranks that are left")
    surplus = ranks - wanted
    for host in reversed(list(left)):
        dropped = min(surplus, len(left[host]))
        left[host] = left[host][: len(left[host]) - dropped]
        surplus -= dropped
    return {host: numbers for host, numbers in left.items() if numbers}, told


def dealt_ranks(ranks: int, settings: Mapping[str, Any], before: int = 1) -> int:
    """The largest number of ranks, `ranks` at most, that gets equal parts of the batch; 1 where only that is left.

    before: ranks that the run had, to which a batch size that isn't set was dealt.
    """
    if settings.get("tokens_per_step") is not None:
        return ranks
    micro = settings.get("gradient_accumulation_steps", RunConfig.gradient_accumulation_steps)
    batch = settings.get("batch_size", default_batch(before * micro))
    return next((number for number in range(ranks, 1, -1) if batch % (number * micro) == 0), 1)


def flags_for(own: Sequence[str], slots: Slots, hostfile: Path, new_first: bool) -> list[str]:
    """Writes `hostfile` and returns the launcher's own flags, changed so that they choose these slots.

    new_first: the host that the ranks met at is gone, so that --master_addr no longer counts.
    """
    lines = [f"{host} slots={max(numbers) + 1}\n" for host, numbers in slots.items()]
    hostfile.write_text("".join(lines), encoding="utf-8")
    chosen = "@".join(f"{host}:{','.join(map(str, numbers))}" for host, numbers in slots.items())
    kept: list[str] = []
    words = iter(own)
    for word in words:
        if new_first and word == "--master_addr":
            next(words, None)
        elif not (new_first and word.startswith("--master_addr=")):
            kept.append(word)
    # DeepSpeed's parser takes the last of several
    return [*kept, "--hostfile", str(hostfile), "--include", chosen, "--exclude", "", "--num_nodes", "-1",
            "--num_gpus", "-1"]  # fmt: skip
