"""ValueErrors of ours are UserErrors, but for misuse of a function that no command line can lead to."""

import re

from ptp_ds.errors import UserError
from ptp_ds.hosts.remote import HostError
from ptp_ds.ranks.faults import OutputError
from ptp_ds.tasks.readers import NoLabelError
from ptp_ds.training.checkpoint import OtherFormatError
from ptp_ds.training.trainer import NonFiniteLossError
from tests.support.paths import ROOT

MISUSE = {"backbone/backbone.py", "kernels/dual_divergence.py", "kernels/noise.py", "kernels/perturb_step.py",
          "packing/forest.py", "prompts/flat.py", "studies/statistics.py", "training/step.py"}  # fmt: skip


def test_who_raises_a_plain_value_error():
    """A new one belongs here only where a user of the commands can't cause it; else raise UserError."""
    package = ROOT / "ptp_ds"
    raised = re.compile(r"raise ValueError|else ValueError\b|\(ValueError\):\n    \"\"\"")
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if raised.search(file.read_text())}
    assert found - {"errors.py"} == MISUSE


def test_our_own_errors_are_the_users():
    for error in (NonFiniteLossError, OutputError, HostError, OtherFormatError, NoLabelError):
        assert issubclass(error, UserError)
    assert issubclass(UserError, ValueError)
