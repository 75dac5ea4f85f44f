"""A perturbation from a file of the user's own: README's example, its records, resume, and every fault of a file."""

import json
from pathlib import Path

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.checks import without_effect
from ptp_ds.config.flags import build_parser, parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack
from ptp_ds.perturb import PERTURBATIONS, Noise, SharedPass
from ptp_ds.perturb.custom import BUILT_IN, choose_perturbation
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.paths import ROOT
from tests.support.reference import make_examples, make_model
from tests.support.runs import QUICK, check, last_prompt

HEAD = "from ptp_ds.perturb import Perturbation\n"
FIND = HEAD + "def find(shared, row, clean_TH, settings, noise):\n    return 0.1 * clean_TH\n"


def readme_example() -> str:
    """The indented block of README's paragraph 'A perturbation of your own'."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith("A perturbation of your own")) + 1
    end = next(number for number in range(start, len(lines)) if lines[number] and not lines[number].startswith("    "))
    return "\n".join(line.removeprefix("    ") for line in lines[start:end]).strip() + "\n"


@pytest.fixture
def example(tmp_path) -> Path:
    """README's file."""
    file = tmp_path / "token_dropout.py"
    file.write_text(readme_example(), encoding="utf-8")
    return file


def test_the_readmes_example_drops_tokens_of_the_example_alone(example):
    chosen = choose_perturbation(str(example))
    assert chosen.name == "token_dropout"
    assert readme_example().count("\n") < 30
    row, backbone = pack(make_examples("multi")), Backbone(make_model("llama"))
    clean = backbone.embed(row.token_ids)
    for share in (0.0, 0.4, 1.0):
        settings = settings_of(RunConfig(mask_share=share), 1.0)
        delta = chosen.perturbation.find(None, row, clean, settings, Noise(1, 2))
        dropped = (delta != 0).any(-1)
        assert torch.equal(delta[dropped], -clean[dropped])
        assert not bool(dropped[~row.movable].any())
        assert int(dropped.sum()) == {0.0: 0, 1.0: int(row.movable.sum())}.get(share, int(dropped.sum()))
        assert share != 0.4 or 0 < int(dropped.sum()) < int(row.movable.sum())


def test_a_run_with_the_readmes_example(run_train, tiny_model, tmp_path, example):
    """The stem names the run, config.json and the checkpoint the very file; a changed one is refused at resume."""
    out = tmp_path / "run"
    args = [*QUICK, "--model", tiny_model, "--perturbation", example, "--mask_share", "0.3", "--max_steps", "4",
            "--save_every", "2", "--lr", "0.01", "--keep_checkpoints", "5"]  # fmt: skip
    done = check(run_train([*args, "--output_dir", out], nproc=2))
    assert "no effect" not in done.stderr
    assert json.loads((out / "result.json").read_text())["perturbation"] == "token_dropout"
    digest = choose_perturbation(str(example)).sha256
    assert json.loads((out / "config.json").read_text())["perturbation_sha256"] == digest
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line["delta_norm"] > 0 for line in logged if line["kind"] == "train")
    again, moved = tmp_path / "again", tmp_path / "elsewhere"
    resume = ["--output_dir", again, "--resume", out / "checkpoints" / "step-000002"]
    moved.mkdir()
    (moved / example.name).write_bytes(example.read_bytes())
    check(run_train([*args, *resume, "--perturbation", moved / example.name]))
    assert float((last_prompt(again) - last_prompt(out)).norm() / last_prompt(out).norm()) < 1e-5
    example.write_text(readme_example() + "\n# changed\n")
    done = run_train([*args, "--output_dir", tmp_path / "third", *resume[2:]])
    assert done.returncode == 2
    assert f"its perturbation file's sha256 is '{digest}', this run's is '" in done.stderr


def test_the_output_folder_is_named_by_the_stem(run_train, tiny_model, tmp_path, example):
    check(run_train([*QUICK, "--model", tiny_model, "--perturbation", example, "--max_steps", "1"]))
    assert [folder.name.startswith("COPA-token_dropout-0-") for folder in (tmp_path / "runs").iterdir()] == [True]


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
