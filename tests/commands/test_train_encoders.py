"""Whole runs with encoders: a classifier and a masked language model, on one and two ranks, and through peft."""

import json
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

from ptp_ds.adapters.read import read_head
from ptp_ds.adapters.served import alone
from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.landscape import open_adapters
from ptp_ds.commands.members import prepare_population
from ptp_ds.commands.one_run import prepare
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.models.heads import HeadPlan, auto_class, head_kind, plan_head, rows_for
from ptp_ds.models.source import load_config, load_tokenizer
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import load_split, tail_ids, tokenise
from ptp_ds.training.start import initial_trained, open_backbone
from tests.support.encoders import ENCODERS
from tests.support.paths import ROOT
from tests.support.populations import QUICK, require_same
from tests.support.reference import REFUSED
from tests.support.runs import check
from tests.support.tiny import make_tokenizer, make_wordpiece
from tests.support.zygote import run_script


def far_from_uniform(model):
    """Weights so large that a gradient is no rounding; see tests.support.reference.make_model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of a bare BertModel and of a BertForMaskedLM, random, with a tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    tokenizer = make_wordpiece()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=256)  # fmt: skip
    folders = {}
    for name, kind in (("bare", BertModel), ("masked", BertForMaskedLM)):
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("encoders") / name
        far_from_uniform(kind(config)).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def evaluate(folder, out, *extra):
    given = ["--adapter", out / "adapter", "--model", folder, "--json", out / "again.json", *extra]
    done = run_script("evaluate.py", given)
    return done, (json.loads((out / "again.json").read_text()) if done.returncode == 0 else None)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_classifier_is_trained_saved_and_read_by_peft(run_train, encoders, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    states = []
    # a rate of 0.1 would throw the new head so far that ascents, whose length is fixed, follow a divergence of rounding
    for nproc, stage in ((1, "zero2"), (2, "zero3")):
        out = tmp_path / str(nproc)
        done = run_train(
            ["--model", encoders["bare"], "--task", "CB", "--perturbation", "pgd", "--max_steps", "3", "--lr", "0.01",
             "--prompt_length", "4", "--ds_config", ROOT / "ds_configs" / f"{stage}.json", "--output_dir", out],
            nproc=nproc,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        states.append(load_file(out / "checkpoints" / "step-000003" / "state.safetensors")["prompt"])
    assert states[0].shape == (4 + 4, 32)  # three classes of 32 weights and a bias: 99 numbers in four rows
    assert float((states[1] - states[0]).norm() / states[0].norm()) < 1e-5
    result = json.loads((tmp_path / "1" / "result.json").read_text())
    done, again = evaluate(encoders["bare"], tmp_path / "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert again["metrics"] == result["metrics"]
    assert again["cross_entropy"] == pytest.approx(result["eval_cross_entropy"], abs=1e-5)
    task, tokenizer = load_task("CB"), load_tokenizer(encoders["bare"])
    examples = tokenise(task, load_split(task, "val", None, None), tokenizer, 200).examples
    base = AutoModelForSequenceClassification.from_pretrained(encoders["bare"], num_labels=3)
    model = PeftModel.from_pretrained(base, tmp_path / "1" / "adapter").eval()
    for example, scores in list(zip(examples, again["scores"], strict=True))[:5]:
        logits = model(input_ids=torch.tensor([[*example.context_ids, *tail_ids(tokenizer)]])).logits[0]
        torch.testing.assert_close(logits, torch.tensor(scores), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "task", "prompt", "perturbation"),
    [
        pytest.param("masked", "COPA", "deep", "mask+gaussian", marks=pytest.mark.slow),
        ("bare", "COPA", "soft", "free"),
    ],
)
def test_answers_that_differ_from_row_to_row(run_train, encoders, tmp_path, model, task, prompt, perturbation):
    out = tmp_path / "run"
    done = run_train(
        ["--model", encoders[model], "--task", task, "--prompt", prompt, "--perturbation", perturbation, "--max_steps",
         "2", "--prompt_length", "4", "--output_dir", out],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((out / "result.json").read_text())
    done, again = evaluate(encoders[model], out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert again["metrics"] == result["metrics"]
    assert again["cross_entropy"] == pytest.approx(result["eval_cross_entropy"], abs=1e-5)


@pytest.fixture(scope="module")
def generic(tmp_path_factory):
    """Folder of a causal model that takes no attention function from outside: rows are padded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("generic"), make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model("falcon", **{**REFUSED["falcon"], "vocab_size": len(tokenizer)})
    far_from_uniform(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "task", "prompt", "perturbation", "ranks"),
    [
        ("bare", "CB", "soft", "gaussian", 1),
        pytest.param("bare", "CB", "soft", "pgd", 2, marks=pytest.mark.slow),
        pytest.param("bare", "CB", "deep", "mask", 1, marks=pytest.mark.slow),
        pytest.param("masked", "COPA", "soft", "pgd", 2, marks=pytest.mark.slow),
        pytest.param("masked", "CB", "deep", "gaussian", 1, marks=pytest.mark.slow),
        ("generic", "COPA", "soft", "pgd", 1),
        pytest.param("causal", "COPA", "deep", "pgd", 2, marks=pytest.mark.slow),
    ],
)
def test_members_of_every_kind_equal_lone_runs(
    run_train, encoders, generic, lively_model, tmp_path, model, task, prompt, perturbation, ranks
):
    """Where each has a head of its own, or rows are padded, members take passes of their own, in the same job."""
    folder = {**encoders, "generic": generic, "causal": lively_model}[model]
    stage = "zero2" if model == "generic" else "zero3"
    args = [*QUICK, "--model", folder, "--task", task, "--prompt", prompt, "--perturbation", perturbation,
            "--ds_config", ROOT / "ds_configs" / f"{stage}.json"]  # fmt: skip
    check(run_train([*args, "--seeds", "0", "7", "--output_dir", tmp_path / "all"], nproc=ranks))
    check(run_train([*args, "--seed", "7", "--output_dir", tmp_path / "alone"], nproc=ranks))
    require_same(tmp_path / "all" / "members" / "seed-7", tmp_path / "alone")


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        (("BoolQ", "CB"), "a classifier of 2 classes for BoolQ; a classifier of 3 classes for CB"),
        (("CB", "RTE"), "a classifier of 3 classes for CB; a classifier of 2 classes for RTE"),
        (("RTE", "COPA"), "a classifier of 2 classes for RTE; a classifier with one output an answer for COPA"),
    ],
)
def test_members_with_different_classifiers_are_refused(encoders, tmp_path, tasks, told):
    (tmp_path / "members.json").write_text(json.dumps([{"name": task, "task": task} for task in tasks]))
    run = RunConfig(model=str(encoders["bare"]), population=str(tmp_path / "members.json"))
    with pytest.raises(UserError, match=f"Members differ in their heads: {told}; train those that are alike in one"):
        prepare_population(run, ())


def test_members_with_classifiers_alike_or_none_may_have_tasks_of_their_own(encoders, tmp_path):
    for model, tasks in (("bare", ("BoolQ", "RTE")), ("masked", ("CB", "RTE", "COPA"))):
        (tmp_path / "members.json").write_text(json.dumps([{"name": task, "task": task} for task in tasks]))
        run = RunConfig(model=str(encoders[model]), population=str(tmp_path / "members.json"))
        assert list(prepare_population(run, ())) == list(tasks)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "prompt"), [("albert", "deep"), ("modernbert", "deep"), ("roberta", "soft")])
def test_families_under_zero3(run_train, encoders, tmp_path, family, prompt):
    """Sharded, recomputed, two ranks: the prompt of one whole rank. albert's layers are one module, used again; albert
    and modernbert ignore a cache; roberta's positions begin behind its padding's."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    tokenizer = load_tokenizer(encoders["masked"])
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**ENCODERS[family], **changes})
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    states = []
    for nproc, stage, activations in ((1, "zero2", "keep"), (2, "zero3", "recompute")):
        out = tmp_path / str(nproc)
        done = run_train(
            ["--model", tmp_path / "model", "--task", "CB", "--prompt", prompt, "--perturbation", "pgd", "--max_steps",
             "3", "--prompt_length", "4", "--activations", activations, "--ds_config",
             ROOT / "ds_configs" / f"{stage}.json", "--output_dir", out], nproc=nproc,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        states.append(load_file(out / "checkpoints" / "step-000003" / "state.safetensors")["prompt"])
    assert float((states[1] - states[0]).norm() / states[0].norm()) < 1e-5


def test_heads_are_found_by_what_was_saved(encoders, tiny_model):
    bare, masked, causal = (load_config(folder) for folder in (encoders["bare"], encoders["masked"], tiny_model))
    assert [head_kind(config) for config in (bare, masked, causal)] == ["classes", "masked", "causal"]
    assert head_kind(masked, "classes") == "classes"
    assert plan_head(bare, "auto", load_task("CB")) == HeadPlan("classes", False, 3)
    assert plan_head(bare, "auto", load_task("COPA")) == HeadPlan("classes", True, 1)
    with pytest.raises(
        ValueError, match="--head classes is for encoders; model family 'llama' is none: use --head causal"
    ):
        auto_class(causal, "classes", "folder")
    with pytest.raises(ValueError, match="'llama' has no masked language model"):
        auto_class(causal, "masked", "folder")


def test_rows_follow_the_head(encoders, tokenizer):
    wordpiece = load_tokenizer(encoders["bare"])
    rows = rows_for(HeadPlan("masked"), load_task("RTE"), wordpiece, "soft", 7)
    assert rows == SeparateRows(kind="masked", prompt_length=7, mask_id=wordpiece.mask_token_id,
                                tail=(wordpiece.sep_token_id,))  # fmt: skip
    assert rows_for(HeadPlan("masked"), load_task("RTE"), wordpiece, "deep", 7).prompt_length == 0
    assert rows_for(HeadPlan(), load_task("RTE"), tokenizer, "deep", 7) == TreeRows("deep")
    with pytest.raises(ValueError, match="--head masked needs a mask token"):
        rows_for(HeadPlan("masked"), load_task("RTE"), tokenizer, "soft", 7)


def test_a_bare_encoder_is_no_masked_language_model(run_train, encoders):
    done = run_train(["--model", encoders["bare"], "--task", "RTE", "--head", "masked", "--max_steps", "1"])
    assert done.returncode != 0
    assert "has no 'cls.predictions" in done.stderr
    assert "choose another --head" in done.stderr


def test_classes_keep_their_trained_order(encoders, tmp_path):
    """AX-b lists its labels the other way round; a classifier's outputs are RTE's."""
    from ptp_ds.adapters.task import adapter_plan

    (tmp_path / "ptp_ds.json").write_text(json.dumps({"head": {"kind": "classes"}, "task": load_task("RTE").spec()}))
    config = load_config(encoders["bare"])
    plan, task = adapter_plan(tmp_path, config, load_task("AX-b"))
    assert plan == HeadPlan("classes", False, 2)
    assert list(task.answers) == list(load_task("RTE").answers) != list(load_task("AX-b").answers)
    with pytest.raises(ValueError, match="tells entailment, not_entailment apart; task CB has"):
        adapter_plan(tmp_path, config, load_task("CB"))


def test_landscapes_of_classifiers_in_another_order_are_refused(tmp_path, encoders):
    """All prompts are asked with the first one's examples; of tasks that are equal but for the order of answers."""
    spec, config, plan = load_task("RTE").spec(), load_config(encoders["bare"]), HeadPlan("classes", False, 2)
    reordered = {**spec, "answers": dict(reversed(spec["answers"].items()))}
    for name, task in (("one", spec), ("other", reordered)):
        card = {"task": task, "head": {"kind": "classes"}}
        head = {"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.ones(2)}
        write_adapter(tmp_path / name, torch.ones(4, 32), str(encoders["bare"]), config, card, "soft", plan, head)
    given = Namespace(adapters=[tmp_path / "one", tmp_path / "other"], model=str(encoders["bare"]))
    with pytest.raises(UserError, match=r"other: its order of classes isn't that of .*one; give adapters of one model"):
        open_adapters(given)


def test_a_head_of_another_shape_is_refused(tmp_path, encoders):
    head = {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    write_adapter(tmp_path / "a", torch.ones(4, 32), "x", load_config(encoders["bare"]), {}, "soft",
                  HeadPlan("classes", False, 3), head)  # fmt: skip
    wanted = {name: tuple(tensor.shape) for name, tensor in head.items()}
    assert all(torch.equal(tensor, head[name]) for name, tensor in read_head(tmp_path / "a", wanted).items())
    with pytest.raises(ValueError, match=r"holds a head of .*\(3, 32\).*this model and task need none"):
        read_head(tmp_path / "a", {})


@pytest.fixture
def with_classifier(encoders, tmp_path):
    """with_classifier(task, **tensors) writes an adapter of a classifier of the task's classes, and says where."""

    def write(task, **tensors):
        count = len(load_task(task).answers)
        head = {"classifier.weight": torch.randn(count, 32), "classifier.bias": torch.randn(count)}
        head = head | {"bert.pooler.dense.weight": torch.randn(32, 32), "bert.pooler.dense.bias": torch.randn(32)}
        head = {name: tensor for name, tensor in (head | tensors).items() if tensor is not None}
        card = {"task": load_task(task).spec(), "head": {"kind": "classes"}}
        folder = tmp_path / task
        write_adapter(folder, torch.randn(4, 32), "x", load_config(encoders["bare"]), card, "soft",
                      HeadPlan("classes", False, count), head)  # fmt: skip
        return folder, head

    return write


def started(folder, task, adapter, **settings):
    """A run that starts from an adapter, prepared, and what it starts with: the prompt and the head's tensors."""
    run = RunConfig(model=str(folder), task=task, prompt_init="adapter", init_adapter=str(adapter), prompt_length=4,
                    ds_config=str(ROOT / "ds_configs" / "zero2.json"), **settings)  # fmt: skip
    prepared = prepare(run)
    backbone = open_backbone(prepared, alone())
    return prepared, backbone.head.split(initial_trained(prepared, backbone))


def test_a_run_starts_from_the_classifier_too(encoders, with_classifier, capsys):
    adapter, head = with_classifier("CB", **_pooler(encoders))
    prepared, (prompt, tensors) = started(encoders["bare"], "CB", adapter)
    assert torch.equal(prompt, prepared.adapter)
    assert tensors.keys() == head.keys()
    assert all(torch.equal(tensor, head[name]) for name, tensor in tensors.items())
    assert "is left out" not in capsys.readouterr().err
    other, _ = started(encoders["bare"], "CB", with_classifier("CB", **_pooler(encoders))[0])
    changed = other.identity["prompt in --init_adapter"] != prepared.identity["prompt in --init_adapter"]
    assert changed, "another classifier is another start"


def _pooler(encoders):
    """Without the pooler's tensors, which the checkpoint of the bare encoder holds."""
    return {f"bert.pooler.dense.{name}": None for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("task", "model", "trained_on", "why"),
    [
        ("AX-b", "bare", "RTE", "it tells entailment, not_entailment apart, and task AX-b has not_entailment, entailm"),
        ("RTE", "bare", "CB", "it tells entailment, contradiction, neutral apart, and task RTE has entailment, not_en"),
        ("RTE", "masked", "RTE", "this run has a masked head"),
        ("CB", "bare", "CB", "this model's has other tensors"),
    ],
)
def test_a_classifier_that_does_not_fit_is_left_out_and_told(
    encoders, with_classifier, write_rows, tmp_path, capsys, task, model, trained_on, why
):
    tensors = {} if "tensors" in why else _pooler(encoders)
    adapter, head = with_classifier(trained_on, **tensors)
    labels = list(load_task(task).answers)
    fields = load_task(task).fields
    rows = [{**dict.fromkeys(fields, f"It rains {n} days."), "label": labels[n % len(labels)]} for n in range(8)]
    for split in ("train", "val"):
        write_rows(tmp_path / "data" / task / f"{split}.jsonl", rows)
    prepared, (prompt, found) = started(encoders[model], task, adapter, data_dir=str(tmp_path / "data"), batch_size=4)
    assert torch.equal(prompt, prepared.adapter)
    assert not any(
        torch.equal(tensor, head[name]) for name, tensor in found.items() if tensor.shape == head[name].shape
    )
    told = [line for line in capsys.readouterr().err.splitlines() if "is left out, only its prompt is taken" in line]
    assert len(told) == 1
    assert f"the classifier of {adapter} is left out, only its prompt is taken: {why}" in told[0]
