"""<prompt> in a template: the soft prompt stands there in every row, and is scored as a plain pass scores it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import HeadPlan, rows_for
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.perturb import Noise
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import Split, tokenise
from ptp_ds.tasks.template import parse_task
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.packed import divergence, make_prompt
from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.reference import make_examples, make_model, relative_error

TEMPLATE = {"name": "Mine", "text": "{title}: {body}<prompt>\nTopic:", "truncate": "body", "label": "topic",
            "verbalizers": {"sport": " sports", "money": " business"}, "metrics": ["accuracy"]}  # fmt: skip


def plain_scores(model, prompt, example, delta=None):
    """[C] by an ordinary forward an answer, the prompt between two parts of the context."""
    embed = model.get_input_embeddings()
    context = embed(torch.tensor(list(example.context_ids)))
    context = context if delta is None else context + delta
    scores = []
    for candidate in example.candidate_ids:
        behind = embed(torch.tensor(list(candidate)))
        inputs = torch.cat([context[: example.prompt_at], prompt, context[example.prompt_at :], behind])[None]
        log_probs = model(inputs_embeds=inputs, use_cache=False).logits[0].log_softmax(-1)
        first = len(prompt) + len(example.context_ids) - 1
        scores.append(sum(log_probs[first + place, token] for place, token in enumerate(candidate)))
    return torch.stack(scores)


@pytest.mark.parametrize("target", ["input", "both"])
@pytest.mark.parametrize("perturbation", ["gaussian", "pgd"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_step_gradient(family, perturbation, target):
    examples = [replace(e, prompt_at=min(3, len(e.context_ids) - 1)) for e in make_examples("ragged")]
    backbone, prompt = Backbone(make_model(family)), make_prompt().requires_grad_()
    backbone.serve("soft", SeparateRows(kind="causal", prompt_length=5, target=target))
    run = RunConfig(
        perturbation=perturbation,
        target=target,
        divergence="sym_kl",
        divergence_gradient="both",
        reg_weight=0.7,
        epsilon=0.5,
    )
    settings, row = settings_of(run, backbone.mean_embedding_norm()), backbone.rows.pack(examples)
    loss = ptp_loss(prompt, backbone, row, run, settings, Noise(3, 4))
    loss.total.backward()
    model, plain, total = make_model(family), prompt.detach().clone().requires_grad_(), 0.0
    for example, part in zip(examples, loss.delta.detach().split(row.lengths), strict=True):
        places = backbone.rows.context_places(example, 0)
        moved = plain + part[example.prompt_at : example.prompt_at + 5]
        clean, perturbed = plain_scores(model, plain, example), plain_scores(model, moved, example, part[places])
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        total = total + 0.7 * divergence("sym_kl", clean, perturbed, example.gold)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, expected) < 1e-4


def test_the_mark_becomes_a_place_among_the_tokens(tokenizer):
    task = parse_task(TEMPLATE, "t")
    assert task.places_prompt
    assert not load_task("RTE").places_prompt
    row = {"title": "A cup", "body": "They won the final by two goals", "topic": "sport"}
    (example,) = tokenise(task, Split([row], ["here"], ""), tokenizer, 100).examples
    before, after = (tokenizer.decode(part) for part in (example.context_ids[: example.prompt_at],
                                                         example.context_ids[example.prompt_at :]))  # fmt: skip
    assert (before, after) == ("A cup: They won the final by two goals", "\nTopic:")
    (short,) = tokenise(task, Split([row], ["here"], ""), tokenizer, len(example.context_ids) - 2).examples
    assert tokenizer.decode(short.context_ids[short.prompt_at :]) == "\nTopic:"
    assert rows_for(HeadPlan(), task, None, "soft", 5) == SeparateRows(kind="causal", prompt_length=5)
    assert rows_for(HeadPlan(), load_task("RTE"), None, "soft", 5) == TreeRows()
    with pytest.raises(ValueError, match="Mine's text has a place for a soft prompt; a deep one stands in every layer"):
        rows_for(HeadPlan(), task, None, "deep", 5)
    with pytest.raises(ValueError, match="holds <prompt> twice"):
        parse_task({**TEMPLATE, "text": "<prompt>{title}<prompt>{body}"}, "t")


@pytest.mark.slow
def test_a_run_and_its_adapter(run_train, tiny_model, tmp_path, write_rows):
    rows = [{"title": f"t{n}", "body": f"some words {n}", "topic": ("sport", "money")[n % 2]} for n in range(8)]
    for split in ("train", "val"):
        write_rows(tmp_path / "data" / "Mine" / f"{split}.jsonl", rows)
    (tmp_path / "mine.json").write_text(json.dumps(TEMPLATE))
    arguments = ["--model", tiny_model, "--task", tmp_path / "mine.json", "--data_dir", tmp_path / "data",
                 "--perturbation", "mask+gaussian", "--max_steps", "2", "--output_dir", tmp_path / "run"]  # fmt: skip
    done = run_train(arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--adapter", str(tmp_path / "run" / "adapter"),
               "--model", str(tiny_model), "--data_dir", str(tmp_path / "data"),
               "--json", str(tmp_path / "again.json")]  # fmt: skip
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["cross_entropy"] == pytest.approx(result["eval_cross_entropy"], abs=1e-5)
    from peft import PeftConfig

    with pytest.raises((KeyError, ValueError)):
        PeftConfig.from_pretrained(str(tmp_path / "run" / "adapter"))
