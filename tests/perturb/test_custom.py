"""A perturbation from a file of the user's own: README's example, its records, resume, and every fault of a file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.choices import PERTURBATIONS as BUILT_IN
from ptp_ds.config.checks import without_effect
from ptp_ds.config.flags import build_parser, parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.packing.row import pack
from ptp_ds.perturb import PERTURBATIONS, Noise, SharedPass
from ptp_ds.perturb.custom import choose_perturbation
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.paths import ROOT
from tests.support.processes import worker_environment
from tests.support.reference import make_examples, make_model
from tests.support.runs import QUICK, check, last_prompt

HEAD = "from ptp_ds.perturb import Perturbation\n"
FIND = HEAD + "def find(shared, row, clean_TH, settings, noise):\n    return 0.1 * clean_TH\n"


def readme_example() -> str:
    """The Python block of docs/perturbations.md that defines a perturbation."""
    text = (ROOT / "docs" / "perturbations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if "PERTURBATION = Perturbation(" in block]
    return found


@pytest.fixture
def example(tmp_path) -> Path:
    """README's file."""
    file = tmp_path / "sparse_ascent.py"
    file.write_text(readme_example(), encoding="utf-8")
    return file


def test_the_readmes_example_moves_a_share_of_the_examples_own_tokens(example):
    """Each token that takes part by epsilon mean embedding norms, along the gradient; the share is the file's own."""
    row, backbone = pack(make_examples("multi")), Backbone(make_model("llama"))
    prompt = 0.1 * torch.randn(3, backbone.width, generator=torch.Generator().manual_seed(0))
    clean = backbone.embed(row.token_ids)
    for keep in (0.0, 0.4, 1.0):
        run = RunConfig(perturbation=str(example), perturbation_args=f"keep={keep}", epsilon=0.2)
        assert run.chosen_perturbation.name == "sparse_ascent"
        assert run.own_settings == {"keep": keep, "start": 0.1}
        settings, shared = settings_of(run, 5.0), SharedPass(backbone, prompt, row, clean)
        delta = choose_perturbation(str(example)).perturbation.find(shared, row, clean, settings, Noise(1, 2))
        moved = (delta != 0).any(-1)
        torch.testing.assert_close(delta[moved].norm(dim=-1), torch.full((int(moved.sum()),), 0.2 * 5.0))
        assert not bool(moved[~row.movable].any())
        assert int(moved.sum()) == {0.0: 0, 1.0: int(row.movable.sum())}.get(keep, int(moved.sum()))
        assert keep != 0.4 or 0 < int(moved.sum()) < int(row.movable.sum())


def test_a_run_with_the_readmes_example(run_train, tiny_model, tmp_path, example):
    """The stem names the run, config.json and the checkpoint the very file; a changed one is refused at resume."""
    out = tmp_path / "run"
    args = [*QUICK, "--model", tiny_model, "--perturbation", example, "--epsilon", "0.3", "--perturbation_args",
            "keep=0.8", "--max_steps", "4", "--save_every", "2", "--lr", "0.01", "--keep_checkpoints", "5"]  # fmt: skip
    done = check(run_train([*args, "--output_dir", out], nproc=2))
    assert "no effect" not in done.stderr
    assert json.loads((out / "result.json").read_text())["perturbation"] == "sparse_ascent"
    digest, config = choose_perturbation(str(example)).sha256, json.loads((out / "config.json").read_text())
    assert config["perturbation_sha256"] == digest
    assert config["perturbation_args"] == {"keep": 0.8, "start": 0.1}
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line["delta_norm"] > 0 for line in logged if line["kind"] == "train")
    again, moved = tmp_path / "again", tmp_path / "elsewhere"
    resume = ["--output_dir", again, "--resume", out / "checkpoints" / "step-000002"]
    moved.mkdir()
    (moved / example.name).write_bytes(example.read_bytes())
    check(run_train([*args, *resume, "--perturbation", moved / example.name]))
    assert float((last_prompt(again) - last_prompt(out)).norm() / last_prompt(out).norm()) < 1e-5
    third = ["--output_dir", tmp_path / "third", *resume[2:]]
    done = run_train([*args, *third, "--perturbation_args", "start=0.2"])
    assert done.returncode == 2
    assert "its perturbation_args start is 0.1, this run's is 0.2." in done.stderr
    example.write_text(readme_example() + "\n# changed\n")
    done = run_train([*args, *third])
    assert done.returncode == 2
    assert f"its perturbation file's sha256 is '{digest}', this run's is '" in done.stderr


def test_the_output_folder_is_named_by_the_stem(run_train, tiny_model, tmp_path, example):
    check(run_train([*QUICK, "--model", tiny_model, "--perturbation", example, "--max_steps", "1"]))
    assert [folder.name.startswith("COPA-sparse_ascent-0-") for folder in (tmp_path / "runs").iterdir()] == [True]


def test_a_file_that_climbs_computes_what_the_built_in_one_does(tmp_path):
    """Ascent, text twins and carried deltas are open to a file as well."""
    source = "from ptp_ds.perturb import Perturbation\nfrom ptp_ds.perturb.{0} import {0}\nPERTURBATION = Perturbation"
    backbone, row = Backbone(make_model("llama")), pack(make_examples("single"))
    prompt = torch.randn(5, backbone.width, generator=torch.Generator().manual_seed(1))
    losses = {}
    for name in ("pgd", "free"):
        file = tmp_path / f"my_{name}.py"
        fields = f"(find={name}, sizes=('epsilon',), reads=('alpha', 'ascent_steps'), carries={name == 'free'})\n"
        file.write_text(source.format(name) + fields)
        for given in (name, str(file)):
            run = RunConfig(perturbation=given, epsilon=0.5)
            settings = settings_of(run, backbone.mean_embedding_norm())
            losses[given] = ptp_loss(
                prompt.clone().requires_grad_(), backbone, row, run, settings, Noise(0, 0)
            ).total.detach()
        assert float(losses[name]) == float(losses[str(file)])
        assert run.carries is (name == "free")
    text = tmp_path / "words.py"
    text.write_text(HEAD + "from ptp_ds.perturb.mask import mask\nPERTURBATION = Perturbation(twins=mask, sizes=())\n")
    run = RunConfig(perturbation=str(text))
    twins = run.active_perturbation.twins(make_examples("single"), settings_of(run, 1.0, 9), Noise(0, 0))
    assert twins == PERTURBATIONS["mask"].twins(make_examples("single"), settings_of(run, 1.0, 9), Noise(0, 0))


def test_sizes_decide_whether_there_is_a_second_stream(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FIND + "PERTURBATION = Perturbation(find=find, sizes=('sigma', 'epsilon'), reads=['norm'])\n")
    assert RunConfig(perturbation=str(file), sigma=0.0).perturbs
    assert not RunConfig(perturbation=str(file), sigma=0.0, epsilon=0.0).perturbs
    assert not RunConfig(perturbation=str(file), reg_weight=0.0).perturbs
    assert without_effect(RunConfig(perturbation=str(file)), {"sigma", "norm", "alpha", "mask_share"}) == [
        "alpha", "mask_share",
    ]  # fmt: skip
    file.write_text(FIND + "PERTURBATION = Perturbation(find=find, sizes=())\n")
    assert RunConfig(perturbation=str(file), sigma=0.0, epsilon=0.0).perturbs


def test_the_file_is_run_once_and_leaves_nothing_behind(tmp_path):
    file, count = tmp_path / "mine.py", tmp_path / "count"
    lines = f"with open({str(count)!r}, 'a') as handle: handle.write('x')\n"
    file.write_text(FIND + lines + "PERTURBATION = Perturbation(find=find, sizes=())\n")
    run, _ = parse_run(["--perturbation", str(file)])
    assert (run.perturbs, run.streams, run.carries, without_effect(run, set())) == (True, 2, False, [])
    assert count.read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["count", "mine.py"]


DECLARED = (
    "from ptp_ds.perturb import Parameter\n"
    "PERTURBATION = Perturbation(find=find, sizes=('keep',), parameters={"
    "'keep': Parameter(0.9, 'share, 100 % at most'), 'steps': Parameter(3), "
    "'both': Parameter(False), 'word': Parameter('a b')})\n"
)


def test_own_parameters_by_flag_and_by_file(tmp_path):
    """The default's type, wherever they are given; a parameter in sizes decides on the second stream."""
    file, config = tmp_path / "mine.py", tmp_path / "run.json"
    file.write_text(FIND + DECLARED)
    defaults = {"keep": 0.9, "steps": 3, "both": False, "word": "a b"}
    assert parse_run(["--perturbation", str(file)])[0].own_settings == defaults
    words = ["keep=1", "steps=7", "both=true", "word=c = d"]
    given, explicit = parse_run(["--perturbation", str(file), "--perturbation_args", *words])
    assert given.own_settings == {"keep": 1.0, "steps": 7, "both": True, "word": "c = d"}
    assert isinstance(given.own_settings["keep"], float)
    assert settings_of(given, 1.0).own == given.own_settings
    assert "perturbation_args" in explicit
    fields = {"perturbation": str(file), "perturbation_args": given.perturbation_args}
    config.write_text(json.dumps(fields))  # as config.json holds them
    assert parse_run(["--config", str(config)])[0].own_settings == given.own_settings
    assert given.perturbs
    assert not parse_run(["--perturbation", str(file), "--perturbation_args", "keep=0"])[0].perturbs
    assert RunConfig().own_settings == {}


def test_help_tells_a_named_files_parameters(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(FIND + DECLARED)
    with pytest.raises(SystemExit) as ended:
        parse_run(["--perturbation", str(file), "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "mine.py: keep=0.9 (share, 100 % at most), steps=3, both=False, word=a b" in shown
    with pytest.raises(SystemExit):
        parse_run(["--help"])
    assert "NAME=VALUE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["kep=1"],
            r"^--perturbation .*mine\.py has no parameter 'kep' \(did you mean 'keep'\?\); it has keep, steps, both, ",
        ),
        (["keep"], r"^--perturbation_args keep: expected NAME=VALUE, such as keep=0\.9\.$"),
        (["keep=much"], r"^--perturbation_args keep is 'much'; expected a finite number\.$"),
        (["keep=nan"], r"^--perturbation_args keep is 'nan'; expected a finite number\.$"),
        (["steps=2.5"], r"^--perturbation_args steps is '2\.5'; expected a whole number\.$"),
        (["both=1"], r"^--perturbation_args both is '1'; expected true or false\.$"),
        (["keep=1", "keep=2"], r"^--perturbation_args gives keep twice; give it once\.$"),
    ],
)
def test_parameters_that_are_none(tmp_path, words, message):
    file = tmp_path / "mine.py"
    file.write_text(FIND + DECLARED)
    with pytest.raises(UserError, match=message):
        parse_run(["--perturbation", str(file), "--perturbation_args", *words])


def test_parameters_of_a_built_in_perturbation():
    with pytest.raises(UserError, match=r"^--perturbation pgd has no parameter 'keep'; it declares none\.$"):
        parse_run(["--perturbation", "pgd", "--perturbation_args", "keep=1"])


FAILURES = {  # what the function does, and what the sentence says of it
    "find": ("return clean_TH + 'x'", "TypeError: "),
    "nothing said": ("raise ValueError", "ValueError."),
    "in our code": ("return noise.normal(3, 4)", "AttributeError: "),
    "twins": ("return [][0]", "IndexError: list index out of range."),
}
ARGUMENTS = {"find": "shared, row, clean_TH, settings, noise", "twins": "examples, settings, noise"}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_inside_the_file_is_a_sentence_with_its_line(tmp_path, name):
    body, said = FAILURES[name]
    function = "twins" if name == "twins" else "find"
    file, row = tmp_path / "mine.py", pack(make_examples("single"))
    source = f"def {function}({ARGUMENTS[function]}):\n    {body}\n"
    file.write_text(f"{HEAD}{source}PERTURBATION = Perturbation({function}={function}, sizes=())\n")
    chosen, settings = choose_perturbation(str(file)).perturbation, settings_of(RunConfig(), 1.0)
    given = {
        "find": (None, row, torch.zeros(row.num_tokens, 4), settings, Noise(0, 0)),
        "twins": (make_examples("single"), settings, Noise(0, 0)),
    }
    with pytest.raises(UserError) as caught:
        getattr(chosen, function)(*given[function])
    found = str(caught.value)
    assert found.startswith(f"--perturbation {file}: {function} failed at line 3: {said}")
    assert "\n" not in found
    assert found.endswith(".")


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('full')", "RuntimeError('Connection closed by peer')"])
def test_a_full_memory_and_a_lost_rank_are_not_the_files_fault(tmp_path, error):
    file, row = tmp_path / "mine.py", pack(make_examples("single"))
    file.write_text(
        f"import torch\n{HEAD}def find(*_):\n    raise {error}\nPERTURBATION = Perturbation(find=find, sizes=())\n"
    )
    find = choose_perturbation(str(file)).perturbation.find
    with pytest.raises(RuntimeError):
        find(None, row, torch.zeros(row.num_tokens, 4), settings_of(RunConfig(), 1.0), Noise(0, 0))


def failure(folder: Path) -> str:
    return f"--perturbation {folder / 'mine.py'}: find failed at line 5: ZeroDivisionError: division by zero."


def launch_failing(tmp_path, tiny_model, where: str) -> subprocess.CompletedProcess:
    """Two ranks by the `deepspeed` command, with a file that fails in the second step where `where` holds."""
    file = tmp_path / "mine.py"
    file.write_text(
        f"import os\n{HEAD}def find(shared, row, clean_TH, settings, noise):\n"
        f"    if noise.step == 1 and {where}:\n        1 / 0\n    return 0.1 * clean_TH\n"
        "PERTURBATION = Perturbation(find=find, sizes=())\n"
    )
    command = [sys.executable, "-m", "ptp_ds.launch", "--hostfile", ROOT / "hostfiles" / "local",
               ROOT / "scripts" / "train.py", *QUICK, "--model", tiny_model, "--perturbation", file, "--max_steps", "3",
               "--output_dir", tmp_path / "run"]  # fmt: skip
    return subprocess.run([*map(str, command)], env=worker_environment(), cwd=tmp_path, capture_output=True, text=True,
                          timeout=170, check=False)  # fmt: skip


@pytest.mark.slow
def test_ranks_that_fail_in_the_file_say_so_once(tmp_path, tiny_model):
    done = launch_failing(tmp_path, tiny_model, "True")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "rror" in line] == [f"error: {failure(tmp_path)}"]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_that_fails_alone_says_so(tmp_path, tiny_model):
    """The other one waits for it, and may tell that it is gone."""
    done = launch_failing(tmp_path, tiny_model, "os.environ['RANK'] == '1'")
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert told[0] == f"error on rank 1: {failure(tmp_path)}"
    assert all("another rank is gone" in line for line in told[1:])
    assert "Traceback" not in done.stdout + done.stderr


def test_help_lists_the_built_in_names():
    text = " ".join(build_parser("about").format_help().split())
    assert f"{', '.join(BUILT_IN)}, or a .py file of your own" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gausian", r"^Unknown perturbation 'gausian' \(did you mean 'gaussian'\?\): give one of none, gaussian, .*"),
        ("zzzz", r"^Unknown perturbation 'zzzz': give one of none, .* or a \.py file\.$"),
        ("", r"^Unknown perturbation '': give one of none"),
        ("no/mine.py", r"^--perturbation no/mine\.py: No such file or directory; give the path of a \.py file\.$"),
        ("no/pgd.py", r"^--perturbation no/pgd\.py has the name of a built-in one; rename the file to tell them apart"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        parse_run(["--perturbation", name])


PARAMETERS = "from ptp_ds.perturb import Parameter as P; PERTURBATION = Perturbation(find=find, sizes=(), parameters="
FAULTS = {
    "": "defines no PERTURBATION; add PERTURBATION = Perturbation(find=..., sizes=(...)).",
    "PERTURBATION = {'find': 1}": ": PERTURBATION is of type dict; expected ptp_ds.perturb.Perturbation.",
    "PERTURBATION = Perturbation(sizes=())": ": PERTURBATION needs a function as find, as twins, or as both.",
    "PERTURBATION = Perturbation(find=3, sizes=())": ": PERTURBATION needs a function as find, as twins, or as both.",
    "PERTURBATION = Perturbation(twins=find, sizes=(), carries=True)":
        ": PERTURBATION carries its deltas, so it needs find and no twins.",
    "PERTURBATION = Perturbation(find=find, sizes='sigma')":
        ": sizes is 'sigma'; expected a tuple of flags' names, such as ('sigma',).",
    "PERTURBATION = Perturbation(find=find, sizes=('sigmas',))":
        ": 'sigmas' in sizes is no flag that fits (did you mean 'sigma'?); choose from a2t_share, ",
    "PERTURBATION = Perturbation(find=find, sizes=('norm',))": ": 'norm' in sizes is no flag that fits; choose from ",
    "PERTURBATION = Perturbation(find=find, sizes=(), reads=('lr',))":
        ": 'lr' in reads is no flag that fits; choose from a2t_",
    "PERTURBATION = Perturbation(find=find, sizes=(), parameters={'keep': 0.9})":
        ": parameter 'keep' is 0.9; expected Parameter(default, help) with a finite number, text, True or False, and ",
    "PERTURBATION = Perturbation(find=find, sizes=(), parameters=['keep'])":
        """: parameters is ['keep']; expected {"name": Parameter(default, "help")}.""",
    f"{PARAMETERS}{{'a b': P(1)}})":
        ": a parameter is named 'a b'; expected a name such as Python's.",
    f"{PARAMETERS}{{'norm': P(1)}})":
        ": parameter 'norm' has a flag's name; rename it, or name the flag in reads.",
    "import no_such_package": " can't be loaded at line 4: ModuleNotFoundError: No module named 'no_such_package'.",
    "def broken(:": " can't be loaded at line 4: SyntaxError: ",
    "find(1, 2, 'x', None, None)": " can't be loaded at line 3: TypeError: ",
}  # fmt: skip


@pytest.mark.parametrize("line", FAULTS)
def test_faults_of_a_file(tmp_path, line):
    file = tmp_path / "mine.py"
    file.write_text(FIND + line + "\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared below
        parse_run(["--perturbation", str(file)])
    found = str(caught.value)
    assert found.startswith(f"--perturbation {file}")
    assert FAULTS[line] in found
    assert "\n" not in found
    assert found.endswith(".")


def test_deltas_of_another_shape_are_refused(tmp_path):
    file, row = tmp_path / "mine.py", pack(make_examples("single"))
    backbone, settings = Backbone(make_model("llama")), settings_of(RunConfig(), 1.0)
    clean, prompt = backbone.embed(row.token_ids), torch.zeros(3, backbone.width)
    for returned, named in (("clean_TH[0]", r"\(32,\)"), ("None", "NoneType")):
        file.write_text(FIND.replace("0.1 * clean_TH", returned) + "PERTURBATION = Perturbation(find=find, sizes=())\n")
        find, shared = choose_perturbation(str(file)).perturbation.find, SharedPass(backbone, prompt, row, clean)
        with pytest.raises(ValueError, match=rf"find returned {named}; expected a tensor of clean_TH's shape \("):
            find(shared, row, clean, settings, Noise(0, 0))
