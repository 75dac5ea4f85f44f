"""Started by plan_ranks.py: ranks as forked children of one process that has imported everything.

    python plan_worker.py FOLDER    reads FOLDER/scenarios.json, writes FOLDER/<name>-<rank>.json

Real ranks meet over gloo. A dry run's are one rank each of a fake process group, whose collectives move nothing: a
gather repeats the rank's own part. Values then mean nothing; sizes, shards and the order of collectives are real.
"""

import json
import multiprocessing
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from ptp_ds.hosts.probe import take_port
from ptp_ds.ranks.distributed import Ranks, prepare_environment, start_processes, stop_processes

prepare_environment()

import deepspeed.ops  # noqa: E402, F401 - before the fork, as everything below
import torch  # noqa: E402
from bench_measure import PeakMemory, weights_of  # noqa: E402
from deepspeed.runtime.zero import partition_parameters, stage3  # noqa: E402, F401
from deepspeed.runtime.zero import utils as zero_utils  # noqa: E402
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: E402, F401 - 1.4 s, which each rank would spend
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402, F401
from transformers import LlamaConfig  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402, F401

from ptp_ds.backbone.activations import Activations  # noqa: E402
from ptp_ds.backbone.backbone import Backbone  # noqa: E402
from ptp_ds.backbone.sharded_loading import build_sharded, fill_randomly  # noqa: E402
from ptp_ds.config import zero_options  # noqa: E402
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config  # noqa: E402
from ptp_ds.config.run_config import RunConfig  # noqa: E402
from ptp_ds.packing.row import pack  # noqa: E402
from ptp_ds.perturb import Noise  # noqa: E402
from ptp_ds.prompts import SoftPrompt  # noqa: E402
from ptp_ds.tasks import load_task  # noqa: E402
from ptp_ds.tasks.example import Example  # noqa: E402
from ptp_ds.training import trainer as trainer_module  # noqa: E402
from ptp_ds.training.engine import Engine  # noqa: E402
from ptp_ds.training.monitor import Monitor  # noqa: E402
from ptp_ds.training.progress import Progress  # noqa: E402
from ptp_ds.training.step import settings_of, step_in_parts  # noqa: E402
from ptp_ds.training.trainer import Trainer  # noqa: E402


class TorchQuantiser:
    """DeepSpeed's CUDAQuantizer in torch, symmetric int8 in groups: what a machine without a GPU can test."""

    def quantize(self, tensor: torch.Tensor, groups: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        grouped = tensor.float().view(-1, 64)
        scales = grouped.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return (grouped / scales).round().to(torch.int8).view(-1), scales.view(-1)

    def dequantize(self, numbers: torch.Tensor, scales: torch.Tensor, dtype: Any = None) -> torch.Tensor:
        return (numbers.float().view(scales.numel(), -1) * scales.view(-1, 1)).view(-1).to(dtype or torch.float32)


class FirstLayers(Activations):
    """Recomputes so many of the first layers."""

    def __init__(self, count: int, chunk_tokens: int) -> None:
        super().__init__("auto", chunk_tokens)
        object.__setattr__(self, "count", count)

    def recomputed(self, tokens: int, layers: int) -> int:
        return self.count


class Collectives(TorchDispatchMode):
    """Every collective inside, in order: [operation, elements of the first tensor, bytes of it]."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), None)
            size = [first.numel(), first.nbytes] if first is not None else [0, 0]
            self.calls.append([func._overloadpacket.__name__, *size])
        return func(*args, **(kwargs or {}))


def examples_of(count: int, first: int, tokens: int) -> list[Example]:
    """Rows of `tokens` random tokens, more or less, with two one-token answers, numbered from `first`."""
    generator, rows = torch.Generator().manual_seed(first), []
    for index in range(first, first + count):
        size = tokens + index % 5 - 2
        ids = torch.randint(0, 512, (size,), generator=generator).tolist()
        rows.append(Example(context_ids=ids, movable=[True] * size, candidate_ids=[[1], [3]], gold=1, index=index))
    return rows


def built(scenario: dict[str, Any], ranks: Ranks, batch: int) -> tuple[RunConfig, Engine]:
    """The run and its engine around a random model."""
    zero = scenario.get("zero", {})
    run = RunConfig(
        ds_config="ds_configs/zero3.json", perturbation=scenario["perturbation"], batch_size=batch, ascent_steps=2,
        max_steps=2, eval_every=0, save_every=0, log_every=1, warmup_steps=0, prompt_length=scenario["prompt_length"],
    )  # fmt: skip
    raw = read_ds_config(run.ds_config)
    raw["zero_optimization"] |= zero
    config = LlamaConfig(**scenario["model"], max_position_embeddings=512, pad_token_id=None)
    resolved = resolve_ds_config(
        raw, run, set(), ranks.world, config.hidden_size, host_ranks=scenario.get("host_ranks", ranks.world)
    )
    model = build_sharded(config, resolved)
    torch.manual_seed(ranks.rank)
    fill_randomly(model)
    activations = Activations(scenario["activations"], scenario.get("chunk_tokens", 2048))
    if "recomputed" in scenario:
        activations = FirstLayers(scenario["recomputed"], activations.chunk_tokens)
    backbone = Backbone(model, activations)
    length, width = run.prompt_length, config.hidden_size
    engine = Engine(SoftPrompt(torch.zeros(length, width)), backbone, resolved, ranks)
    engine.set_prompt(torch.randn(length, width, generator=torch.Generator().manual_seed(0)))
    return run, engine


def real(scenario: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    """Two measured steps of one rank among others."""
    world = scenario["world"]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    if scenario.get("int8"):
        partition_parameters.CUDAQuantizer = TorchQuantiser
        zero_options.require_quantiser = lambda file: None
    ranks = start_processes()
    run, engine = built(scenario, ranks, scenario["rows"] * world)
    shards, model = engine.backbone.shards, engine.backbone.model
    examples, parts = (
        examples_of(scenario["rows"], rank * scenario["rows"], scenario["tokens"]),
        scenario.get("parts", 1),
    )
    rows, peak = [pack(examples[part::parts]) for part in range(parts)], 0
    for step in range(2):  # the first one makes what stays
        shards.traffic.reset()
        memory = PeakMemory(weights_of(engine.backbone))
        with memory if step else nullcontext():
            settings = settings_of(run, 1.0)
            step_in_parts(
                engine, rows, [None] * parts, run, settings, Noise(0, step), 0.01, global_count=run.batch_size
            )
        peak = memory.peak
    kept, whole = engine.sharded_elements()
    report = {
        "gathered_bytes": shards.traffic.gathered_bytes, "peak_elements": shards.traffic.peak_elements, "kept": kept,
        "whole": whole, "peak_bytes": peak, "tokens": sum(row.num_tokens for row in rows),
        "grad_norm": engine.grad_norm(),
        "prompt": engine.prompt().flatten().tolist()[:200],
    }  # fmt: skip
    if scenario.get("int8"):
        report |= int8_errors(model, shards)
    (folder / f"{scenario['name']}-{rank}.json").write_text(json.dumps(report))
    stop_processes()


def int8_errors(model: Any, shards: Any) -> dict[str, float]:
    """Largest errors of layer 0's matrices, over their largest number, and of its vectors, against exact gathers."""
    layer = model.model.layers[0]
    with shards.layer(0):
        rough = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    parameters = list(layer.parameters())
    parameters[0].all_gather_coalesced(parameters).wait()
    exact = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    parameters[0].partition(parameters)
    errors = {name: float((rough[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact}
    return {
        "matrices": max(error for name, error in errors.items() if exact[name].dim() == 2),
        "least": min(error for name, error in errors.items() if exact[name].dim() == 2),
        "vectors": max(error for name, error in errors.items() if exact[name].dim() == 1),
    }


def dry(scenario: dict[str, Any], rank: int, folder: Path) -> None:
    """Two steps of the real trainer, then its evaluation and save, as one rank of a fake process group."""
    world = scenario["world"]
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world, "MASTER_PORT": 0}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    # DeepSpeed compares lists with rank 0's, which a fake broadcast doesn't bring: each rank's own stand for them.
    zero_utils.dist = SimpleNamespace(**{**vars(zero_utils.dist), "get_rank": lambda group=None: 0})
    start_processes()
    ranks = Ranks(rank, world, 0, torch.device("cpu"))
    run, engine = built(scenario, ranks, scenario["rows"] * world)
    train, output = examples_of(scenario["rows"] * world * 3, 0, scenario["tokens"]), folder / f"run-{world}-{rank}"
    task, steps, traffic = load_task("Reviews"), [], engine.backbone.shards.traffic
    collectives, whole_step = Collectives(), Trainer._optimizer_step

    def noting(trainer: Trainer, progress: Progress, meter: Any) -> None:
        traffic.reset()
        start = len(collectives.calls)
        whole_step(trainer, progress, meter)
        batch, places = trainer._dealt(progress.step)
        rows = [batch[place].index for place in places[ranks.rank]]
        steps.append({"rows": rows, "calls": collectives.calls[start:], "bytes": traffic.gathered_bytes})

    Trainer._optimizer_step = noting  # type: ignore[method-assign]
    trainer_module.require_finite = lambda *_: None  # values mean nothing
    monitor = Monitor(output, ranks, 0, run.max_steps)
    trainer = Trainer(
        run=run, task=task, engine=engine, ranks=ranks, settings=settings_of(run, 1.0), train_examples=train,
        select_examples=examples_of(6, 0, 9), monitor=monitor, output_dir=output, identity={"dry": True},
    )  # fmt: skip
    with collectives:
        trainer.train(Progress())
    monitor.close()
    dealt = [
        replace(trainer, ranks=Ranks(r, world, 0, ranks.device))._dealt(0)[1][r]
        for r in (range(world) if rank == 0 else ())
    ]  # fmt: skip
    kept, whole = engine.sharded_elements()
    report = {
        "calls": collectives.calls, "steps": steps, "kept": kept, "whole": whole, "dealt": dealt,
        "saved": sorted(path.name for path in (output / "checkpoints").glob("*/*")),
        "parts": [[p.ds_numel, p.ds_tensor.numel()] for p in engine.backbone.parameters()],
        "batch": trainer._order.batch(0),
    }  # fmt: skip
    (folder / f"{scenario['name']}-{rank}.json").write_text(json.dumps(report))


def main(folder: Path) -> None:
    forked = multiprocessing.get_context("fork")
    for scenario in json.loads((folder / "scenarios.json").read_text()):
        if scenario.get("dry"):
            batches = [[forked.Process(target=dry, args=(scenario, rank, folder))] for rank in scenario["ranks"]]
        else:
            port, ranks = take_port(None), range(scenario["world"])
            batches = [[forked.Process(target=real, args=(scenario, rank, port, folder)) for rank in ranks]]
        for children in batches:
            for child in children:
                child.start()
            for child in children:
                child.join(120)
                if child.exitcode != 0:
                    for other in children:
                        other.kill()
                    raise SystemExit(f"{scenario['name']}: a rank ended with {child.exitcode}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
