"""Pictures of studies and landscapes, as PNG by matplotlib without a screen."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptp_ds.errors import UserError
from ptp_ds.files import writing
from ptp_ds.studies.statistics import spread_of

_SIZE, _DPI = 4.0, 120  # inches a panel, dots an inch


def require_plot_extra() -> None:
    """UserError where a package of the `plot` extra isn't installed: for commands, before anything is computed."""
    for package, name in (("matplotlib", "matplotlib"), ("scipy", "SciPy")):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"Studies, landscapes and robustness need matplotlib and SciPy, and {name} isn't installed: "
                "pip install 'ptp_ds[plot]'."
            )


def figure(columns: int, rows: int = 1, **how: Any) -> tuple[Any, Any]:
    """(figure, [rows, columns] axes)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (_SIZE * columns, _SIZE * rows)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **how)


def save(picture: Any, file: Path) -> None:
    """Writes the picture as PNG, whose folder is made, and forgets it. Raises UnwritableError."""
    from matplotlib import pyplot

    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(file, dpi=_DPI)
    pyplot.close(picture)


def strip_plot(
    file: Path, title: str, scores: Mapping[str, Sequence[float]], lines: Mapping[str, float] | None = None
) -> None:
    """Every seed's score by method, with each method's mean and a band of one standard deviation.

    lines: names of horizontal lines, such as the majority class, and where they lie.
    """
    picture, axes = figure(1)
    picture.set_figwidth(max(picture.get_figwidth(), 0.8 * len(scores)))  # room for the methods' names
    axis = axes[0, 0]
    for place, values in enumerate(scores.values()):
        if not len(values):
            continue
        spread = spread_of(values)
        colour = f"C{place}"
        low, high = spread.mean - (spread.std or 0.0), spread.mean + (spread.std or 0.0)
        axis.fill_between([place - 0.3, place + 0.3], low, high, color=colour, alpha=0.2, linewidth=0)
        axis.hlines(spread.mean, place - 0.3, place + 0.3, color=colour)
        beside = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0.0]
        axis.plot(place + np.asarray(beside), values, "o", color=colour, markersize=4)
    for place, (name, height) in enumerate((lines or {}).items()):
        axis.axhline(height, color="grey", linestyle=":" if name == "untrained" else "--", linewidth=1)
        at, side = ((0.01, "left"), (0.99, "right"))[place % 2]  # names of lines that lie close don't cover each other
        axis.annotate(name, (at, height), xycoords=("axes fraction", "data"), ha=side, va="bottom", fontsize=7)
    axis.set_xticks(range(len(scores)), list(scores), rotation=30, ha="right")
    axis.set_xlim(-0.6, len(scores) - 0.4)
    axis.set_ylabel("score")
    axis.set_title(title)
    save(picture, file)


def landscapes(file: Path, title: str, planes: Mapping[str, Any], labels: tuple[str, str]) -> None:
    """A surface above a contour for each plane (ptp_ds.studies.landscape.Plane), all on one scale."""
    picture, _ = figure(len(planes), 2)
    low, high = (
        pick(float(pick_all(plane.values)) for plane in planes.values())
        for pick, pick_all in ((min, np.min), (max, np.max))
    )
    levels = np.linspace(low, high, 21) if high > low else 1
    for axis in picture.axes:
        axis.remove()
    for place, (name, plane) in enumerate(planes.items(), start=1):
        xs, ys = np.meshgrid(plane.xs, plane.ys)
        surface = picture.add_subplot(2, len(planes), place, projection="3d")
        surface.plot_surface(xs, ys, plane.values, cmap="viridis", vmin=low, vmax=high)
        surface.set_zlim(low, high)
        surface.set_title(name)
        contour = picture.add_subplot(2, len(planes), place + len(planes))
        shown = contour.contourf(xs, ys, plane.values, levels=levels, cmap="viridis", vmin=low, vmax=high)
        for panel in (surface, contour):
            panel.set_xlabel(labels[0])
            panel.set_ylabel(labels[1])
        contour.set_aspect("equal")
    picture.colorbar(shown, ax=picture.axes[1::2], label="cross-entropy", shrink=0.8)
    picture.suptitle(title)
    save(picture, file)


def curves(
    file: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], labels: Mapping[str, str]
) -> None:
    """A panel a kind of change, with each prompt's score by level."""
    picture, axes = figure(len(panels), sharey=True)
    for axis, (kind, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), "o-", label=name, markersize=3)
        axis.set_title(kind)
        axis.set_xlabel(labels[kind], fontsize=7)
    axes[0, 0].set_ylabel("score")
    axes[0, 0].legend(fontsize=7)
    save(picture, file)
