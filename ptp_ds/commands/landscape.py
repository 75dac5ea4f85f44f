"""scripts/landscape.py: cross-entropy around trained prompts, as pictures on one scale and as numbers."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ptp_ds.adapters.origin import adapter_rows
from ptp_ds.adapters.read import adapter_folder
from ptp_ds.adapters.record import versions
from ptp_ds.adapters.served import Served, alone, serve, whole
from ptp_ds.adapters.task import adapter_task
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.commands.exits import run_command
from ptp_ds.config.parsers import landscape_parser
from ptp_ds.errors import UserError
from ptp_ds.files import require_writable_folder, write_json, writing
from ptp_ds.ranks.distributed import env_world, prepare_environment
from ptp_ds.ranks.log import get_logger
from ptp_ds.studies.landscape import (
    InputLoss,
    Plane,
    Subject,
    input_axes,
    input_plane,
    prompt_plane,
)
from ptp_ds.studies.pictures import landscapes, require_plot_extra
from ptp_ds.tasks.data import Split
from ptp_ds.tasks.example import Example

log = get_logger(__name__)
_LABELS = {"input": ("gradient direction", "random orthogonal direction"),
           "prompt": ("first random direction", "second random direction")}  # fmt: skip


def require_counts(args: argparse.Namespace, names: Sequence[str]) -> None:
    """UserError for a number below 1 in one of these flags, and where a launcher started several processes."""
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; expected a whole number of 1 or more.")
    if env_world() > 1:
        script = Path(sys.argv[0]).name
        raise UserError(f"scripts/{script} is one process; start it with plain python, not with a launcher.")


def _parse(argv: Sequence[str], description: str) -> argparse.Namespace:
    args = landscape_parser(description).parse_args(argv)
    require_counts(args, ("rows", "eval_tokens"))
    if not 0 <= args.tolerance < 1:
        raise UserError(f"--tolerance is {args.tolerance}; expected a share from 0 up to below 1.")
    if args.grid < 3 or args.grid % 2 == 0:
        raise UserError(f"--grid is {args.grid}; expected an odd number of 3 or more, so that 0 is a point.")
    for name in ("radius", "prompt_radius"):
        if not 0 < getattr(args, name) < 1e6:
            raise UserError(f"--{name} is {getattr(args, name)}; expected a number above 0.")
    most = min(args.radius if space == "input" else args.prompt_radius for space in args.spaces)
    for radius in args.radii or ():
        if not 0 < radius <= most:
            raise UserError(f"--radii {radius:g}: expected numbers above 0 and up to the planes' radius, {most:g}.")
    return args


@dataclass(frozen=True)
class Opened:
    """Prompts on one backbone, and the rows that all are scored on. split: where the rows are from, whole."""

    backbone: Backbone
    subjects: list[Subject]
    examples: list[Example]
    split: Split


def open_adapters(args: argparse.Namespace, trainable: bool = True) -> tuple[Served, Opened]:
    """The adapters on their backbone, loaded once, and the first --rows labelled rows of --split; see adapters_parser.

    trainable: of those alone whose right answer is among their options. The Served is that of the longest prompt, or
    the shortest --max_length: its rows fit behind all. Raises UserError for adapters of different models, tasks or
    kinds of prompt, or a split without such rows, before the model is loaded.
    """
    folders = [adapter_folder(given) for given in args.adapters]
    task = adapter_task(folders[0], None)
    each = [serve([folder], model=args.model) for folder in folders]
    first = each[0]
    for given, one in zip(args.adapters, each, strict=True):
        what = {"model": (first.source.folder, one.source.folder), "task": (first.task.spec(), one.task.spec()),
                "kind of prompt": (first.kind, one.kind),
                "order of classes": (_classes(first), _classes(one))}  # fmt: skip
        for name, (wanted, found) in what.items():
            if wanted != found:
                raise UserError(
                    f"--adapters {given}: its {name} isn't that of {args.adapters[0]}; give adapters of one model, "
                    "task and kind of prompt."
                )
    read = adapter_rows(folders[0], task, args.split, args.data_dir, args.dataset)
    served = min(each, key=lambda one: one.room)
    found = served.examples(read, labelled=True)
    examples = [example for example in found if example.trainable or not trainable][: args.rows]
    if not examples:
        raise UserError(
            f"--split {args.split}: none of {len(found)} rows has its right answer among its options, so that there is "
            "no cross-entropy to look at; give another split."
        )
    backbone = served.load(whole(args.precision), alone(), examples)
    subjects = [
        Subject(name, one.trained(backbone)[0], one.rows) for name, one in zip(_names(folders), each, strict=True)
    ]
    return served, Opened(backbone, subjects, examples, read)


def _classes(served: Served) -> tuple[str, ...]:
    """The classes that a trained classifier knows, in its outputs' order: all prompts are asked with one's examples."""
    plan = served.source.head_plan
    return served.task.labels if plan.kind == "classes" and not plan.choice else ()


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of those above them as tell them apart."""
    paths = [folder.resolve().parent if folder.name == "adapter" else folder.resolve() for folder in folders]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(paths, start=1)]


def _planes(args: argparse.Namespace, space: str, opened: Opened) -> tuple[dict[str, Plane], dict[str, Any]]:
    """Each prompt's plane, and what else is told of it."""
    backbone, planes, extra = opened.backbone, {}, {}
    if space == "prompt":
        for subject in opened.subjects:
            planes[subject.name] = prompt_plane(
                backbone, subject, opened.examples, alone(), args.eval_tokens, args.prompt_radius, args.grid,
                args.tolerance, args.seed,
            )  # fmt: skip
            _tell(space, subject, planes[subject.name])
        return planes, {}
    axes = _axes(args, opened)
    for subject in opened.subjects:
        loss = InputLoss(backbone, subject, opened.examples, args.eval_tokens)
        planes[subject.name] = input_plane(loss, axes, args.radius, args.grid, args.tolerance, args.seed)
        _tell(space, subject, planes[subject.name])
        curvature = loss.curvature(args.seed)
        extra[subject.name] = {"curvature_mean": float(curvature.mean()), "curvature_largest": float(curvature.max())}
    return planes, extra


def _tell(space: str, subject: Subject, plane: Plane) -> None:
    """How many points were computed, and how far the others may be off."""
    whole = plane.computed == plane.values.size
    rest = "all" if whole else f"the others interpolated, at most {plane.error:.2g} nats off where that was tried"
    log.info("  %s space, %s: %d points computed, %s", space, subject.name, plane.computed, rest)


def _axes(args: argparse.Namespace, opened: Opened) -> tuple[Tensor, Tensor]:
    losses = [InputLoss(opened.backbone, one, opened.examples, args.eval_tokens) for one in opened.subjects]
    return input_axes(losses, args.seed)


def _landscape(args: argparse.Namespace) -> None:
    require_plot_extra()
    out = require_writable_folder("--output_dir", args.output_dir)
    served, opened = open_adapters(args)
    found: dict[str, dict[str, Any]] = {given: {} for given in args.adapters}
    arrays: dict[str, np.ndarray] = {"adapters": np.array(args.adapters)}
    for space in args.spaces:
        radius = args.radius if space == "input" else args.prompt_radius
        radii = args.radii or [share * radius for share in (0.1, 0.25, 0.5, 1.0)]
        planes, extra = _planes(args, space, opened)
        numbers = {name: {**plane.summary(radii), **extra.get(name, {})} for name, plane in planes.items()}
        for given, one in zip(args.adapters, numbers.values(), strict=True):
            found[given][space] = one
        arrays[f"{space}_axis"] = next(iter(planes.values())).xs
        arrays[f"{space}_values"] = np.stack([plane.values for plane in planes.values()])
        title = f"{served.task.name}, {len(opened.examples)} rows: cross-entropy, {space} space"
        landscapes(out / f"landscape-{space}.png", title, planes, _LABELS[space])
        for line in _table(space, numbers):
            log.info("%s", line)
    write_npz(out / "landscape.npz", arrays)
    record = {"task": served.task.name, "rows": len(opened.examples), "adapters": found, "versions": versions()}
    write_json(out / "landscape.json", record)
    _to_tensorboard(out, args.spaces)
    log.info("pictures, arrays and numbers: %s", out)


def write_npz(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """adapters [A]; of each space its axis, for X and for Y, and values [A, Y, X] in nats."""
    with writing(file), file.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _table(space: str, record: dict[str, Any]) -> list[str]:
    radii = list(next(iter(record.values()))["largest_rise"])
    heads = ["centre", *(f"max<={r}" for r in radii), *(f"mean<={r}" for r in radii), "slope"]
    heads += ["curvature"] if space == "input" else []
    width = max(24, *(len(name) + 1 for name in record))
    lines = [f"{space + ' space':{width}}" + "".join(f"{head:>11}" for head in heads)]
    for name, one in record.items():
        values = [one["centre"], *one["largest_rise"].values(), *one["mean_rise"].values(), one["largest_slope"]]
        values += [one["curvature_mean"]] if space == "input" else []
        shown = ("-" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"{name:{width}}" + "".join(f"{text:>11}" for text in shown))
    return lines


def _to_tensorboard(out: Path, spaces: Sequence[str]) -> None:
    from matplotlib import image
    from torch.utils.tensorboard import SummaryWriter

    with writing(out / "tensorboard"), SummaryWriter(str(out / "tensorboard")) as board:
        for space in spaces:
            picture = image.imread(out / f"landscape-{space}.png")
            board.add_image(f"landscape/{space}", picture[..., :3], dataformats="HWC")
        board.add_text("landscape", json.dumps({"spaces": list(spaces)}))


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence."""
    prepare_environment()
    return run_command(lambda: _landscape(_parse(sys.argv[1:] if argv is None else argv, description)))
