"""The names that flags offer without torch are those of the registries that stand behind them."""

import dataclasses

from ptp_ds import choices
from ptp_ds.config.run_config import GROUPS, RunConfig
from ptp_ds.kernels.perturb_step import example_norm, perturb_step
from ptp_ds.models.heads import _AUTO
from ptp_ds.objective import DIVERGENCES
from ptp_ds.perturb import PERTURBATIONS
from ptp_ds.perturb.units import UNITS
from ptp_ds.precision import _DTYPES


def test_registries_have_the_names_that_are_offered():
    assert tuple(DIVERGENCES) == choices.DIVERGENCES
    assert tuple(UNITS) == choices.UNITS
    assert ("none", *PERTURBATIONS) == choices.PERTURBATIONS
    assert tuple(_AUTO) == choices.HEADS
    assert ("auto", *_DTYPES) == choices.PRECISIONS
    assert example_norm is not None
    assert perturb_step.__module__ == "ptp_ds.kernels.perturb_step"  # which checks its norms against choices.NORMS


def test_every_setting_stands_in_one_of_the_helps_groups():
    found = {field.metadata["group"] for field in dataclasses.fields(RunConfig)}
    assert found == set(GROUPS)
