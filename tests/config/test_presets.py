"""Presets of published methods: what they set, what overrides them, their sizes on real deltas; units."""

import json

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.checks import without_effect
from ptp_ds.config.flags import parse_run
from ptp_ds.config.presets import PRESETS, describe_preset, preset_effect
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import PackedRow, pack
from ptp_ds.perturb import Noise, SharedPass
from ptp_ds.perturb.ascent import start_delta
from ptp_ds.perturb.ball import example_norm
from ptp_ds.perturb.units import UNITS, unit_of, vanishes
from ptp_ds.tasks.example import Example
from ptp_ds.training.step import settings_of
from tests.support.reference import make_examples, make_model
from tests.support.runs import QUICK, check


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_flags_and_no_others(preset):
    run, explicit = parse_run(["--preset", preset])
    wanted = {**vars(RunConfig()), "preset": preset, **PRESETS[preset]}
    assert {name: getattr(run, name) for name in wanted} == wanted
    assert explicit == {"preset"}
    assert without_effect(run, set(PRESETS[preset])) == []
    assert run.perturbs
    assert preset_effect(preset, vars(run)) == {"set": PRESETS[preset], "overridden": {}}


def test_what_is_given_wins(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"preset": "vat", "epsilon": 2.0}))
    run, explicit = parse_run(["--config", str(file), "--perturbation", "mask"])
    assert (run.perturbation, run.epsilon, run.alpha, run.units) == ("mask", 2.0, 10.0, "l2")
    assert explicit == {"preset", "epsilon", "perturbation"}
    assert preset_effect("vat", vars(run))["overridden"] == {"perturbation": "mask", "epsilon": 2.0}
    assert describe_preset("vat", vars(run)) == (
        "preset vat: divergence kl, divergence_gradient clean_fixed, reg_weight 1.0, units l2, norm frobenius, "
        "alpha 10.0, ascent_steps 1; "
        "given instead: perturbation mask, epsilon 2.0"
    )


def test_without_a_preset_nothing_is_said():
    assert preset_effect(None, vars(RunConfig())) == {}
    assert describe_preset(None, vars(RunConfig())) == ""


def test_unknown_presets():
    with pytest.raises(ValueError, match=r"Argument --preset: invalid choice: 'alum' \(choose from .*smart"):
        parse_run(["--preset", "alum"])


def delta_of(preset: str, width: int, backbone: Backbone | None = None) -> tuple[torch.Tensor, PackedRow]:
    """A preset's delta and its row: a long one, or short ones with a backbone."""
    run, _ = parse_run(["--preset", preset])
    settings = settings_of(run, unit_of(run.units, 5.0, width))
    moves = [place % 3 > 0 for place in range(300)]
    example = Example(context_ids=[1] * 300, movable=moves, candidate_ids=[[1], [2]], gold=0, index=0)
    row = pack([example]) if backbone is None else pack(make_examples("single"))
    clean, shared = torch.zeros(row.num_tokens, width), None
    if backbone is not None:
        prompt = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
        clean = backbone.embed(row.token_ids)
        shared = SharedPass(backbone, prompt, row, clean)
    return run.active_perturbation.find(shared, row, clean, settings, Noise(0, 0)), row


def test_r3f_is_uniform_noise_of_1e_5_on_every_coordinate():
    for width in (16, 64):
        delta, row = delta_of("r3f", width)
        moved = delta[row.movable]
        assert float(moved.abs().max()) <= 1e-5 * (1 + 1e-6)
        assert float(moved.abs().mean()) == pytest.approx(0.5e-5, rel=0.03)
        assert float(delta[~row.movable].abs().max()) == 0.0


def test_the_ascents_end_on_their_balls():
    backbone = Backbone(make_model("llama"))
    delta, row = delta_of("smart", 32, backbone)
    assert float(delta.abs().max()) == pytest.approx(1e-5, rel=1e-5)
    for preset, radius in (("vat", 1.0), ("freelb", 0.3)):
        delta, row = delta_of(preset, 32, backbone)
        assert float(example_norm(delta, row).max()) <= radius
        assert float(example_norm(delta, row).max()) > 0.6 * radius
        assert float(delta[~row.movable].abs().max()) == 0.0


def test_vats_long_step_leaves_the_gradients_direction():
    """Against one power iteration: epsilon times the normalised gradient at the random start."""
    backbone, row = Backbone(make_model("llama")), pack(make_examples("single"))
    run, _ = parse_run(["--preset", "vat"])
    settings, clean = settings_of(run, 1.0), backbone.embed(row.token_ids)
    prompt = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    delta = run.active_perturbation.find(SharedPass(backbone, prompt, row, clean), row, clean, settings, Noise(0, 0))
    gradient = SharedPass(backbone, prompt, row, clean).gradient(start_delta(row, 32, settings, Noise(0, 0)), "kl")
    gradient = torch.where(row.movable[:, None], gradient, 0.0)
    moved = example_norm(delta, row) > 0
    cosine = [
        torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        for ours, theirs in zip(delta.split(row.lengths), gradient.split(row.lengths), strict=True)
    ]
    assert int(moved.sum()) > 1
    assert float(torch.stack(cosine)[moved].min()) > 0.99


def test_units():
    assert {name: unit_of(name, 5.0, 64) for name in UNITS} == {"relative": 5.0, "l2": 1.0, "coordinate": 8.0}
    assert vanishes(1e-5 * 8, 5.0, torch.bfloat16)
    assert not vanishes(1e-5 * 8, 5.0, torch.float32)
    assert not vanishes(0.3 * 5.0, 5.0, torch.bfloat16)
    assert not vanishes(0.0, 5.0, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_vanishes_is_what_rounding_takes(dtype):
    """By adding it: of normal coordinates less than half of the delta arrives below the bound, more above it."""
    embedding = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    drawn, norm = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)), float(embedding.norm(dim=-1).mean())
    for share, lost in ((0.1, True), (0.2, False)):
        delta = drawn * (share * torch.finfo(dtype).eps * norm / drawn.norm(dim=-1, keepdim=True))
        arrived = (embedding + delta).to(dtype).float() - embedding
        assert (float((arrived * delta).sum() / delta.square().sum()) < 0.5) is lost
        assert vanishes(share * torch.finfo(dtype).eps * norm, norm, dtype) is lost


@pytest.mark.slow
def test_a_run_says_what_the_preset_set(run_train, tiny_model, tmp_path):
    out = tmp_path / "run"
    args = [*QUICK, "--model", tiny_model, "--preset", "smart", "--reg_weight", "3", "--max_steps", "1"]
    done = check(run_train([*args, "--precision", "bf16", "--output_dir", out]))
    assert "preset smart: perturbation pgd, divergence sym_kl, divergence_gradient both, units coord" in done.stdout
    assert "given instead: reg_weight 3.0" in done.stdout
    assert "on a token are mostly lost beside embeddings of norm" in done.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["preset"]["overridden"] == {"reg_weight": 3.0}
    assert (config["run"]["preset"], config["run"]["epsilon"]) == ("smart", 1e-5)
    done = check(run_train([*args, "--output_dir", tmp_path / "fp32"]))
    assert "mostly lost" not in done.stdout
