"""The real trainer on 8 to 1024 ranks of a fake process group: shards, dealt rows, collectives and bytes."""

import pytest
import torch
from plan_ranks import SMALL, run_scenarios
from transformers import LlamaConfig

from ptp_ds.config import RunConfig
from ptp_ds.plan import Layout, gathered_bytes, load_of, reduced_bytes, shard_elements
from ptp_ds.shapes import elements, shape_of

BASE = {"model": SMALL, "prompt_length": 5, "rows": 2, "tokens": 12, "activations": "keep", "perturbation": "pgd",
        "dry": True}  # fmt: skip
PASSES = 3  # pgd's two ascents and the last pass


def scenario(world: int, ranks: list[int]) -> dict:
    return {**BASE, "name": f"dry{world}", "world": world, "ranks": ranks}


def check(world: int, ranks: list[int], reports: list[dict]) -> None:
    shape = shape_of(LlamaConfig(**SMALL, pad_token_id=None))
    load = load_of(RunConfig(perturbation="pgd", ascent_steps=2, prompt_length=5), shape, 4, 100)
    first = reports[0]
    rows = 2 * world
    assert len(first["dealt"]) == world, "rank 0 reports what each rank is dealt"
    assert {len(hand) for hand in first["dealt"]} == {2}
    assert sorted(place for hand in first["dealt"] for place in hand) == list(range(rows))
    aligned = {tuple(s): -(-elements([s]) // world) * world for s in shape.parameters}
    layer = sum(aligned[s] for s in shape.layers[0])
    edges = sum(aligned[s] for s in shape.edges)
    for rank, report in zip(ranks, reports, strict=True):
        assert report["kept"] == shard_elements(shape.parameters, world)
        assert report["whole"] == shape.elements
        assert all(part == -(-whole // world) for whole, part in report["parts"])
        assert report["steps"][0]["rows"] == [first["batch"][place] for place in first["dealt"][rank]]
        assert report["calls"] == first["calls"], f"rank {rank} makes other collectives than rank {ranks[0]}"
        for step in report["steps"]:
            assert step["bytes"] == gathered_bytes(shape, load, Layout("zero3", 3))
            gathers = [size for name, size, _ in step["calls"] if name == "_allgather_base_"]
            assert gathers.count(layer) == 2 * PASSES * shape.count
            assert gathers.count(edges) == 1
            prompt = reduced_bytes(load, world) // 4
            assert set(gathers) <= {layer, edges, prompt}
            assert gathers.count(prompt) <= 2  # for the forward, and behind the update
            reduced = [size * world * 4 for name, size, _ in step["calls"] if name == "_reduce_scatter_base_"]
            assert reduced == [reduced_bytes(load, world)]
        assert report["saved"] == (["state.json", "state.safetensors"] if rank == 0 else [])


def test_eight_and_sixty_four_ranks(tmp_path):
    chosen = {8: [0, 5], 64: [0, 63]}
    reports = run_scenarios(tmp_path, [scenario(world, ranks) for world, ranks in chosen.items()], 150)
    for world, ranks in chosen.items():
        check(world, ranks, reports[f"dry{world}"])


@pytest.mark.slow
def test_every_one_of_eight_ranks_and_some_of_a_thousand(tmp_path):
    chosen = {8: list(range(8)), 64: [0, 1, 31, 32, 62, 63], 512: [0, 1, 255, 511], 1024: [0, 1, 512, 1023]}
    reports = run_scenarios(tmp_path, [scenario(world, ranks) for world, ranks in chosen.items()], 500)
    for world, ranks in chosen.items():
        check(world, ranks, reports[f"dry{world}"])
    rows = [row for report in reports["dry8"] for row in report["steps"][0]["rows"]]
    assert sorted(rows) == sorted(reports["dry8"][0]["batch"])
    assert len(set(rows)) == torch.tensor(rows).numel()
