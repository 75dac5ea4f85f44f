"""A task of ours as lm-evaluation-harness': what its YAML renders, what is refused, its scores where it is there."""

import importlib.util
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ptp_ds.adapters.lm_eval import harness_task, renderer, write_harness_task
from ptp_ds.adapters.served import Served, alone, serve, whole
from ptp_ds.adapters.write import write_adapter
from ptp_ds.errors import UserError
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.models.source import load_config, resolve_model
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import Split
from ptp_ds.tasks.template import builtin_templates, parse_task
from ptp_ds.training.evaluate import evaluation_of
from tests.support.deep_prompts import deep_prompt
from tests.support.processes import child_environment
from tests.support.task_rows import ROWS

WRITTEN = [name for name in builtin_templates() if load_task(name).of_fields]
REFUSED = [name for name in builtin_templates() if name not in WRITTEN]
ODD = [
    " {{ label }} {% if x %}",
    'it\'s "so" \\n.. ',
    "\u00c4rger \U0001f600\u2028 {# no #}",
    "A\nB.\r\nC. ",
    "None",
    "7",
]


def rows_of(*rows: dict) -> Split:
    return Split(rows, [f"row {number}" for number in range(len(rows))], "")


def odd_rows(name: str) -> Split:
    """The built-in task's own row, and it with texts that a template language could take for its own."""
    row, task = ROWS[name.split(".")[0]], load_task(name)
    free = [field for field in task.fields if field not in task.values]
    return rows_of(row, *({**row, **dict.fromkeys(free, text)} for text in ODD))


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_row_s_text_answers_and_label_are_those_of_the_template(name, tmp_path):
    task, split = load_task(name), odd_rows(name)
    made = harness_task(task, split, tmp_path)
    render = renderer(yaml.safe_load(yaml.safe_dump(made.config, sort_keys=False, allow_unicode=True)))
    for row, own, where in zip(made.rows, split.rows, split.where, strict=True):
        (entry,) = task.entries(own, where)
        assert render(json.loads(json.dumps(row))) == (entry.context, list(entry.candidates), entry.gold)
    assert made.config["target_delimiter"] == ""
    metrics = [one["metric"] for one in made.config["metric_list"]]
    assert metrics == (["mcc"] if name.startswith("AX-b") else ["acc"])


def test_most_built_in_tasks_can_be_written_and_the_others_are_those_of_several_questions():
    assert {name.split(".")[0] for name in REFUSED} == {"MultiRC", "ReCoRD", "WSC"}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_of_several_questions_are_refused(name, tmp_path):
    said = refusal(harness_task, load_task(name), rows_of(ROWS[name.split(".")[0]]), tmp_path)
    assert "hold several questions or their own answers" in said


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"text": "{premise} <prompt> {hypothesis}"}, "its text says where the prompt stands"),
        ({"metrics": ["macro_f1"]}, r"of its metrics \(macro_f1\) lm-eval has none"),
        ({"text": "{premise}\nQuestion: {hypothesis}\n"}, "the text ends in a space or a new line"),
        ({"text": "{premise}\r\n{hypothesis} so"}, "lm-eval's template gives another text than task RTE's own"),
        ({"text": "{premise} {not} so"}, "lm-eval's templates can't hold this task's fields"),
        ({"text": "{premise} {true} so"}, "lm-eval's template gives another text"),
    ],
)  # fmt: skip
def test_what_the_harness_would_compute_otherwise_is_refused(change, why, tmp_path):
    spec = {"name": "RTE", "text": "{premise} {hypothesis}", "metrics": ["accuracy"], "label": "label",
            "verbalizers": {"entailment": " True", "not_entailment": " False"}}  # fmt: skip
    row = {**ROWS["RTE"], "not": "a field", "true": "another"}
    with pytest.raises(UserError, match=why):
        harness_task(parse_task({**spec, **change}, "test"), rows_of(row), tmp_path)


def test_metrics_that_the_harness_lacks_are_told(tmp_path, capsys):
    harness_task(load_task("CB"), rows_of(ROWS["CB"]), tmp_path)
    assert "warning: lm-eval has no macro_f1 for choices; it will report acc\n" in capsys.readouterr().err


def test_a_field_that_is_called_as_the_answer_s_own_keeps_its_text(tmp_path):
    spec = {
        "name": "T",
        "text": "{gold} is",
        "metrics": ["accuracy"],
        "label": "y",
        "verbalizers": {"a": " A", "b": " B"},
    }
    made = harness_task(parse_task(spec, "test"), rows_of({"gold": "ore", "y": "b"}), tmp_path)
    assert renderer(made.config)(made.rows[0]) == ("ore is", [" A", " B"], 1)


# with a model


def made_adapter(folder: Path, model: Path, name: str, prompt: torch.Tensor, task: str, kind: str = "soft") -> Path:
    card = {"task": load_task(task).spec(), "head": {"kind": "causal"}, "model": {"name": name},
            "data": {"data_dir": None, "dataset": None}}  # fmt: skip
    write_adapter(folder, prompt, name, load_config(model), card, kind)
    return folder


@pytest.fixture
def served(tiny_model, tmp_path) -> Served:
    prompt = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    return serve([made_adapter(tmp_path / "adapter", tiny_model, str(tiny_model), prompt, "RTE")])


def test_the_files_and_the_command_that_reads_them(served, tmp_path):
    command = write_harness_task(tmp_path / "tasks", served, rows_of(ROWS["RTE"], ROWS["RTE"]))
    assert command == (
        f"lm_eval --model hf --model_args pretrained={served.model},peft={tmp_path}/adapter,dtype=float32 "
        f"--tasks ptp_rte --include_path {tmp_path}/tasks"
    )
    config = yaml.safe_load((tmp_path / "tasks" / "ptp_rte.yaml").read_text())
    file = Path(config["dataset_kwargs"]["data_files"]["test"])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == 2 * [{"premise": "A came.", "hypothesis": "B came.", "gold": 1}]


def test_models_rows_and_tokenizers_that_it_treats_otherwise(served, tmp_path):
    long = {**ROWS["RTE"], "premise": "It rains. " * 300}
    folder, split = tmp_path / "tasks", rows_of(ROWS["RTE"])
    assert "some rows are longer than the context" in refusal(write_harness_task, folder, served, rows_of(long))
    alike = replace(served.task, answers={"entailment": " 10", "not_entailment": " 1"})
    assert "since one begins with another" in refusal(write_harness_task, folder, replace(served, task=alike), split)
    two = replace(served, folders=served.folders * 2)
    assert "lm-eval knows no ensembles" in refusal(write_harness_task, folder, two, split)
    masked = replace(served.source, head_plan=replace(served.source.head_plan, kind="masked"))
    assert "come from a masked head" in refusal(write_harness_task, folder, replace(served, source=masked), split)
    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in refusal(write_harness_task, tmp_path / "file", served, split)
    assert not folder.exists()


@pytest.mark.parametrize(("first", "last", "said"), [("<s>", "", True), ("<s>", "</s>", None), ("", "</s>", False)])
def test_special_tokens_are_asked_for_or_refused(served, tmp_path, first, last, said):
    """said: what the command says of the first token; None where it is refused."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    source = served.source.tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=source.backend_tokenizer, eos_token="</s>", bos_token="<s>")
    marks = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in (first, last) if mark]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(filter(None, (first, "$A", last))), special_tokens=marks
    )
    own = replace(served, source=replace(served.source, tokenizer=tokenizer))
    if said is None:
        assert "puts special tokens around a text" in refusal(write_harness_task, tmp_path, own, rows_of(ROWS["RTE"]))
    else:
        assert f",add_bos_token={said} " in write_harness_task(tmp_path, own, rows_of(ROWS["RTE"]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_peft_opens_the_adapter_with_its_model(served, tiny_model):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(served.folders[0]).eval()
    ids = torch.tensor([[10, 20, 30]])
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        inputs = torch.cat([served.prompts[0][None], base.get_input_embeddings()(ids)], 1)
        torch.testing.assert_close(model(input_ids=ids).logits, base(inputs_embeds=inputs).logits, atol=1e-6, rtol=1e-6)


def harness_scores(command: str, folder: Path) -> tuple[dict[str, float], torch.Tensor]:
    """(metrics, answers' log-probabilities [N, C]) of the harness, run by the command that we give."""
    words = shlex.split(command)
    assert words[0] == "lm_eval"
    extra = ["--device", "cpu", "--batch_size", "4", "--output_path", str(folder), "--log_samples"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words[1:], *extra], env=child_environment(), capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob("samples_*.jsonl")
    (found,) = json.loads(results.read_text())["results"].values()
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    scores = [[float(answer[0]) for answer in line["filtered_resps"]] for line in lines]
    return {name.partition(",")[0]: value for name, value in found.items()}, torch.tensor(scores)


def same_scores(served: Served, split: Split, folder: Path, tolerance: float) -> None:
    examples = served.examples(split, labelled=True)
    ours = served.score(served.load(whole("fp32"), alone(), examples), examples, alone())
    metrics, theirs = harness_scores(write_harness_task(folder / "tasks", served, split), folder / "out")
    torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=0.0)
    result = evaluation_of(ours, examples, served.task)
    assert metrics["acc"] == pytest.approx(result.metrics["accuracy"], abs=1e-9)


needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("RTE", "soft"), ("COPA", "soft"), ("BoolQ", "deep")])
def test_the_harness_gives_our_scores_on_a_tiny_model(tiny_model, tmp_path, name, kind):
    from transformers import AutoModelForCausalLM

    prompt = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    if kind == "deep":
        prompt = deep_prompt(AutoModelForCausalLM.from_pretrained(tiny_model))
    adapter = made_adapter(tmp_path / "adapter", tiny_model, str(tiny_model), prompt, name, kind)
    rows = [{**row, "label": ROWS[name]["label"]} for row in odd_rows(name).rows[:3]]
    same_scores(serve([adapter]), rows_of(*rows), tmp_path, 1e-4)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("RTE", 60), ("BoolQ", 30)])
def test_the_harness_gives_our_accuracy_on_real_rows(superglue, tmp_path, name, count):
    """SmolLM2 behind 20 rows of its vocabulary."""
    from transformers import AutoModelForCausalLM

    from ptp_ds.tasks.data import load_split

    model = resolve_model(EMBEDDED_MODEL)
    rows = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight[1000:1020].detach().clone()
    adapter = made_adapter(tmp_path / "adapter", model, EMBEDDED_MODEL, rows, name)
    split = load_split(load_task(name), "val", str(superglue), None)
    same_scores(serve([adapter]), rows_of(*split.rows[:count]), tmp_path, 2e-3)
