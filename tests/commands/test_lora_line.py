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
        "settings": {"model": str(tiny_model), "max_steps": 6, "batch_size": 4, "precision": "fp32",
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
