"""Run by tests/backbone/test_check_on_ranks.py on two ranks, of which one rounds otherwise, or fails."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ptp_ds.backbone import check
from ptp_ds.backbone.backbone import Backbone, FamilyError
from ptp_ds.backbone.sharded_loading import build_sharded, fill_randomly
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.ranks.distributed import Ranks, exit_process, start_processes, stop_processes
from tests.support.reference import make_model


@contextmanager
def instead(name: str, function: Callable[..., Any], here: bool = True) -> Iterator[None]:
    """A function of the check replaced inside, on this rank if `here`. function: is given the real one, then its
    arguments."""
    real = getattr(check, name)
    if here:
        setattr(check, name, lambda *given: function(real, *given))
    try:
        yield
    finally:
        setattr(check, name, real)


def whole() -> Backbone:
    return Backbone(make_model("llama"))


def gathered(ranks: Ranks) -> Backbone:
    """A model whose layers are gathered by collectives."""
    run = RunConfig(precision="fp32", ds_config="ds_configs/zero3.json")
    resolved = resolve_ds_config(read_ds_config(run.ds_config), run, set(), ranks.world, 32)
    model = build_sharded(make_model("llama").config, resolved)
    torch.manual_seed(0)
    fill_randomly(model, 0.2)
    return Backbone(model)


def result(backbone: Backbone, ranks: Ranks) -> dict[str, Any]:
    """What the check makes of a model on this rank, and a sum over ranks: whether their collectives still meet."""
    try:
        backbone, refused = check.checked_backbone(backbone, ranks=ranks)
        reason = str(refused or "")
    except UserError as error:
        reason = f"refused: {error}"
    found = {"reason": reason, "packs": backbone.packs, "narrows": backbone.narrows}
    found["head"] = backbone.head_input if backbone.packs else None
    return {**found, "sum": int(ranks.sum(torch.ones(1)))}


def more(error: float) -> Callable[..., float]:
    return lambda real, *given: max(real(*given), error)


def fail(real: Callable[..., Any], *given: Any) -> Any:
    raise NotImplementedError("no such kernel")


def refuse_packed(real: Callable[..., None], backbone: Backbone, *given: Any) -> None:
    if backbone.packs:
        raise FamilyError(backbone.model, "no such kernel")
    real(backbone, *given)


def main(folder: Path) -> None:
    ranks = start_processes()
    second, found = ranks.rank == 1, {}
    with instead("_gradient_errors", more(1.1e-5), second):  # beyond what is never looked into; the other rank's isn't
        found["rounds more"] = result(gathered(ranks), ranks)
    with instead("_gradient_errors", more(1.0), second):
        found["gathered, wrong"] = result(gathered(ranks), ranks)
        found["whole, wrong"] = result(whole(), ranks)
    with instead("_scored_alone", more(1.0), second), instead("_narrows", lambda *_: False, second):
        found["can less"] = result(whole(), ranks)
    with instead("_refuse_pass", refuse_packed, second):
        found["fails packed"] = result(whole(), ranks)
    for name in ("packed_pass", "_references", "_narrows"):
        with instead(name, fail, second):
            found[f"fails in {name}"] = result(whole(), ranks)
    found["well"] = result(whole(), ranks)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process(0)  # see there: a rank now and then aborts in the interpreter's own teardown
