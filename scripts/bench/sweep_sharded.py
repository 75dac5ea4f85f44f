"""family_sweep.py --sharded: a packed family on two ranks under ZeRO-3, loaded from files, against the unsharded model.

Nothing stays gathered for its own sake, so that every parameter is read in shards. Each rank scores its share of the
examples; scores are compared with plain ones, the summed gradient of a train step with that of one process. In bf16
every parameter and buffer is compared with the unsharded model's, in dtype and to the bit.
"""

import json
import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from sweep_compare import PROMPT, Case, distance, relative, rows_of, scores_of, step_of, unlikely_golds
from sweep_models import LABELS, Recipe, make_model
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import checked_backbone
from ptp_ds.backbone.loading import load_backbone
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.hosts.probe import take_port
from ptp_ds.models.heads import HeadPlan
from ptp_ds.ranks.distributed import Ranks, start_processes, stop_processes
from ptp_ds.tasks.example import Example

RANKS = 2
_STRICT = {
    "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0,
}  # fmt: skip
_AUTO = {"bf16": {"enabled": "auto"}}
_TRAINED = ("classifier", "score")  # a run starts these anew


@dataclass(frozen=True)
class Work:
    """What a rank needs. perturbation: of the step whose gradient is compared."""

    folder: Path
    kind: str
    examples: list[Example]
    trained: Tensor
    perturbation: str


def compare_sharded(case: Case, recipe: Recipe, perturbation: str = "gaussian") -> dict[str, Any]:
    """Distances of scores and of a step's gradient; names of tensors that differ in bf16; or why it is refused."""
    examples = unlikely_golds(case, case.shapes[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(recipe, eager=False).save_pretrained(folder)
        recipe.config.save_pretrained(folder)  # some models save a part of it
        (folder / "strict.json").write_text(json.dumps({"zero_optimization": _STRICT} | _AUTO))
        (folder / "whole.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | _AUTO))
        reports = _on_ranks(Work(folder, recipe.kind, examples, case.trained, perturbation))
    if failed := [report for report in reports if "scores" not in report]:
        return failed[0]
    with torch.no_grad():
        wanted = case.truth(examples, case.trained)
    found = torch.full_like(wanted, float("-inf"))
    for rank, report in enumerate(reports):
        found[rank::RANKS, : report["scores"].shape[1]] = torch.from_numpy(report["scores"])
    gradient, _ = step_of(case.backbone, case.trained, examples, perturbation)
    apart = relative(torch.stack([torch.from_numpy(report["gradient"]) for report in reports]).sum(0), gradient)
    differs = sorted({name for report in reports for name in report["differs"]})
    in_bf16 = max(float(report["bf16"]) for report in reports)
    return {"sharded": distance(found, wanted), "sharded step": apart, "sharded bf16": in_bf16, "differs": differs}


def _on_ranks(work: Work) -> list[dict[str, Any]]:
    """What each rank sends."""
    context, port = multiprocessing.get_context("fork"), str(take_port(None))
    pipes, processes = [], []
    for rank in range(RANKS):
        receiver, sender = context.Pipe(duplex=False)
        pipes.append(receiver)
        processes.append(context.Process(target=_rank, args=(rank, port, work, sender)))
        processes[-1].start()
        sender.close()
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        return [{"error": f"a rank died with exit code {[process.exitcode for process in processes]}"}]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _rank(rank: int, port: str, work: Work, to_parent: Connection) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    ranks = start_processes()
    try:
        report = _examine(ranks, work)
    except Exception as error:
        said = " ".join(str(error).split())
        refused = isinstance(error, UserError) and "can't be served" in said
        report = {"refused": said.split(" Use one ")[0]} if refused else {"error": f"{type(error).__name__}: {said}"}
    to_parent.send(report)
    stop_processes()


def _load(ranks: Ranks, work: Work, file: str, precision: str) -> Backbone:
    run = RunConfig(precision=precision, ds_config=str(work.folder / file))
    resolved = resolve_ds_config(read_ds_config(run.ds_config), run, set(), ranks.world, 32)
    outputs = LABELS if work.kind == "classes" else 0
    return load_backbone(work.folder, resolved, ranks, HeadPlan(work.kind, outputs=outputs))


def _examine(ranks: Ranks, work: Work) -> dict[str, Any]:
    """This rank's scores and its part of the gradient; which tensors differ."""
    whole, half = (_load(ranks, work, file, "bf16") for file in ("whole.json", "strict.json"))
    wanted, found = (_scores(backbone, work, ranks.rank) for backbone in (whole, half))
    backbone, _ = checked_backbone(_load(ranks, work, "strict.json", "fp32"), ranks=ranks)
    scores = _scores(backbone, work, ranks.rank)
    gradient, _ = step_of(backbone, work.trained, work.examples[ranks.rank :: RANKS], work.perturbation)
    differs = _different(whole.model, half.model)
    report = {"scores": scores, "gradient": gradient, "bf16": torch.tensor(distance(found, wanted))}
    return {"differs": differs, **{name: tensor.numpy() for name, tensor in report.items()}}


@torch.no_grad()
def _scores(backbone: Backbone, work: Work, rank: int) -> Tensor:
    """[B, C] of this rank's examples."""
    backbone.serve("soft", rows_of(work.kind), PROMPT)
    with backbone.shards.outside_layers():
        return scores_of(backbone, backbone.rows.pack(work.examples[rank::RANKS]), work.trained)


def _different(whole: torch.nn.Module, sharded: torch.nn.Module) -> list[str]:
    """Names of parameters and buffers that aren't the same in both models."""
    import deepspeed

    wanted = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    found: dict[str, Tensor] = dict(sharded.named_buffers())
    for name, parameter in sharded.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            found[name] = parameter.detach().clone()
    names = {name for name in {*wanted, *found} if not any(part in name for part in _TRAINED)}
    return [
        name
        for name in names
        if name not in wanted or name not in found or wanted[name].dtype != found[name].dtype
        or not torch.equal(wanted[name], found[name])
    ]  # fmt: skip
