"""Micro-batches one after the other: the gradient of one packed row, for every perturbation; who gets which rows."""

import json
from dataclasses import replace

import pytest
import torch

from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack, pack_text_twins
from ptp_ds.perturb import Noise
from ptp_ds.perturb.ascent import start_delta
from ptp_ds.prompts.deep import deep_width
from ptp_ds.training.drawn import Drawn
from ptp_ds.training.meter import Meter
from ptp_ds.training.micro_batches import dealt, summed
from ptp_ds.training.step import carried_delta, loss_of_all, ptp_loss, settings_of
from tests.support.reference import make_examples, make_model, plain_scores, relative_error
from tests.support.runs import QUICK, check, last_prompt

EXAMPLES = [
    replace(example, index=number)
    for number, example in enumerate(make_examples("single") + make_examples("single")[1:3])
]


def packed(examples, run, noise):
    if run.active_perturbation is None or not run.active_perturbation.in_text:
        return pack(examples)
    twins = run.active_perturbation.twins(examples, settings_of(run, 1.0, mask_id=3), noise)
    movable = [twin.movable for twin in twins] if run.active_perturbation.find is not None else None
    return pack_text_twins(examples, [twin.context_ids for twin in twins], movable)


def found_in(backbone, prompt, parts, run):
    """(the losses over all parts, the prompt's gradient, the deltas that are carried on) of these micro-batches."""
    noise, trained = Noise(0, 4), prompt.clone().requires_grad_()
    rows = [packed([EXAMPLES[place] for place in places], run, noise) for places in parts]

    def loss_of(leaf, row):
        loss = ptp_loss(leaf, backbone, row, run, settings_of(run, 1.0, mask_id=3), noise)
        return loss.total, loss

    total, losses = summed(trained, rows, loss_of, scale=8.0 if len(rows) > 1 else 1.0)
    total.backward()
    lengths = tuple(len(example.context_ids) for example in EXAMPLES)
    deltas = [carried_delta(loss, row, run, settings_of(run, 1.0), torch.float32)
              for loss, row in zip(losses, rows, strict=True)]  # fmt: skip
    drawn = Drawn(tuple(rows), tuple(parts), lengths, {}, noise, len(EXAMPLES), (None,) * len(rows))
    return loss_of_all(losses), trained.grad, drawn.joined(deltas)


@pytest.mark.parametrize("kind", ["soft", "deep"])
@pytest.mark.parametrize("perturbation", ["none", "gaussian", "uniform", "mask", "mask+gaussian", "pgd", "free"])
def test_gradient_losses_and_carried_deltas_are_those_of_one_row(perturbation, kind):
    backbone = Backbone(make_model("llama"), prompt=kind)
    width = 32 if kind == "soft" else deep_width(backbone.model.config)
    prompt = 0.5 * torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    run = RunConfig(perturbation=perturbation, epsilon=0.5, sigma=0.5, divergence_gradient="both", min_confidence=0.3)
    everything = [tuple(range(len(EXAMPLES)))]
    whole, exact, carried = found_in(backbone, prompt, everything, run)
    for parts in (dealt([len(e.context_ids) for e in EXAMPLES], 3), [(5, 1), (4, 3, 2), (0, 6)]):
        loss, gradient, moved = found_in(backbone, prompt, parts, run)
        assert relative_error(gradient, exact) < 1e-5
        for name in ("total", "cross_entropy", "divergence", "delta_norm"):
            torch.testing.assert_close(getattr(loss, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
        if perturbation != "none":
            assert loss.counted == whole.counted
        assert (moved is None) == (carried is None) == (perturbation != "free")
        if moved is not None:
            torch.testing.assert_close(moved, carried, rtol=1e-4, atol=1e-6)


def test_free_moves_the_deltas_of_rows_that_count():
    """The others stay where they are: their divergence has no gradient."""
    model, everything = make_model("llama"), [tuple(range(len(EXAMPLES)))]
    prompt = 0.5 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    sure = [float(plain_scores(model, prompt, example).softmax(-1).max()) for example in EXAMPLES]
    run = RunConfig(perturbation="free", epsilon=0.5)
    some = replace(run, min_confidence=sum(sorted(sure)[2:4]) / 2)  # three rows are left out
    row, lengths = pack(EXAMPLES), [len(example.context_ids) for example in EXAMPLES]
    starts = start_delta(row, 32, settings_of(run, 1.0), Noise(0, 4)).split(lengths)
    everyone, counting = (
        found_in(Backbone(make_model("llama")), prompt, everything, one)[2].split(lengths) for one in (run, some)
    )
    for example, confidence, start, free, found in zip(EXAMPLES, sure, starts, everyone, counting, strict=True):
        torch.testing.assert_close(found, free if confidence >= some.min_confidence else start)
        assert torch.equal(free, start) == (not any(example.movable))


def test_one_part_is_the_loss_itself():
    trained = torch.tensor([2.0, 3.0], requires_grad=True)
    total, found = summed(trained, ["only"], lambda leaf, part: ((leaf**2).sum(), (part, leaf is trained)))
    assert (float(total.detach()), found) == (13.0, [("only", True)])


def test_a_gradient_that_is_not_finite_stays_so():
    trained = torch.ones(2, requires_grad=True)
    total, _ = summed(trained, [1.0, float("inf")], lambda leaf, part: (part * leaf[0] + leaf[1], None))
    total.backward()
    assert not trained.grad[0].isfinite()
    assert trained.grad[1] == 2


def test_half_precision_gradients_are_summed_in_fp32():
    """257 gradients of 1 and one of 256: bf16 would stop at 256."""
    trained = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    seen = []
    trained.register_hook(lambda gradient: seen.append(gradient.dtype))
    total, _ = summed(trained, range(512), lambda leaf, part: (leaf.sum(), None))
    total.backward()
    assert float(trained.grad) == 512


def test_dealt_micro_batches_hold_every_example_once_and_none_is_empty():
    for lengths in ([5], [5, 9, 1], [3] * 8, [100, 1, 1, 1, 50]):
        for parts in (1, 2, 3, 50):
            found = dealt(lengths, parts)
            assert sorted(place for places in found for place in places) == list(range(len(lengths)))
            assert all(found)
            assert len(found) == min(parts, len(lengths))
    assert dealt([4, 4, 4], 1) == ((0, 1, 2),)


@pytest.mark.parametrize(
    ("wanted", "resident", "mode", "tokens", "parts"),
    [
        ("auto", True, "auto", 1000, 1), ("auto", True, "auto", 1015, 2), ("auto", True, "auto", 5000, 5),
        ("auto", False, "auto", 5000, 1), ("breadth", True, "auto", 5000, 1), ("depth", False, "auto", 5000, 5),
        ("depth", True, "auto", 10, 2), ("depth", True, "keep", 5000, 2), ("auto", True, "keep", 5000, 1),
        ("auto", True, "recompute", 5000, 1), ("depth", True, "recompute", 5000, 2),
    ],
)  # fmt: skip
def test_micro_batches_by_what_fits(wanted, resident, mode, tokens, parts):
    """1,500 tokens fit, so 1,024 are taken, 10 of them the prefix; the user asks for two sections."""
    given = Activations(mode, bytes_per_token=2.0, budget_bytes=3000.0).scheduled(wanted, resident, 1500)
    assert given.parts(tokens, 10, sections=2) == parts


def test_what_fits_is_known_or_nothing():
    """The generic path has no budget: it keeps everything, whatever a token costs."""
    assert Activations("auto", bytes_per_token=2.0, budget_bytes=3001.0).fit == 1500
    for unknown in (Activations("auto", budget_bytes=3000.0), Activations(bytes_per_token=2.0)):
        assert unknown.fit == 0
        given = unknown.scheduled("auto", True, unknown.fit)
        assert (given.most_tokens, given.parts(10**9, 5, sections=1)) == (None, 1)
        assert given.describe() == given.mode


def test_a_resumed_run_takes_the_same_micro_batches():
    given = Activations("auto", bytes_per_token=2.0, budget_bytes=3000.0)
    assert given.scheduled("auto", True, 1500, before=512).most_tokens == 512
    assert given.scheduled("auto", True, 1500, before=4096).most_tokens == 1024  # they don't fit here
    assert (
        given.scheduled("auto", True, 1500)
        .describe()
        .endswith("else micro-batches of up to 1024, one after the other (depth first)")
    )


def test_a_meter_counts_examples(monkeypatch):
    from ptp_ds.ranks.distributed import Ranks

    meter = Meter(Ranks(0, 1, torch.device("cpu"), None))
    backbone, run = Backbone(make_model("llama")), RunConfig(perturbation="none")
    parts = dealt([1] * len(EXAMPLES), 3)
    loss, _, _ = found_in(backbone, torch.ones(5, 32), parts, run)
    meter.add(loss, len(EXAMPLES), 0, {}, False)
    assert meter.reduce().values["loss"] == pytest.approx(float(loss.total) / len(EXAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_depth_first_is_the_run_breadth_first(run_train, tiny_model, tmp_path, ranks):
    """Also where deltas are carried from step to step, and to the bit where it is resumed."""
    args = [*QUICK, "--model", tiny_model, "--perturbation", "free", "--max_steps", "5", "--batch_size", "8",
            "--gradient_accumulation_steps", "2", "--save_every", "1", "--eval_every", "0", "--lr", "0.01",
            "--keep_checkpoints", "9"]  # fmt: skip
    ways = {way: ["--schedule", way, "--output_dir", tmp_path / way] for way in ("breadth", "depth")}
    for way in ways.values():
        check(run_train([*args, *way], nproc=ranks))
    expected = last_prompt(tmp_path / "breadth")
    assert float((last_prompt(tmp_path / "depth") - expected).norm() / expected.norm()) < 1e-5
    again = ["--output_dir", tmp_path / "again", "--resume", tmp_path / "depth" / "checkpoints" / "step-000003"]
    check(run_train([*args, "--schedule", "depth", *again], nproc=ranks))
    assert torch.equal(last_prompt(tmp_path / "again"), last_prompt(tmp_path / "depth"))
    meta = json.loads((tmp_path / "depth" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert meta["micro_tokens"] & (meta["micro_tokens"] - 1) == 0
