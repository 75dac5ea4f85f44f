"""The plans of all ds_configs for a model, a cluster and a run's flags, as text and as plain data."""

from dataclasses import asdict
from typing import Any

from ptp_ds.backbone.shapes import ModelShape, config_of, shape_of
from ptp_ds.config.ds_config import read_ds_config
from ptp_ds.config.population import is_population, members_of
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.models.heads import head_kind
from ptp_ds.planning.plan import Estimate, estimate, recommended
from ptp_ds.planning.tokens import tokens_of
from ptp_ds.planning.way import KEEP
from ptp_ds.planning.work import Cluster, Load, layout_of, load_of, population_load

CONFIGS = ("zero2", "zero3", "zero3_hpz", "zero3_offload", "zero3_nvme", "zero3_quantized")
_GB, _GIB = 1e9, 2.0**30


def plans(
    cluster: Cluster, run: RunConfig, explicit: set[str], members: int = 1
) -> tuple[ModelShape, Load, str, list[Estimate]]:
    """(the model's shapes, the step, where its tokens come from, a plan for each ds_config). Raises ValueError.

    members: prompts that train at once, each as the run says; a run's own --seeds or --population say so themselves.
    """
    config = config_of(run.model)
    kind = head_kind(config, run.head)
    if kind == "seq2seq":
        raise UserError(f"--model {run.model}: encoder-decoders take the generic path, which isn't planned for.")
    shape = shape_of(config, kind)
    size = 4 if run.precision == "fp32" else 2
    runs = list(members_of(run).values()) if is_population(run) else [run] * members
    steps = tokens_of(runs, explicit, cluster.world, config)
    load = population_load([
        load_of(one, shape, size, step.tokens, step.in_rows, step.shared)
        for one, step in zip(runs, steps, strict=True)
    ])  # fmt: skip
    found = []
    for name in CONFIGS:
        layout = layout_of(name, read_ds_config(f"ds_configs/{name}.json"), cluster)
        found.append(estimate(shape, load, layout, cluster, run.activations, run.schedule))
    return shape, load, steps[0].source, found


def _table(found: list[Estimate], layers: int, wanted: str) -> list[str]:
    """A line for each ds_config below the columns' names; all: with the activations that the run would take. wanted:
    --activations."""
    names = ("weights", "gathered", "keep", "recompute", "all")
    head = f"{'':16s}" + "".join(f"{name:>10s}" for name in names) + " fits"
    head += f"{'gathered':>10s}{'to a host':>10s}{'seconds':>9s}  {'bound':12s} {'activations':17s}{'most tokens':>11s}"
    lines = [f"{'':16s}{'GiB a rank':>50s}{'':5s}{'GB a step':>20s}", head]
    for one in found:
        mode = wanted if wanted != "auto" else "keep" if one.way == KEEP else "recompute"
        memory, kept = one.memory, one.activations
        sizes = (memory.shards, memory.gathered, kept["keep"], kept["recompute"], memory.total)
        line = f"{one.layout.name:16s}" + "".join(f"{size / _GIB:10.2f}" for size in sizes)
        line += f" {'yes' if one.fits else 'no':4s}"
        line += "".join(f"{size / _GB:10.1f}" for size in (one.gathered_bytes, one.between_hosts))
        line += f"{one.step_seconds:9.2f}  {one.bound:12s} {one.way.describe(layers):17s}{one.most_tokens[mode]:11d}"
        lines.append(line)
    return lines


def report(cluster: Cluster, run: RunConfig, explicit: set[str], members: int = 1) -> tuple[str, dict[str, Any]]:
    """(the text, the same as plain data). members: see plans."""
    shape, load, source, found = plans(cluster, run, explicit, members)
    members = len(members_of(run)) if is_population(run) else members
    best = recommended(found)
    lines = [
        f"{run.model}: {shape.elements / 1e9:.2f} billion weights, {shape.count} layers, "
        f"{'fp32' if load.size == 4 else 'half precision'}; {cluster.hosts} host(s) x {cluster.gpus} GPU(s), "
        f"{cluster.gpu_memory / _GIB:.0f} GiB usable each",
        f"{run.perturbation}, prompt {run.prompt} {run.prompt_length}; {load.tokens} tokens a step, {load.streams} "
        f"stream(s) ({source}{f', for each of {members} prompts' if members > 1 else ''})",
        "",
        *_table(found, shape.count, run.activations),
    ]
    host = {one.layout.name: one.memory.host * cluster.gpus / _GIB for one in found if one.memory.host}
    lines += ["", "host memory, GiB: " + ", ".join(f"{name} {size:.1f}" for name, size in host.items())]
    work, reduced = found[0].operations, found[0].reduced_bytes
    lines.append(
        f"a rank's step: {work / 1e12:.1f} TFLOP in matrix products; prompt and optimizer "
        f"{found[0].memory.prompt / 2**20:.1f} MiB, {reduced / 2**20:.1f} MiB of gradient reduced"
    )
    if best is None:
        lines.append("recommended: none fits; more GPUs, fewer --tokens_per_step or --activations recompute")
    else:
        name = f"ds_configs/{best.layout.name}.json"
        lines.append(f"recommended: {name} ({best.bound} bound)")
        depth = estimate(shape, load, best.layout, cluster, run.activations, "depth")
        if depth.way.parts > 1 and best.way.parts == 1 and depth.fits and depth.step_seconds < 0.95 * best.step_seconds:
            lines.append(
                f"with --schedule depth, {depth.way.parts} micro-batches of which each gathers all layers, it would "
                f"take {depth.step_seconds:.2f} s instead of {best.step_seconds:.2f}"
            )
        most = {way: tokens // members for way, tokens in best.most_tokens.items()}
        ways = ", ".join(f"{most[way]} with --activations {way}" for way in ("keep", "recompute"))
        each = " for each prompt" if members > 1 else ""
        lines.append(f"largest --tokens_per_step{each} that fits: {ways}")
        lines += [
            f"{one.layout.name} would take {one.step_seconds:.2f} s, with weights rounded to int8: not the same model"
            for one in found if one.layout.int8 and one.fits and one.step_seconds < 0.95 * best.step_seconds
        ]  # fmt: skip
    data = {
        "model": run.model, "members": members, "elements": shape.elements, "cluster": asdict(cluster),
        "load": asdict(load),
        "recommended": best.layout.name if best else None,
        "plans": [
            asdict(one)
            | {"step_seconds": one.step_seconds, "bound": one.bound, "mode": one.way.describe(shape.count)}
            for one in found
        ],
    }  # fmt: skip
    return "\n".join(lines), data
