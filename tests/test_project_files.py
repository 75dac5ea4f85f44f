"""Files beside the package: they parse, name what there is, and agree with setup.py and with each other."""

import re
import shlex
import subprocess

import pytest
import yaml

import ptp_ds
from ptp_ds.config.flags import build_parser, parse_run
from tests.support.paths import ROOT

ALLOWED = {  # fixed by the project's owner, and what belongs beside it
    "ptp_ds", "ds_configs", "hostfiles", "scripts", "tests", "docs", "setup.py", "pyproject.toml", "README.md",
    "LICENSE",
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Dockerfile", ".ci", ".gitignore", ".dockerignore",
}  # fmt: skip


def test_the_top_level_holds_what_it_may():
    if not (ROOT / ".git").exists():
        pytest.skip("no git here that says which files are the project's")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert {name.split("/")[0] for name in listed.splitlines()} <= ALLOWED


def test_the_citation_has_what_cff_asks_for():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cff.keys()
    assert cff["version"] == ptp_ds.__version__
    preferred = cff["preferred-citation"]
    assert {"type", "title", "authors"} <= preferred.keys()
    assert [one["family-names"] for one in preferred["authors"]] == ["Chen", "Huang", "Cheng"]


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == ptp_ds.__version__


def known_flags(words):
    known = {word for action in build_parser("")._actions for word in action.option_strings}
    script = next(number for number, word in enumerate(words) if word.endswith("scripts/train.py"))
    return [word for word in words[script + 1 :] if word.startswith("--") and word not in known]


def test_the_cluster_examples_start_runs_that_are_valid():
    sky = yaml.safe_load((ROOT / "scripts" / "skypilot.yaml").read_text())
    words = shlex.split(sky["run"].replace("\\\n", " "))
    assert known_flags(words) == []
    job = yaml.safe_load((ROOT / "scripts" / "trainjob.yaml").read_text())
    assert job["kind"] == "TrainJob"
    args = job["spec"]["trainer"]["args"]
    assert known_flags(args) == []
    ours = words[words.index("scripts/train.py") + 1 :]
    run, theirs = parse_run(ours)[0], parse_run(args[1:])[0]
    assert (run.task, run.model, run.resume) == (theirs.task, theirs.model, theirs.resume)


def test_the_dockerfile_copies_what_there_is_and_pins_what_setup_py_allows():
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?:--\S+ )?(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    setup = (ROOT / "setup.py").read_text()
    for file in (text, (ROOT / "scripts" / "skypilot.yaml").read_text()):
        pinned = re.search(r"torch==([\d.]+)", file)
        assert pinned is not None
        assert f'"torch>={pinned[1]},' in setup
    extras = re.search(r"\[([a-z,]+)\]\"", text)
    assert extras is not None
    assert all(f'"{name}": [' in setup for name in extras[1].split(","))
