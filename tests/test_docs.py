"""README and docs: the generated page, links, commands and flags that exist, Python that runs, a short README."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptp_ds.commands.ptp import COMMANDS
from ptp_ds.config.parsers import PARSERS
from tests.support.paths import ROOT
from tests.support.processes import worker_environment
from tests.support.zygote import run_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "ptp_ds/README.md"]
OWN = {"make_docs": {"--check"}, "make_notebook": {"--execute"}}  # flags of scripts that are no command
OTHERS = re.compile(r"bench/|compare_precision|curves|family_sweep")  # scripts with parsers of their own
LAUNCHERS = {"deepspeed": ("deepspeed", "launcher/runner.py"), "torchrun": ("torch", "distributed/run.py")}
LAUNCHERS_OWN = {"--max_restarts"}  # of this project's deepspeed, in front of the script


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_for_a_person():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1500
    assert (
        text.index("bash scripts/quickstart.sh") < text.index("bash scripts/test.sh") < text.index("## By command line")
    )


def test_the_command_lines_page_is_what_the_parsers_say():
    done = run_script("make_docs.py", ["--check"], ROOT)
    assert done.returncode == 0, done.stderr


def test_a_stale_table_and_an_unknown_one_are_found(tmp_path, monkeypatch, capsys):
    """In a copy of the docs: --check names the page whose table was edited by hand, and writing mends it."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    make_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_docs)
    for folder in ("docs", "ds_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    monkeypatch.setattr(make_docs, "DOCS", tmp_path / "docs")

    def make(*flags):
        monkeypatch.setattr(sys, "argv", ["make_docs.py", *flags])
        return make_docs.main()

    page = tmp_path / "docs" / "perturbations.md"
    right = text_of(page)
    assert make("--check") == 0
    page.write_text(right.replace("| `pgd` |", "| `pdg` |"), encoding="utf-8")
    assert make("--check") == 1
    assert capsys.readouterr().err.startswith("docs/perturbations.md is stale")
    assert make() == 0
    assert text_of(page) == right
    page.write_text(right.replace("make_docs.py: presets", "make_docs.py: preset"), encoding="utf-8")
    with pytest.raises(ValueError, match="there is no table 'preset'"):
        make("--check")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = text_of(ROOT / "docs" / "README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in an indented or fenced block, continued lines joined."""
    found = []
    for page in PAGES:
        blocks = re.sub(r"^```python\n.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
        lines, fenced = [], False
        for line in blocks.split("\n"):
            fenced = not fenced if line.startswith("```") else fenced
            if fenced or line.startswith("    "):
                lines.append(line.strip())
        joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
        begins = r"(?:[A-Z_]+=\S+ )*(?:python scripts/|ptp |deepspeed |torchrun |bash scripts/)"
        found += [(page.name, line) for line in joined.split("\n") if re.match(begins, line)]
    return found


def written_flags(file: Path) -> set[str]:
    """The flags that a file's parser adds, read from its text: importing a benchmark or a launcher takes seconds."""
    text = text_of(file)
    return {
        word
        for call in re.findall(r"add_argument\(([^)]*)", text)
        for word in re.findall(r"[\"'](--?[\w-]+)[\"']", call)
    }


def launcher_flags(name: str) -> set[str]:
    """The flags of a launcher that the docs name; torchrun takes them with - and with _."""
    package, file = LAUNCHERS[name]
    origin = importlib.util.find_spec(package).origin
    flags = written_flags(Path(origin).parent / file) | LAUNCHERS_OWN
    return flags | {"--" + flag[2:].replace("_", "-") for flag in flags}


def flags_of(name: str) -> set[str]:
    """All flags of a command."""
    known = {word for action in PARSERS[name]("")._actions for word in action.option_strings}
    return known | (flags_of("train") if name == "plan" else set())


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_names_what_there_is(page, command):
    words = shlex.split(command.split("#")[0].split("|")[0].split(">")[0])
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    script = next((word for word in words if re.match(r"scripts/.*\.(py|sh|sbatch)$", word)), None)
    if script is not None:
        assert (ROOT / script).is_file(), command
        name, rest = Path(script).stem, words[words.index(script) + 1 :]
        if words[0] in LAUNCHERS:
            in_front = [word for word in words[1 : words.index(script)] if word.startswith("--")]
            assert {word.split("=")[0] for word in in_front} <= launcher_flags(words[0]), f"{page}: {command}"
        if not script.endswith(".py"):
            return
        if OTHERS.search(script):
            own = {word for word in rest if word.startswith("--")}
            assert own <= written_flags(ROOT / script), f"{page}: {command}"
            return
    else:
        own = words[1:] if words[0] == "ptp" else words
        if not own or own[0] == "COMMAND":
            return
        name = next((word for word in own if word in COMMANDS), None)
        assert name is not None, command
        rest = own[own.index(name) + 1 :]
    known = OWN[name] if name in OWN else flags_of(name)
    for word in rest:
        if word.startswith("--") and word != "--help":
            assert word.split("=")[0] in known, f"{page}: {word} in {command}"
    if (
        name in PARSERS and "..." not in rest and "--help" not in rest
    ):  # values, too: choices, numbers, what is required
        unknown = PARSERS[name]("").parse_known_args(rest)[1]
        assert name == "plan" or not unknown, f"{page}: {unknown} in {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_pages_compiles(page):
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")


def run_python(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], env=worker_environment(), cwd=folder, capture_output=True,
                          text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_readmes_tour_runs_as_printed(tmp_path):
    """Its Python, then its commands on the rows that it describes, with fewer steps and seeds."""
    text = text_of(ROOT / "README.md")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    run_python("\n".join(blocks), tmp_path)
    template = re.search(r'^    (\{"name".*?\}\n)', text, re.MULTILINE | re.DOTALL)
    assert template is not None
    (tmp_path / "tone.json").write_text(template[1])
    folder = tmp_path / "data" / "Tone"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        lines = [f'"Thank you, that was kind, {n}.",warm\n"No. That is wrong, {n}.",cold\n' for n in range(6)]
        (folder / f"{split}.csv").write_text("line,tone\n" + "".join(lines))
    tour = re.findall(r"^    (ptp .*?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(tour) >= 5
    for command in tour:
        short = command.replace("--seeds 0-9", "--seeds 0-1")
        if " train " in short:
            short += " --max_steps 2 --eval_every 0 --save_every 0"
        done = subprocess.run([sys.executable, "-m", "ptp_ds", *shlex.split(short)[1:]], cwd=tmp_path, timeout=600,
                              env=worker_environment(), capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, (command, done.stderr[-2000:])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    notebook = json.loads((ROOT / "docs" / "quicktour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    run_python("import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(cells), tmp_path)


@pytest.mark.parametrize("page", ["README.md", "docs/own_loop.md"])
def test_the_examples_give_peft_a_folder_that_it_can_save(page):
    """peft writes tokenizer_name_or_path as JSON, for prompt_tuning_init="TEXT"; resolve_model returns a Path."""
    (line,) = re.findall(r"^folder = .*", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    names = {"resolve_model": Path}
    exec(line, names)
    assert type(names["folder"]) is str
