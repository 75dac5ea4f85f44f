"""lora_line.py: peft's LoRA on a study's rows, scored as a prompt is."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.paths import ROOT
from tests.support.zygote import run_script

SCRIPT = ROOT / "scripts" / "bench" / "lora_line.py"
WORDS = {"positive": " good", "negative": " bad"}


@pytest.fixture
def study(tiny_model, tmp_path, write_rows):
    """One task of rows of unequal lengths, two seeds on draws of their own."""
    for split, thing in (("few-13", "film"), ("few-21", "book"), ("dev", "play, long and loud"), ("val", "song")):
        rows = [{"text": f"a {word} {thing}{' indeed' * place}", "label": label}
                for place, (word, label) in enumerate([("fine", "positive"), ("dull", "negative")] * 3)]  # fmt: skip
        write_rows(tmp_path / "data" / "Tone" / f"{split}.jsonl", rows)
    template = {
        "name": "Tone",
        "text": "{text} It was",
        "truncate": "text",
        "label": "label",
        "metrics": ["accuracy"],
        "verbalizers": WORDS,
    }
    (tmp_path / "tone.json").write_text(json.dumps(template), encoding="utf-8")
    value = {
        "settings": {"model": str(tiny_model), "max_steps": 6, "warmup_steps": 5, "batch_size": 4, "precision": "fp32",
                     "prompt_length": 3, "ds_config": str(ROOT / "ds_configs/zero3.json")},
        "seeds": [0, 1], "draws": [13, 21],
        "tasks": {"Tone": {"task": "tone.json", "data_dir": "data", "train_split": "few-{draw}",
                           "select_split": "dev"}},
        "methods": {"plain": {"perturbation": "none"}, "noise": {"perturbation": "gaussian"}},
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(value), encoding="utf-8")
    return tmp_path


def lines(study, *arguments):
    done = run_script(SCRIPT, ["study.json", "--out", "lora.jsonl", *arguments], study)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (study / "lora.jsonl").read_text().splitlines()], done.stdout


def cross_entropy(model, study):
    """Of the selection rows by the model itself, one row at a time and without padding."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in (study / "data" / "Tone" / "dev.jsonl").read_text().splitlines()]
    total = 0.0
    for row in rows:
        context = tokenizer(f"{row['text']} It was")["input_ids"]
        scores = []
        for word in WORDS.values():
            answer = tokenizer(word, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                found = plain(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            scores.append(sum(found[len(context) - 1 + place, token] for place, token in enumerate(answer)))
        total -= torch.stack(scores).log_softmax(-1)[list(WORDS).index(row["label"])].item()
    return total / len(rows)


def test_at_no_rate_its_scores_are_the_models_own(study, tiny_model):
    rows, _ = lines(study, "--lr", 0, "--seeds", 0)
    assert [row["seed"] for row in rows] == [0]
    assert rows[0]["select_cross_entropy"] == pytest.approx(cross_entropy(tiny_model, study), abs=1e-5)


def test_it_trains_and_goes_on_with_what_is_missing(study):
    still = lines(study, "--lr", 0, "--seeds", 0)[0][0]
    rows, said = lines(study, "--lr", 0.05)
    assert [(row["seed"], row["lr"]) for row in rows] == [(0, 0.0), (0, 0.05), (1, 0.05)]
    assert rows[1]["loss"] < still["loss"]
    assert rows[1]["loss"] != rows[2]["loss"], "each seed has rows of its own"
    assert "| Tone | 0.05 | 8 | q_proj v_proj | 2 |" in said
    before = (study / "lora.jsonl").read_text()
    lines(study, "--lr", 0.05)
    assert (study / "lora.jsonl").read_text() == before


def changed(study, **settings):
    """The study's file with these settings, which are few for quick runs."""
    value = json.loads((study / "study.json").read_text())
    value["settings"] |= {"max_steps": 2, **settings}
    (study / "study.json").write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.slow
def test_lines_of_another_study_are_neither_taken_nor_averaged(study, write_rows):
    """Of another number of steps, other reported rows, another template; more seeds on the same draws belong to one."""
    changed(study)
    lines(study, "--seeds", 0)
    changed(study, max_steps=3)
    lines(study, "--seeds", 0)
    write_rows(study / "data" / "Tone" / "val.jsonl", [{"text": "a fine tune", "label": "positive"}] * 2)
    lines(study, "--seeds", 0)
    template = json.loads((study / "tone.json").read_text())
    (study / "tone.json").write_text(json.dumps({**template, "text": "{text} All in all"}), encoding="utf-8")
    rows, said = lines(study)
    assert [row["seed"] for row in rows] == [0, 0, 0, 0, 1]
    assert len({row["run"] for row in rows}) == 5, "each seed has a draw of its own"
    assert [row["study"] for row in rows[:4]] == list(dict.fromkeys(row["study"] for row in rows))
    assert rows[3]["study"] == rows[4]["study"]
    assert [line.split(" | ")[5] for line in said.splitlines() if " | Tone | " in line] == ["1", "1", "1", "2"]


def test_a_line_without_a_hash_is_of_a_study_of_its_own(study):
    changed(study)
    old = {
        "task": "Tone",
        "seed": 0,
        "lr": 0.001,
        "rank": 8,
        "layers": ["q_proj", "v_proj"],
        "select": 0.5,
        "score": 0.5,
    }
    (study / "lora.jsonl").write_text(json.dumps(old) + "\n", encoding="utf-8")
    rows, said = lines(study, "--seeds", 0)
    assert len(rows) == 2
    assert "| - | Tone | 0.001 | 8 | q_proj v_proj | 1 | 0.500 | 0.500 |" in said


def test_no_clipping_is_no_gradient_of_zero(study):
    changed(study, max_grad_norm=0)
    still, trained = lines(study, "--seeds", 0, "--lr", 0)[0][0], lines(study, "--seeds", 0, "--lr", 0.05)[0][1]
    assert trained["loss"] != still["loss"]


@pytest.mark.parametrize(
    ("steps", "what"),
    [(2, "scores of the adapter of step 2 are not finite"), (3, "loss is not finite at step 3")],
)
def test_what_is_not_finite_is_no_score(study, steps, what):
    changed(study, max_steps=steps, warmup_steps=0)
    done = run_script(SCRIPT, ["study.json", "--out", "lora.jsonl", "--lr", "3e37"], study)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
    assert f"LoRA on Tone, seed 0: the {what}; lower --lr." in done.stderr
    assert not (study / "lora.jsonl").exists()
