"""plan.py against measurement: bytes exactly, memory within 15 %, on 1, 2 and 4 CPU ranks; on 8 to 1024 fake ones."""

import json
import re
import sys
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from ptp_ds.backbone.shapes import NAMED, config_of, elements, shape_of
from ptp_ds.commands.plan import main, parse_plan
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.source import load_config
from ptp_ds.planning.plan import (
    between_hosts,
    estimate,
    gathered_bytes,
    held_elements,
    memory_of,
    most_tokens,
    operations_of,
    recommended,
    reduced_bytes,
    shard_elements,
)
from ptp_ds.planning.report import plans
from ptp_ds.planning.report import report as plan_of
from ptp_ds.planning.way import KEEP, Way
from ptp_ds.planning.work import Cluster, Layout, layout_of, load_of
from tests.support.paths import ROOT
from tests.support.plan_ranks import MODEL, SMALL, run_scenarios

BASE = {"model": MODEL, "prompt_length": 7, "tokens": 60, "rows": 4, "chunk_tokens": 126}  # two rows a chunk
HPZ, INT8 = {"zero_hpz_partition_size": "auto"}, {"zero_quantized_weights": True}
DRY = {"model": SMALL, "prompt_length": 5, "rows": 2, "tokens": 12, "activations": "keep", "perturbation": "pgd",
        "dry": True}  # fmt: skip
PASSES = 3  # pgd's two ascents and the last pass


def dry_run(world: int, ranks: list[int]) -> dict:
    return {**DRY, "name": f"dry{world}", "world": world, "ranks": ranks}


DRY_RANKS = {8: [0, 5], 64: [0, 63]}
SCENARIOS = [
    {**BASE, "name": "keep1", "world": 1, "perturbation": "gaussian", "activations": "keep"},
    {**BASE, "name": "recompute1", "world": 1, "perturbation": "pgd", "activations": "recompute"},
    {**BASE, "name": "recompute2", "world": 2, "perturbation": "gaussian", "activations": "recompute"},
    {**BASE, "name": "int8", "world": 2, "perturbation": "none", "activations": "keep", "zero": INT8, "int8": True},
    {**BASE, "name": "keep4", "world": 4, "rows": 2, "perturbation": "gaussian", "activations": "keep"},
    {**BASE, "name": "hpz4", "world": 4, "rows": 2, "perturbation": "gaussian", "activations": "keep", "zero": HPZ,
     "host_ranks": 2},
    {**BASE, "name": "parts1", "world": 1, "rows": 8, "perturbation": "gaussian", "activations": "keep", "parts": 4},
    {**BASE, "name": "again1", "world": 1, "rows": 8, "perturbation": "gaussian", "activations": "auto",
     "recomputed": 2},
]  # fmt: skip
LONG = [
    {**BASE, "name": f"{perturbation}-{mode}-{world}", "world": world, "perturbation": perturbation,
     "activations": mode, "rows": 8, "model": {**MODEL, "num_hidden_layers": 8}}
    for perturbation in ("none", "gaussian", "pgd") for mode in ("keep", "recompute") for world in (1, 2, 4)
]  # fmt: skip


LONE = [scenario for scenario in SCENARIOS if scenario["world"] == 1]
DRY_SCENARIOS = [dry_run(world, ranks) for world, ranks in DRY_RANKS.items()]


def cluster_of(hosts: int = 8, gpus: int = 8, memory: float = 72 * 2**30, cuda: bool = True) -> Cluster:
    return Cluster(
        hosts=hosts, gpus=gpus, gpu_memory=memory, interconnect=50e9, local=200e9, memory=2.5e12, link=25e9, disk=5e9,
        operations=4e14, cuda=cuda,
    )  # fmt: skip


def way_of(scenario: dict, layers: int) -> Way:
    """How a scenario's step goes through the layers."""
    if "recomputed" in scenario:
        return Way(scenario["recomputed"])
    return Way(layers if scenario["activations"] == "recompute" else 0, scenario.get("parts", 1))


def check(scenario: dict, reports: list[dict]) -> None:
    shape = shape_of(LlamaConfig(**scenario["model"], pad_token_id=None))
    world, gpus = scenario["world"], scenario.get("host_ranks", scenario["world"])
    cluster = cluster_of(world // gpus, gpus, cuda=False)
    layout = layout_of("it", {"zero_optimization": {"stage": 3, **scenario.get("zero", {})}}, cluster)
    run = RunConfig(
        perturbation=scenario["perturbation"], prompt_length=scenario["prompt_length"], ascent_steps=2,
        chunk_tokens=scenario["chunk_tokens"],
    )  # fmt: skip
    for report in reports:
        load = load_of(run, shape, 4, report["tokens"] * run.streams * world)
        memory = memory_of(shape, load, layout, cluster, way_of(scenario, shape.count))
        gathers = replace(load, gathers=load.gathers * scenario.get("parts", 1))
        assert report["gathered_bytes"] == gathered_bytes(shape, gathers, layout)
        assert report["peak_elements"] == held_elements(shape)
        assert report["whole"] == shape.elements
        assert report["kept"] * 4 == memory.shards
        assert (memory.gathered + memory.activations) == pytest.approx(report["peak_bytes"], rel=0.15)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    several = [scenario for scenario in SCENARIOS if scenario not in LONE]
    return run_scenarios(tmp_path_factory.mktemp("plan"), several + DRY_SCENARIOS, 170)


@pytest.mark.parametrize(
    ("scenarios", "seconds"),
    [
        pytest.param(LONE[:1], 170, id="one"),
        pytest.param(LONE, 170, id="alone", marks=pytest.mark.slow),
        pytest.param(LONG, 590, id="every kind of step on 1, 2 and 4 ranks", marks=pytest.mark.slow),
    ],
)
def test_bytes_exactly_and_memory_within_15_percent(tmp_path, scenarios, seconds):
    found = run_scenarios(tmp_path, scenarios, seconds)
    for scenario in scenarios:
        check(scenario, found[scenario["name"]])


@pytest.mark.slow
def test_bytes_exactly_and_memory_within_15_percent_on_several_ranks(reports):
    for scenario in SCENARIOS:
        if scenario not in LONE:
            check(scenario, reports[scenario["name"]])


@pytest.mark.slow
def test_hpz_on_two_hosts_of_two_ranks_gives_the_same_prompt(reports):
    """Weights come from the own host's copy alone; two steps change the prompt alike, to the bit."""
    for plain, hpz in zip(reports["keep4"], reports["hpz4"], strict=True):
        assert hpz["grad_norm"] == plain["grad_norm"] > 0
        assert hpz["prompt"] == plain["prompt"]
        assert hpz["kept"] > plain["kept"], "hpZ keeps a second copy"


@pytest.mark.slow
def test_int8_gathers_round_matrices_and_leave_norms_exact(reports):
    """DeepSpeed's own gathers with a quantiser of torch's: half a step of 127 at most, and not nothing."""
    for report in reports["int8"]:
        assert 0 < report["least"] <= report["matrices"] <= 0.5 / 127 * 1.001
        assert report["vectors"] == 0


def test_operations_are_the_benchmarks_floor(tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts" / "bench"), *sys.path])
    from bench_measure import floor_operations

    from ptp_ds.backbone.backbone import Backbone

    config = load_config(tiny_model)
    shape = shape_of(config)
    from transformers import AutoModelForCausalLM

    backbone = Backbone(AutoModelForCausalLM.from_config(config))
    for method, streams in (("none", 1), ("gaussian", 2), ("pgd", 2)):
        run = RunConfig(perturbation=method, ascent_steps=2, prompt_length=7)
        load = load_of(run, shape, 4, 90 * streams * 3)
        assert operations_of(shape, load, KEEP, 3) == floor_operations(backbone, method, 2, 7, 90)
    assert shape.elements == sum(parameter.numel() for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-8b", 8.03), ("llama-70b", 70.55), ("llama-405b", 405.85), ("smollm2-135m", 0.1345)]
)
def test_named_shapes_have_their_published_size(name, billions):
    assert shape_of(config_of(name)).elements / 1e9 == pytest.approx(billions, abs=0.01)


def test_bytes_between_hosts():
    cluster, gathered = cluster_of(), 64 * 10**9
    plain, hpz = Layout("a", 3), Layout("b", 3, hpz=8)
    assert between_hosts(gathered, plain, cluster) == 63 * 10**9  # a ring passes all but a rank's own part
    assert between_hosts(gathered, hpz, cluster) == 0
    assert between_hosts(gathered, plain, cluster_of(hosts=1)) == 0
    shape = shape_of(config_of("llama-8b"))
    load = load_of(RunConfig(perturbation="pgd"), shape, 2, 1 << 18)
    exact, rough = (gathered_bytes(shape, load, Layout("c", 3, int8=int8)) for int8 in (False, True))
    assert 0.5 < rough / exact < 0.55  # outside and norms stay as they are


def test_most_tokens_is_the_last_that_fits():
    shape, cluster = shape_of(config_of("llama-70b")), cluster_of()
    load, layout = load_of(RunConfig(), shape, 2, 1 << 18), Layout("zero3", 3)
    for way in (KEEP, Way(shape.count)):
        most = most_tokens(shape, load, layout, cluster, way)
        assert most % 64 == 0

        def total(tokens: int, way: Way = way) -> float:
            there = load_of(RunConfig(), shape, 2, tokens)
            return memory_of(shape, there, layout, cluster, way).total

        assert total(most) <= cluster.gpu_memory < total(most + 64)
    assert most_tokens(shape, load, Layout("zero2", 2), cluster, Way(shape.count)) == 0


def test_a_step_that_does_not_fit_takes_micro_batches_or_computes_some_layers_again():
    shape, cluster = shape_of(config_of("llama-8b")), cluster_of(hosts=1, gpus=1)
    load = load_of(RunConfig(), shape, 2, 1 << 15)
    resident, offloaded = Layout("zero3", 3), Layout("offload", 3, offload="cpu")
    kept, depth = (estimate(shape, load, resident, cluster, wanted) for wanted in ("keep", "auto"))
    assert not kept.fits
    assert depth.fits
    assert depth.way.parts > 1
    assert depth.operations < 1.01 * kept.operations
    breadth = estimate(shape, load, resident, cluster, "auto", "breadth")
    assert breadth.fits
    assert 0 < breadth.way.recomputed < shape.count
    assert kept.operations < breadth.operations < 1.5 * kept.operations
    assert (
        estimate(shape, load, offloaded, cluster).way
        == estimate(shape, load, offloaded, cluster, "auto", "breadth").way
    )
    forced = estimate(shape, load, offloaded, cluster, "auto", "depth")
    assert forced.way.parts > 1
    outside = elements(shape.outside_layers) * load.size
    assert forced.gathered_bytes - outside == forced.way.parts * (gathered_bytes(shape, load, offloaded) - outside)
    few = load_of(RunConfig(), shape, 2, 1 << 10)
    flags = ["--model", "llama-8b", "--hosts", "1", "--gpus", "8", "--gpu_memory", "14", "--local_interconnect", "900"]
    cluster_8, run, explicit, *_ = parse_plan([*flags, "--tokens_per_step", "131072"])
    said = plan_of(cluster_8, run, explicit)[0]
    quick, slow = (float(word) for word in re.search(r"take ([\d.]+) s instead of ([\d.]+)$", said, re.M).groups())
    assert quick < 0.95 * slow
    far = parse_plan([*flags[:-1], "5", "--tokens_per_step", "131072"])
    assert "--schedule depth" not in plan_of(far[0], far[1], far[2])[0], (
        "gathers would take longer than computing again"
    )
    assert estimate(shape, few, resident, cluster).way == KEEP


def test_recommended_is_the_fastest_exact_one_that_fits():
    shape, cluster = shape_of(config_of("llama-70b")), cluster_of()
    load = load_of(RunConfig(perturbation="pgd"), shape, 2, 1 << 18)
    layouts = [Layout("zero2", 2), Layout("zero3", 3), Layout("hpz", 3, hpz=8), Layout("int8", 3, int8=True)]
    found = [estimate(shape, load, layout, cluster) for layout in layouts]
    best = recommended(found)
    assert best is not None
    assert best.layout.name == "hpz"
    assert [one.fits for one in found] == [False, True, True, True]
    assert found[1].bound == "interconnect"
    assert best.bound == "compute"
    assert recommended([estimate(shape, load, layout, cluster_of(memory=1e9)) for layout in layouts]) is None


def test_the_script_plans_every_ready_config(capsys, tmp_path):
    file = tmp_path / "plan.json"
    argv = ["--model", "llama-70b", "--hosts", "8", "--gpus", "8", "--gpu_memory", "80", "--perturbation", "pgd"]
    assert main([*argv, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    ready = {path.stem for path in (ROOT / "ds_configs").glob("*.json")}
    assert {line.split()[0] for line in out.splitlines() if line.startswith("zero")} == ready
    assert "recommended: ds_configs/zero3_hpz.json" in out
    plans = {plan["layout"]["name"]: plan for plan in json.loads(file.read_text())["plans"]}
    most, shown = plans["zero3_hpz"]["most_tokens"], next(line for line in out.splitlines() if "zero3_hpz " in line)
    assert shown.split()[-2].startswith("recompute:")  # of some layers
    assert int(shown.split()[-1]) == most["recompute"]
    assert (
        f"largest --tokens_per_step that fits: {most['keep']} with --activations keep, {most['recompute']} with "
        "--activations recompute"
    ) in out
    assert '"recommended": "zero3_hpz"' in file.read_text()


def test_rows_of_a_task_are_counted_where_there_is_a_tokenizer(tiny_model):
    argv = ["--hosts", "1", "--gpus", "2", "--gpu_memory", "1", "--task", "COPA", "--batch_size", "6"]
    cluster, run, explicit, *_ = parse_plan([*argv, "--model", str(tiny_model), "--perturbation", "none"])
    _, load, source, _ = plans(cluster, run, explicit)
    assert source.startswith("--batch_size 6 rows of ")
    for hosts, batch in (("1", 8), ("6", 12)):  # the default, in equal parts for all ranks
        words = ["--hosts", hosts, *argv[2:-2], "--model", str(tiny_model)]
        assert plans(*parse_plan(words)[:3])[2].startswith(f"--batch_size {batch} rows of ")
    cluster, run, explicit, *_ = parse_plan([*argv, "--model", "llama-8b"])
    _, other, source, _ = plans(cluster, run, explicit)
    assert "llama-8b has no tokenizer here" in source
    assert load.tokens < other.tokens == 2 * 4096


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "8", "--gpu_memory", "80"], "The following arguments are required: --hosts"),
        (["--hosts", "0", "--gpus", "8", "--gpu_memory", "80"], "--hosts is 0; expected a number above 0"),
        (["--hosts", "1", "--gpus", "8", "--gpu_memory", "80", "--usable", "2"], "--usable is 2.0; expected a share"),
        (["--hosts", "1", "--gpus", "8", "--gpu_memory", "80", "--members", "0"], "--members is 0; expected a whole"),
        (
            ["--hosts", "1", "--gpus", "8", "--gpu_memory", "80", "--members", "2", "--seeds", "0-3"],
            "--members and --seeds or --population both say how many prompts train",
        ),
        (["--hosts", "1", "--gpus", "8", "--gpu_memory", "80", "--modle", "x"], "did you mean '--model'"),
        (
            ["--hosts", "1", "--gpus", "8", "--gpu_memory", "80", "--model", "no/such"],
            "--model no/such: neither a folder",
        ),
    ],
)
def test_user_errors_are_one_sentence(capsys, argv, message):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_population_shares_the_gathers(tmp_path):
    """N prompts take N times the tokens, prefixes and optimizer, and the gathers of one."""
    (tmp_path / "members.yaml").write_text("- {name: a, prompt_length: 10}\n- {name: b, prompt_length: 30}\n")
    argv = ["--hosts", "2", "--gpus", "8", "--gpu_memory", "80", "--model", "llama-8b", "--tokens_per_step", "8000"]

    def planned(*more):
        cluster, run, explicit, _, members = parse_plan([*argv, *more])
        _, load, _, found = plans(cluster, run, explicit, members)
        return load, [one.gathered_bytes for one in found]

    one, gathered = planned()
    for number, flags in ((8, ["--members", "8"]), (32, ["--seeds", "0-31"])):
        load, same = planned(*flags)
        assert (load.tokens, load.prefix, load.gathers) == (8000 * number, one.prefix * number, one.gathers)
        assert load.prompt_elements == one.prompt_elements * number
        assert same == gathered
    assert planned("--population", str(tmp_path / "members.yaml"))[0].prefix == 40


def test_a_perturbation_of_ones_own_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ptp_ds.perturb import Perturbation\nPERTURBATION = Perturbation(find=lambda *a: a[2], sizes=())\n"
    )
    with pytest.raises(ValueError, match="can't be planned for"):
        load_of(RunConfig(perturbation=str(file)), shape_of(config_of("llama-8b")), 2, 100)


def test_every_named_model_is_planned():
    assert set(NAMED) >= {"llama-8b", "llama-70b", "llama-405b"}
    for name in NAMED:
        argv = ["--hosts", "2", "--gpus", "4", "--gpu_memory", "80", "--model", name]
        cluster, run, explicit, *_ = parse_plan(argv)
        assert len(plans(cluster, run, explicit)[3]) == 6


def check_dry(world: int, ranks: list[int], reports: list[dict]) -> None:
    shape = shape_of(LlamaConfig(**SMALL, pad_token_id=None))
    load = load_of(RunConfig(perturbation="pgd", ascent_steps=2, prompt_length=5), shape, 4, 100)
    first = reports[0]
    rows = 2 * world
    assert len(first["dealt"]) == world, "rank 0 reports what each rank is dealt"
    assert {len(hand) for hand in first["dealt"]} == {2}
    assert sorted(place for hand in first["dealt"] for place in hand) == list(range(rows))
    aligned = {tuple(s): -(-elements([s]) // world) * world for s in shape.parameters}
    layer = sum(aligned[s] for s in shape.layers[0])
    outside = sum(aligned[s] for s in shape.outside_layers)
    for rank, report in zip(ranks, reports, strict=True):
        assert report["kept"] == shard_elements(shape.parameters, world)
        assert report["whole"] == shape.elements
        assert all(part == -(-whole // world) for whole, part in report["parts"])
        assert report["steps"][0]["rows"] == [first["batch"][place] for place in first["dealt"][rank]]
        assert report["calls"] == first["calls"], f"rank {rank} makes other collectives than rank {ranks[0]}"
        for number, step in enumerate(report["steps"]):
            assert step["bytes"] == gathered_bytes(shape, load, Layout("zero3", 3))
            gathers = [size for name, size, _ in step["calls"] if name == "_allgather_base_"]
            assert gathers.count(layer) == 2 * PASSES * shape.count
            assert gathers.count(outside) == 1
            prompt = reduced_bytes(load, world) // 4
            assert set(gathers) <= {layer, outside, prompt}
            assert gathers.count(prompt) == 1 or number == 0  # the first one also sets up DeepSpeed's optimizer
            reduced = [size * world * 4 for name, size, _ in step["calls"] if name == "_reduce_scatter_base_"]
            assert reduced == [reduced_bytes(load, world)]
        assert report["saved"] == (["state.json", "state.safetensors"] if rank == 0 else [])


@pytest.mark.slow
def test_the_real_trainer_on_8_and_64_ranks(reports):
    """On a fake process group: shards, dealt rows, the order of collectives on every rank, bytes as planned."""
    for world, ranks in DRY_RANKS.items():
        check_dry(world, ranks, reports[f"dry{world}"])


@pytest.mark.slow
def test_every_one_of_eight_ranks_and_some_of_a_thousand(tmp_path):
    chosen = {8: list(range(8)), 64: [0, 1, 31, 32, 62, 63], 512: [0, 1, 255, 511], 1024: [0, 1, 512, 1023]}
    reports = run_scenarios(tmp_path, [dry_run(world, ranks) for world, ranks in chosen.items()], 500)
    for world, ranks in chosen.items():
        check_dry(world, ranks, reports[f"dry{world}"])
    rows = [row for report in reports["dry8"] for row in report["steps"][0]["rows"]]
    assert sorted(rows) == sorted(reports["dry8"][0]["batch"])
