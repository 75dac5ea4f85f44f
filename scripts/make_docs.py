#!/usr/bin/env python
"""Writes docs/command_line.md: every command and flag, from the parsers that read them; --check only compares.

python scripts/make_docs.py
python scripts/make_docs.py --check    # exit code 1, and the page's name, where it is stale
"""

import argparse
import sys
from pathlib import Path

from ptp_ds.commands.ptp import COMMANDS, LAUNCH
from ptp_ds.config.parsers import PARSERS
from ptp_ds.config.run_config import GROUPS

PAGE = Path(__file__).parent.parent / "docs" / "command_line.md"
_OPENING = """# Commands and flags

This page is written by `python scripts/make_docs.py`, from the parsers that read the flags. `ptp COMMAND` and
`python scripts/COMMAND.py` are the same.

| command | what it does |
|---|---|
"""


def cell(text: str) -> str:
    """Text that may stand in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def rows_of(actions: list[argparse.Action]) -> list[str]:
    """A line a flag: its words, its choices or the kind of its value, its help."""
    lines = []
    for action in actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(f"`{word}`" for word in action.option_strings) or f"`{action.metavar or action.dest}`"
        value = " ".join(f"`{choice}`" for choice in action.choices) if action.choices else action.metavar or ""
        shown = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
        required = " (required)" if action.required and action.option_strings else ""
        lines.append(f"| {name} | {cell(str(value))} | {cell(shown)}{required} |")
    return lines


def table(actions: list[argparse.Action]) -> str:
    """The flags as a Markdown table."""
    return "\n".join(["| flag | value | what |", "|---|---|---|", *rows_of(actions)]) + "\n"


def page() -> str:
    """docs/command_line.md."""
    text = _OPENING + "".join(f"| [`{name}`](#{name}) | {cell(said)} |\n" for name, said in COMMANDS.items())
    text += f"| `launch` | {cell(LAUNCH)} |\n"
    for name in COMMANDS:
        parser = PARSERS[name]("")
        text += f"\n## {name}\n\n"
        if name != "train":
            text += table(parser._actions)
            continue
        for group in parser._action_groups:
            if group.title in GROUPS:
                text += f"### {group.title}: {group.description}\n\n{table(group._group_actions)}\n"
        text += "### settings in files\n\n" + table(parser._action_groups[1]._group_actions)
    return text


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is stale")
    args = parser.parse_args()
    made = page()
    if not args.check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
        print(f"{PAGE.name} is stale; run python scripts/make_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
