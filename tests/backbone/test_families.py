"""The table of families says what the tests prove, and the docs' tables say what the code knows."""

import re

import pytest

from ptp_ds.backbone.families import FAMILIES, describe_families
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

DOCS = "\n".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("tasks.md", "perturbations.md", "prompts_and_heads.md")
)


def listed(path, head):
    return {family.name for family in FAMILIES if family.path == path and head in family.heads}


def test_every_listed_family_is_tested_and_every_tested_one_listed():
    """By tests/backbone/test_every_family.py, all of them; those here in every other test of the backbone, too."""
    assert listed("packed", "causal") >= set(CAUSAL)
    assert listed("generic", "causal") >= set(REFUSED)
    assert listed("generic", "seq2seq") >= set(SEQ2SEQ)
    for head in KINDS:
        assert listed("packed", head) >= set(ENCODERS)
        assert listed("generic", head) >= set(GENERIC)
    known = [(family.name, head) for family in FAMILIES for head in family.heads]
    assert len(known) == len(set(known))
    assert {family.name for family in FAMILIES if "deep" in family.prompts and family.heads == tuple(KINDS)} == set(
        ENCODERS
    )
    assert set(CAUSAL) >= WINDOWED  # their deep prompts: tests/prompts/test_deep.py, where a soft one's keys start one


def test_list_families_prints_the_table(capsys):
    assert main(["--list_families"]) == 0
    assert capsys.readouterr().out.strip() == describe_families()


def test_the_docs_name_families_as_they_are_listed():
    table = DOCS.split("| path | `--head` | families |\n|---|---|---|\n")[1].split("\n\n")[0]
    named = 0
    for row in table.split("\n"):
        path, heads, names = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            assert all(name in listed(path, head) for head in heads.split(", ")), (name, path, heads)
            named += 1
    assert named > 40


def first_cells(heading):
    """Code words in the first column of the docs' table whose heading begins with `heading`."""
    table = DOCS.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0]
    return {word for row in table.split("\n")[2:] for word in re.findall(r"`([^`]+)`", row.split("|")[1])}


@pytest.mark.parametrize(
    ("heading", "known"),
    [("`--task`", set(builtin_tasks())), ("`--perturbation`", {"none", *PERTURBATIONS}), ("`--prompt`", set(PROMPTS))],
)
def test_the_docs_tables_name_what_there_is(heading, known):
    assert first_cells(heading) == known
