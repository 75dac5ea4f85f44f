"""The `ptp` command: a word for what to do, then that command's flags. scripts/*.py start the same commands.

Nothing heavy is imported before it is needed: `ptp COMMAND --help` answers without torch, and so does a flag that
doesn't exist or can't be what it was given.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ptp_ds import __version__
from ptp_ds.config.flags import build_parser, named_file
from ptp_ds.config.parsers import PARSERS
from ptp_ds.errors import UserError
from ptp_ds.files import nearest, shipped
from ptp_ds.hosts.environment import is_rank
from ptp_ds.redact import redacted

COMMANDS = {
    "train": "Trains a prompt in front of a frozen model with PTP's perturbation regulariser, or several at once.",
    "evaluate": "Scores a saved adapter (ours or peft's) on a split.",
    "predict": "A saved adapter's answers to rows of your own, with the probability of each answer.",
    "push": "Pushes a saved adapter (ours or peft's) to the hub.",
    "overall": "SuperGLUE's overall score of several runs: mean and standard deviation over seeds.",
    "draw": "Few-shot draws of your rows: K a label to train on, K to select on, and test rows.",
    "study": "Trains methods x tasks x seeds, and writes tables, comparisons and pictures.",
    "landscape": "Draws the cross-entropy around trained prompts, in input-embedding space and in prompt space.",
    "robustness": "Scores trained prompts on rows under noise, masks, typos and word attacks of rising size.",
    "plan": "What a run will need, from the model's configuration alone: memory, bytes moved, time a step.",
    "doctor": "Checks every host of a hostfile before a run: reachable, alike, able to talk to each other.",
}
LAUNCH = "Starts train, evaluate or study on several ranks: DeepSpeed's launcher, with its flags in front."
_ON_RANKS = ("train", "evaluate", "study")
_WITHOUT_TEARDOWN = ("train", "study", "landscape", "robustness")  # see ptp_ds.ranks.distributed.exit_process
_HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    name = argv[0] if argv else _HELP[1]
    if name in _HELP:
        print(_overview())
        return 0
    if name in ("-V", "--version"):
        print(f"ptp_ds {__version__}")
        return 0
    if name == "launch":
        return _launch(argv[1:])
    if name not in COMMANDS:
        known = [*COMMANDS, "launch"]
        print(
            f"error: Unknown command {name!r}{nearest(name, known)}: give one of {', '.join(known)}.", file=sys.stderr
        )
        return 2
    return run(name, argv[1:], f"ptp {name}")


def run(name: str, argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """One command with its flags; returns the exit code, or ends the process with it (see _WITHOUT_TEARDOWN).

    program: what usage lines call it; None for the script's own name.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if set(_HELP) & set(argv):
            return _help(name, argv, program)
        _require_readable(name, argv)
    except UserError as error:  # as ptp_ds.commands.exits.report_error says it, which imports torch
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    code: int = import_module(f"ptp_ds.commands.{name}").main(argv, COMMANDS[name])
    if name in _WITHOUT_TEARDOWN:
        from ptp_ds.ranks.distributed import exit_process

        exit_process(code)
    return code


def _help(name: str, argv: Sequence[str], program: str | None) -> int:
    """A command's flags, with those of the perturbation file that is named; the exit code. Raises UserError."""
    parser = _parser(name, argv)
    parser.prog = program or parser.prog
    parser.print_help()
    return 0


def _require_readable(name: str, argv: Sequence[str]) -> None:
    """UserError where the flags are none of the command's; to a launcher's ranks the command says it."""
    if name != "plan" and not is_rank(os.environ):  # plan reads train's flags behind its own
        _parser(name).parse_args(argv)


def _parser(name: str, argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    if name == "train":
        return build_parser(COMMANDS[name], named_file(argv))
    return PARSERS[name](COMMANDS[name])


def _overview() -> str:
    shown = {**COMMANDS, "launch": LAUNCH}
    lines = [f"  {name:12}{text}" for name, text in shown.items()]
    return "\n".join(["usage: ptp COMMAND [flags]", "", *lines, "", "ptp COMMAND --help lists a command's flags."])


def _launch(argv: Sequence[str]) -> int:
    """`ptp launch [launcher's flags] COMMAND [flags]`: the command's script on the launcher's ranks."""
    place = next((number for number, word in enumerate(argv) if word in _ON_RANKS), len(argv))
    own = list(argv[:place])
    if place == len(argv) or set(_HELP) & set(own):
        print(
            f"usage: ptp launch [launcher's flags] {{{','.join(_ON_RANKS)}}} [flags]\n\n{LAUNCH}\n\n"
            "  ptp launch --hostfile local train --task CB     the hostfile of that name, or a path\n"
            "  ptp launch --num_gpus 2 train --task CB         two ranks of this machine\n\n"
            "--max_restarts N starts a train or study again whose ranks died. All other flags are DeepSpeed's: "
            "deepspeed --help."
        )
        return 0 if set(_HELP) & set(own) else 2
    script = shipped("scripts", f"{argv[place]}.py")
    assert script is not None, "an installation holds its scripts"
    from ptp_ds.launch.launcher import main as launch

    return launch([*own, str(script), *argv[place + 1 :]])


def _complete() -> None:
    """Words for the shell: eval "$(register-python-argcomplete ptp)"; ends the process where that is asked for."""
    try:
        import argcomplete
    except ImportError:
        return
    whole = argparse.ArgumentParser("ptp")
    commands = whole.add_subparsers()
    for name, text in COMMANDS.items():
        made = _parser(name)
        commands.add_parser(name, parents=[made], add_help=False, help=text)
    launch = commands.add_parser("launch", help=LAUNCH)
    launch.add_argument("command", choices=_ON_RANKS)
    argcomplete.autocomplete(whole)


def script_main(file: str) -> int:
    """For scripts/*.py: the command that the script is named after."""
    return run(Path(file).stem)


if __name__ == "__main__":
    sys.exit(main())
