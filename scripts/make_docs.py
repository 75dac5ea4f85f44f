#!/usr/bin/env python
"""Writes what docs/ takes from the code: docs/command_line.md, and the tables between markers in other pages.

python scripts/make_docs.py
python scripts/make_docs.py --check    # writes nothing; exit code 1, and the pages' names, where some are stale
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptp_ds.commands.ptp import COMMANDS, LAUNCH
from ptp_ds.config.parsers import PARSERS
from ptp_ds.config.presets import PRESETS
from ptp_ds.config.run_config import DEFAULT_DS_CONFIG, GROUPS, RunConfig
from ptp_ds.objective import DIVERGENCES
from ptp_ds.perturb import PERTURBATIONS, Perturbation
from ptp_ds.tasks import builtin_tasks
from ptp_ds.tasks.data import DEMO_DATA

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEMPLATES = DEMO_DATA.parent / "templates"
MARKED = re.compile(r"(<!-- made by scripts/make_docs\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OPENING = """# Commands and flags

This page is written by `python scripts/make_docs.py`, from the parsers that read the flags. `ptp COMMAND` and
`python scripts/COMMAND.py` are the same.

| command | what it does |
|---|---|
"""


def cell(text: str) -> str:
    """Text that may stand in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def code(text: str) -> str:
    """Text as code in a table's cell, its line ends as \\n."""
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def flags_table(actions: list[argparse.Action]) -> str:
    """A line a flag: its words, its choices or the kind of its value, its help."""
    rows = []
    for action in actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(f"`{word}`" for word in action.option_strings) or f"`{action.metavar or action.dest}`"
        value = " ".join(f"`{choice}`" for choice in action.choices) if action.choices else action.metavar or ""
        shown = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
        required = " (required)" if action.required and action.option_strings else ""
        rows.append([name, cell(str(value)), cell(shown) + required])
    return table(["flag", "value", "what"], rows)


def command_line() -> str:
    """docs/command_line.md."""
    text = _OPENING + "".join(f"| [`{name}`](#{name}) | {cell(said)} |\n" for name, said in COMMANDS.items())
    text += f"| `launch` | {cell(LAUNCH)} |\n"
    for name in COMMANDS:
        parser = PARSERS[name]("")
        text += f"\n## {name}\n\n"
        if name != "train":
            text += flags_table(parser._actions)
            continue
        for group in parser._action_groups:
            if group.title in GROUPS:
                text += f"### {group.title}: {group.description}\n\n{flags_table(group._group_actions)}\n"
        text += "### settings in files\n\n" + flags_table(parser._action_groups[1]._group_actions)
    return text


def first_sentence(of: object) -> str:
    """What a docstring says first, without its full stop."""
    return cell((getattr(of, "__doc__", None) or "").split("\n\n")[0].rstrip(".\n"))


def _what(perturbation: Perturbation) -> str:
    function = perturbation.find or perturbation.twins or perturbation.attack
    return first_sentence(sys.modules[function.__module__])


def perturbations() -> str:
    """Every built-in perturbation, by its module's first sentence and the flags that reach it."""
    usual = vars(RunConfig())
    rows = [["`none`", "plain prompt tuning, bit for bit", "", ""]]
    for name, one in PERTURBATIONS.items():
        said = " and ".join(f"`{part}`" for part in name.split("+")) + " together" if "+" in name else _what(one)
        sizes = ", ".join(f"`--{flag}` {usual[flag]}" for flag in one.sizes)
        rows.append([f"`{name}`", said, sizes, ", ".join(f"`--{flag}`" for flag in one.reads)])
    return table(["`--perturbation`", "how the second stream differs", "its size, and the default", "also reads"], rows)


def divergences() -> str:
    """Every divergence, by its function's docstring."""
    rows = [[f"`{name}`", first_sentence(function)] for name, function in DIVERGENCES.items()]
    return table(["`--divergence`", "what is added to the loss, times lambda, over examples"], rows)


def presets() -> str:
    """What each preset sets, as flags."""
    said = {
        preset: " ".join(
            f"--{name} {f'{value:.3g}' if isinstance(value, float) else value}" for name, value in one.items()
        )
        for preset, one in PRESETS.items()
    }
    return table(["`--preset`", "stands for"], [[f"`{preset}`", code(flags)] for preset, flags in said.items()])


def _answers(given: dict[str, Any]) -> str:
    answers = given.get("verbalizers") or given.get("candidates")
    return " ".join(code(answer.strip()) for answer in answers.values()) if answers else "each row's own"


def tasks() -> str:
    """Every built-in task: its text, answers and metrics, and how many of its rows are packaged."""
    rows = []
    for name in builtin_tasks():
        given = json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))
        splits = [DEMO_DATA / name / f"{split}.jsonl" for split in ("train", "val")]
        counts = [str(len(file.read_text(encoding="utf-8").splitlines())) for file in splits if file.is_file()]
        packaged = " and ".join(counts) if counts else "none"
        rows.append([f"`{name}`", code(given["text"]), _answers(given), ", ".join(given["metrics"]), packaged])
    return table(["`--task`", "text", "answers", "metrics", "packaged rows, train and val"], rows)


def ds_configs() -> str:
    """Every packaged DeepSpeed configuration: where it keeps the weights, and what crosses the network."""
    rows = []
    for file in sorted((ROOT / "ds_configs").glob("*.json")):
        zero = json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]
        weights, sent = "sharded over all ranks", "every gather"
        if zero["stage"] < 3:
            weights, sent = "whole on each rank", "nothing of the backbone"
        if "zero_hpz_partition_size" in zero:
            weights, sent = f"{weights}, and once more over each host's ranks", "nothing after loading"
        if zero.get("zero_quantized_weights"):
            weights, sent = f"{weights}; a layer's matrices are sent as int8", "about half of every gather"
        device = zero.get("offload_param", {}).get("device")
        weights += {"cpu": ", shards in the hosts' memory", "nvme": ", shards in files under `--nvme_path`"}.get(
            device, ""
        )
        usual = " (the default)" if file.name == Path(DEFAULT_DS_CONFIG).name else ""
        rows.append([f"`{file.stem}`{usual}", str(zero["stage"]), weights, sent])
    return table(
        ["`--ds_config`", "ZeRO stage", "where the backbone's weights lie", "what hosts send each other"], rows
    )


TABLES: dict[str, Callable[[], str]] = {
    "perturbations": perturbations, "divergences": divergences, "presets": presets, "tasks": tasks,
    "ds_configs": ds_configs,
}  # fmt: skip


def filled(text: str, page: str) -> str:
    """A page with its marked tables made anew. Raises ValueError for a marker that names no table."""
    for _, name, _ in MARKED.findall(text):
        if name not in TABLES:
            raise ValueError(f"{page}: there is no table {name!r}; choose from {', '.join(TABLES)}.")
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def made_pages() -> dict[Path, str]:
    """What each generated page, or page with a generated table, should hold."""
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    made = {page: filled(text, page.name) for page, text in texts.items() if MARKED.search(text)}
    return made | {DOCS / "command_line.md": command_line()}


def main() -> int:
    """Writes the pages, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is stale")
    args = parser.parse_args()
    stale = [
        (page, made) for page, made in made_pages().items() if not page.is_file() or page.read_text("utf-8") != made
    ]
    for page, made in stale:
        if args.check:
            print(f"{page.relative_to(ROOT)} is stale; run python scripts/make_docs.py", file=sys.stderr)
        else:
            page.write_text(made, encoding="utf-8")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
