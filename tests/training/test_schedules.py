"""Learning rate and lambda, step by step."""

import math

import pytest

from ptp_ds.config.run_config import RunConfig
from ptp_ds.training.schedules import learning_rate, reg_weight_at


def rates(**settings) -> list[float]:
    run = RunConfig(**{"lr": 0.8, "warmup_steps": 4, "max_steps": 12, **settings})
    return [learning_rate(run, step) for step in range(run.max_steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_is_linear_and_ends_at_the_rate(schedule):
    assert rates(lr_schedule=schedule)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_linear_decay_reaches_zero_behind_the_last_step():
    assert rates()[4:] == pytest.approx([0.1 * left for left in range(8, 0, -1)])


def test_the_schedule_may_end_before_or_behind_the_run():
    assert rates(schedule_steps=20)[4:] == pytest.approx([0.05 * left for left in range(16, 8, -1)])
    assert rates(schedule_steps=8)[4:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0, 0.0])


def test_cosine_decay():
    expected = [0.4 * (1 + math.cos(math.pi * done / 8)) for done in range(8)]
    assert rates(lr_schedule="cosine")[4:] == pytest.approx(expected)


def test_constant():
    assert rates(lr_schedule="constant")[3:] == [0.8] * 9


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (3, 3), (50, 10), (1, 2)])
def test_rates_are_positive_and_never_exceed_lr(schedule, warmup, steps):
    found = rates(lr_schedule=schedule, warmup_steps=warmup, max_steps=steps)
    assert all(0 < rate <= 0.8 * (1 + 1e-12) for rate in found)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert rates(warmup_steps=0)[0] == 0.8


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [
        ({}, 30), ({"max_steps": 1000}, 30), ({"max_steps": 40}, 8), ({"max_steps": 4}, 0),
        ({"schedule_steps": 60}, 12), ({"lr_schedule": "constant", "max_steps": 40}, 30),
        ({"lr_schedule": "cosine", "max_steps": 40}, 8),
    ],
)  # fmt: skip
def test_the_warm_up_is_30_steps_and_a_fifth_of_a_falling_schedule_at_most(settings, warmup):
    run = RunConfig(lr=0.8, **settings)
    given = RunConfig(lr=0.8, warmup_steps=warmup, **settings)
    found = [learning_rate(run, step) for step in range(run.max_steps)]
    assert found == [learning_rate(given, step) for step in range(run.max_steps)]
    assert found[max(0, warmup - 1)] == pytest.approx(0.8)


def test_lambda_is_constant_without_warm_up():
    run = RunConfig(reg_weight=2.5)
    assert [reg_weight_at(run, step) for step in (0, 1, 59)] == [2.5] * 3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_lambda_falls_as_the_learning_rate_does(schedule):
    """The same curve to the same end; behind a warm-up of its own it begins at the whole weight."""
    run = RunConfig(reg_weight=0.8, reg_schedule=schedule, max_steps=12, schedule_steps=10)
    same = {"lr_schedule": schedule, "warmup_steps": 0, "max_steps": 12, "schedule_steps": 10}
    assert [reg_weight_at(run, step) for step in range(12)] == pytest.approx(rates(**same))
    warmed = RunConfig(reg_weight=2.0, reg_warmup_steps=3, reg_schedule="linear", max_steps=7)
    assert [reg_weight_at(warmed, step) for step in range(7)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5])


def test_lambda_rises_from_above_zero_to_its_weight():
    run = RunConfig(reg_weight=2.0, reg_warmup_steps=3)
    assert [reg_weight_at(run, step) for step in range(6)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
