"""DeepSpeed's pdsh command line as it reaches the hosts' shells, by a stand-in that changes it as pdsh does."""

import json
import shlex
import signal
import sys
from pathlib import Path

import pytest

from ptp_ds.launch.launcher import Launcher
from ptp_ds.launch.pdsh import quoted
from ptp_ds.ranks.faults import STOP_SIGNALS

# pdsh joins its words by spaces and puts host, number and user in the place of %h, %n and %u; ssh hands that to a shell
PDSH = """#!{python}
import re, subprocess, sys
hosts, command = sys.argv[5].split(","), " ".join(sys.argv[6:])
for number, host in enumerate(hosts):
    known = {{"h": host, "n": str(number), "u": "someone", "%": "%"}}
    text = re.sub("%([hnu%])", lambda found: known[found[1]], command)
    done = subprocess.run(["bash", "-c", text])
    if done.returncode:
        sys.exit(done.returncode)
"""
# in the place of python on each host
PYTHON = """#!{python}
import json, os, sys
node = next(word for word in sys.argv if word.startswith("--node_rank="))
with open({out!r} + "/" + node, "w") as file:
    json.dump({{"words": sys.argv[1:], "here": os.getcwd(), "sent": os.environ.get("MINE")}}, file)
"""
WORDS = ["plain", "two words", "costs $5", "`id`", 'a "quoted" word', "back\\slash", "it's", "a;b|c&d", "*", "#3", "",
         "100%", "%h %n", "line\nbreak", "~"]  # fmt: skip


@pytest.fixture
def _signals():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)  # DeepSpeed's runner takes them


def executable(file: Path, text: str, **values: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.format(python=sys.executable, **values), encoding="utf-8")
    file.chmod(0o755)
    return str(file)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("folder", ["plain", "a working folder", "for $5 & more (%h)"])
def test_words_paths_and_values_reach_the_hosts_as_they_are(tmp_path, monkeypatch, folder):
    here = tmp_path / folder
    executable(tmp_path / "bin" / "pdsh", PDSH)
    python = executable(here / "bin" / "python", PYTHON, out=str(tmp_path))
    (here / "hosts").write_text("node1 slots=2\nnode2 slots=2\n", encoding="utf-8")
    (tmp_path / "environment").write_text("MINE=a $5 'thing' of %h\n", encoding="utf-8")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "executable", python)
    flags = ["--hostfile", "hosts", "--no_ssh_check", "--master_addr", "10.0.0.1"]
    Launcher({})._deepspeed([*flags, str(here / "train.py"), *WORDS], tmp_path / "environment")
    for number in range(2):
        found = json.loads((tmp_path / f"--node_rank={number}").read_text())
        assert found["words"][:3] == ["-u", "-m", "ptp_ds.launch.node"]
        assert found["words"][found["words"].index(str(here / "train.py")) + 1 :] == WORDS
        assert (found["here"], found["sent"]) == (str(here), "a $5 'thing' of %h")


def test_words_that_need_no_quotes_have_none():
    assert [quoted(word) for word in ("--task", "CB", "runs/a-b_c.1", "x=1")] == ["--task", "CB", "runs/a-b_c.1", "x=1"]
    assert shlex.split(quoted("50% off").replace("%%", "%")) == ["50% off"]
