"""<prompt> in a template: the soft prompt stands there in every row, and is scored as a plain pass scores it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.models.heads import HeadPlan, rows_for
from ptp_ds.models.source import load_tokenizer
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.perturb import Noise
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import Split, tokenise
from ptp_ds.tasks.template import parse_task
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.packed import divergence, make_prompt
from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.reference import make_examples, make_model, relative_error, with_instruction
from tests.support.reference import plain_scores as reference_scores

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


def clean_and_twin(backbone, row, prompt):
    """[2, B, C] scores of a row that holds both streams."""
    return backbone.score(row, backbone.inputs(row, prompt), prompt)


@pytest.mark.parametrize("change", ["shorter", "longer", "the same length"])
def test_a_twin_of_another_length_has_the_prompt_where_it_says(change):
    """Behind the words and "It was": each stream is scored as a plain pass scores it, also where rows follow."""
    backbone, prompt = Backbone(make_model("llama")), make_prompt()
    backbone.serve("soft", SeparateRows(kind="causal", prompt_length=5))
    behind = [[21, 22], [23]]
    examples = [replace(e, context_ids=[*e.context_ids, *behind[0], *behind[1]], prompt_at=len(e.context_ids) + 2,
                        movable=[*e.movable, False, False, False]) for e in make_examples("multi")]  # fmt: skip
    words = {"shorter": [11], "longer": [11, 12, 13] * 5}
    texts = [words.get(change, [(token + 1) % 90 for token in e.context_ids[:-3]]) for e in examples]
    twins = [[*text, *behind[0], *behind[1]] for text in texts]
    places = [len(text) + 2 if change != "the same length" else None for text in texts]
    found = clean_and_twin(backbone, backbone.rows.pack_twins(examples, twins, None, 0, places), prompt)
    for number, (example, twin, text) in enumerate(zip(examples, twins, texts, strict=True)):
        count = len(example.candidate_ids)
        moved = replace(example, context_ids=twin, prompt_at=len(text) + 2)
        for stream, plain in enumerate((example, moved)):
            expected = plain_scores(make_model("llama"), prompt, plain)
            torch.testing.assert_close(found[stream, number, :count], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (None, "has the prompt behind 2 of its 4 tokens, and its twin has 3 tokens; give such a Twin prompt_at, the"),
        (4, r"Row 0: its Twin's prompt_at is 4; expected 0 to 3, its tokens\."),
        (-1, r"Row 0: its Twin's prompt_at is -1; expected 0 to 3"),
    ],
)
def test_a_twin_that_does_not_say_where_the_prompt_is(place, message):
    example = replace(make_examples("single")[0], prompt_at=2)
    rows = SeparateRows(kind="causal", prompt_length=3)
    with pytest.raises(UserError, match=message):
        rows.pack_twins([example], [[5, 6, 7]], None, 0, [place])
    with pytest.raises(UserError, match="stands in front of every row here; give no Twin a prompt_at"):
        TreeRows().pack_twins([example], [[5, 6, 7]], None, 0, [2])


START = [7, 8, 9]
BEGINNINGS = {  # of the first row's twin, whose clean context begins with START
    "another word": [7, 10, 9, 4, 5],
    "a word in front": [3, 7, 8, 9, 4],
    "a word left out": [7, 9, 4, 5],
    "shorter than the start": [7, 8],
    "the start alone": [7, 8, 9],
    "nothing of it": [4, 5],
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_twin_that_begins_otherwise_than_all_rows(name):
    """What all rows begin with is shared only as far as the twins have it, too."""
    examples = with_instruction(make_examples("multi"))
    backbone, prompt = Backbone(make_model("llama")), make_prompt()
    shared = backbone.rows.shared_start(examples)
    assert shared == len(START)
    twins = [BEGINNINGS[name], *([*START, 5, 6] for _ in examples[1:])]
    found = clean_and_twin(backbone, backbone.rows.pack_twins(examples, twins, None, shared), prompt)
    for number, (example, twin) in enumerate(zip(examples, twins, strict=True)):
        count = len(example.candidate_ids)
        for stream, plain in enumerate((example, replace(example, context_ids=twin))):
            expected = reference_scores(make_model("llama"), prompt, plain)
            torch.testing.assert_close(found[stream, number, :count], expected, atol=1e-4, rtol=1e-5)


def test_twins_that_begin_alike_share_the_start():
    """And where a token of it may get a delta, it is no longer shared."""
    examples = with_instruction(make_examples("multi"))
    twins = [[*START, 5, 6] for _ in examples]
    still = [[False] * 5 for _ in examples]
    assert TreeRows().pack_twins(examples, twins, still, 3).shared_ids.tolist() == START
    moves = [[False, True, False, False, False], *still[1:]]
    row = TreeRows().pack_twins(examples, twins, moves, 3)
    assert row.shared_ids.tolist() == START[:1]
    assert int(row.movable.sum()) == 1


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


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("About: <prompt>{body}\nTopic:", "About:"), ("About:<prompt> {body}\nTopic:", "About:"),
        ("About: {body}<prompt>\nTopic:", "About: They won"), ("<prompt>About: {body}\nTopic:", ""),
        ("About: {body}\nTopic:<prompt>", "About: They won\nTopic:"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", ["", "<eos>"])
def test_a_word_behind_the_mark_keeps_its_space_and_stands_behind_the_prompt(tiny_model, text, before, first):
    """first: a special token that the tokenizer puts in front of all; the prompt stands before it only at the start."""
    tokenizer = load_tokenizer(tiny_model)
    if first:
        marks = [(first, tokenizer.eos_token_id)]
        single = f"{first} $A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=marks)
    task = parse_task({**TEMPLATE, "text": text, "truncate": "body"}, "t")
    row = {"body": "They won", "topic": "sport"}
    (example,) = tokenise(task, Split([row], ["here"], ""), tokenizer, 100).examples
    ids, whole = list(example.context_ids), first + text.format(body="They won").replace("<prompt>", "")
    assert tokenizer.decode(ids[: example.prompt_at]) == (first if before else "") + before
    assert tokenizer.decode(ids) == whole


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
