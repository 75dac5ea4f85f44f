"""The table of families says what the tests prove, and the README's tables say what the code knows."""

import re

import pytest

from ptp_ds.backbone.families import FAMILIES, describe_families, families_table
from ptp_ds.commands.train import main
from ptp_ds.perturb import PERTURBATIONS
from ptp_ds.prompts import PROMPTS
from ptp_ds.tasks import builtin_tasks
from tests.support.deep_prompts import WINDOWED
from tests.support.encoders import ENCODERS, GENERIC, KINDS
from tests.support.paths import ROOT
from tests.support.reference import FAMILIES as CAUSAL
from tests.support.reference import REFUSED
from tests.support.seq2seq import SEQ2SEQ

README = (ROOT / "README.md").read_text(encoding="utf-8")


def listed(path, heads):
    return {family.name for family in FAMILIES if family.path == path and family.heads == heads}


def test_every_listed_family_is_tested_and_every_tested_one_listed():
    assert listed("packed", ("causal",)) == set(CAUSAL)
    assert listed("packed", tuple(KINDS)) == set(ENCODERS)
    assert listed("generic", tuple(KINDS)) == set(GENERIC)
    assert listed("generic", ("causal",)) == set(REFUSED)
    assert listed("generic", ("seq2seq",)) == set(SEQ2SEQ)
    assert len(FAMILIES) == len(CAUSAL) + len(ENCODERS) + len(GENERIC) + len(REFUSED) + len(SEQ2SEQ)
    assert set(CAUSAL) >= WINDOWED  # their deep prompts: tests/prompts/test_deep.py, where a soft one's keys start one


def test_list_families_prints_the_table(capsys):
    assert main(["--list_families"]) == 0
    assert capsys.readouterr().out.strip() == describe_families()


def test_readme_holds_the_families_table():
    assert "\n".join(families_table()) in README


def first_cells(heading):
    """Code words in the first column of the README's table whose heading begins with `heading`."""
    table = README.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0]
    return {word for row in table.split("\n")[2:] for word in re.findall(r"`([^`]+)`", row.split("|")[1])}


@pytest.mark.parametrize(
    ("heading", "known"),
    [("`--task`", set(builtin_tasks())), ("`--perturbation`", {"none", *PERTURBATIONS}), ("`--prompt`", set(PROMPTS))],
)
def test_readme_tables_name_what_there_is(heading, known):
    assert first_cells(heading) == known
