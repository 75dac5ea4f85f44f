"""Adapters in peft's format: round trip, loading by peft, and every way in which one can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptp_ds.adapters.read import read_adapter, read_card
from ptp_ds.adapters.write import write_adapter
from ptp_ds.models.source import load_config

CARD = {"task": {"name": "CB"}, "result": {"metrics": {"accuracy": 0.5}}}


def made_prompt(length: int = 5, width: int = 32) -> torch.Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapter(tmp_path, tiny_model) -> Path:
    """An adapter of 5 tokens for the tiny model."""
    folder = tmp_path / "adapter"
    write_adapter(folder, made_prompt(), str(tiny_model), load_config(tiny_model), CARD)
    return folder


def test_round_trip(adapter):
    assert sorted(file.name for file in adapter.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "ptp_ds.json",
    ]  # fmt: skip
    prompt = read_adapter(adapter, width=32, length=5)
    assert prompt.dtype == torch.float32
    assert torch.equal(prompt, made_prompt())
    assert torch.equal(read_adapter(str(adapter)), prompt)
    assert read_card(adapter) == CARD


def test_bf16_prompts_are_written_and_read_as_fp32(tmp_path, tiny_model):
    half = made_prompt().to(torch.bfloat16)
    write_adapter(tmp_path / "adapter", half, "model", load_config(tiny_model), {})
    assert torch.equal(read_adapter(tmp_path / "adapter"), half.float())


def test_config_names_the_model_and_its_shape(adapter, tiny_model):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (config["num_virtual_tokens"], config["token_dim"]) == (5, 32)
    assert (config["num_attention_heads"], config["num_layers"]) == (4, 2)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_peft_loads_it_and_computes_with_it(adapter, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    assert torch.equal(loaded.get_prompt(1)[0], made_prompt())
    ids = torch.tensor([[10, 20, 30]])
    with torch.no_grad():
        expected = base(inputs_embeds=torch.cat([made_prompt()[None], base.get_input_embeddings()(ids)], 1)).logits
        found = loaded(input_ids=ids).logits
    assert torch.allclose(found[:, -3:], expected[:, -3:], atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_adapters_of_peft_itself_are_read(tmp_path, tiny_model):
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "theirs")
    prompt = read_adapter(tmp_path / "theirs", width=32, length=3)
    assert torch.equal(prompt, model.get_prompt(1)[0].detach())
    assert read_card(tmp_path / "theirs") == {}


def refused(folder: Path, message: str, **needed) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(folder, **needed)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["LORA", "MULTITASK_PROMPT_TUNING", None])
def test_other_peft_types(adapter, kind):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": kind}))
    refused(adapter, f"is of peft type {kind!r}; expected PROMPT_TUNING, P_TUNING, PREFIX_TUNING")


def test_config_that_is_no_object(adapter):
    (adapter / "adapter_config.json").write_text("[]")
    refused(adapter, r"adapter_config\.json: expected a JSON object, found list\.")
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, r"adapter_config\.json: not valid JSON \(")


def test_missing_files(adapter, tmp_path):
    refused(tmp_path / "nowhere", r"no adapter_config\.json there; give a folder written by this project or peft")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(adapter, r"no adapter_model\.safetensors; adapters in pickle files are not loaded")


def test_wrong_shapes(adapter):
    refused(adapter, "has width 32, the model's is 64: another model's adapter", width=64)
    refused(adapter, "has 5 tokens; set --prompt_length 5", length=6)
    rewrite(adapter, prompt_embeddings=torch.zeros(5))
    refused(adapter, r"the prompt has shape \(5,\); expected \[length, width\]")
    rewrite(adapter, prompt_embeddings=torch.zeros(0, 32))
    refused(adapter, r"the prompt has shape \(0, 32\); expected \[length, width\]")


@pytest.mark.parametrize("said", [{"num_virtual_tokens": 4}, {"num_virtual_tokens": "5"}, {"num_virtual_tokens": 2,
                                  "num_transformer_submodules": "x"}])  # fmt: skip
def test_a_prompt_of_another_length_than_its_config_says(adapter, said):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **said}))
    refused(
        adapter, r"the prompt has 5 rows, and adapter_config\.json says num_virtual_tokens .*; expected a row for each"
    )


def test_other_tensors(adapter):
    rewrite(adapter, prompt_embeddings=made_prompt(), extra=torch.zeros(1))
    refused(adapter, "holds .*extra.*; expected prompt_embeddings alone")
    rewrite(adapter, embeddings=made_prompt())
    refused(adapter, "holds embeddings; expected prompt_embeddings alone")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(adapter, value):
    prompt = made_prompt()
    prompt[2, 3] = value
    rewrite(adapter, prompt_embeddings=prompt)
    refused(adapter, "the prompt holds values that are not finite")


@pytest.mark.parametrize("kept", [0, 4, 40, -8])
def test_truncated_file(adapter, kept):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(adapter, r"adapter_model\.safetensors is damaged \(")


def test_an_adapter_may_lack_a_card(adapter):
    (adapter / "ptp_ds.json").unlink()
    assert read_card(adapter) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"ptp_ds\.json: not valid JSON \("),
        ("[]", r"ptp_ds\.json: expected a JSON object, found list\."),
        ('{"head": []}', r"ptp_ds\.json: head is \[\]; expected a JSON object\."),
        ('{"head": {"kind": "tail"}}', "the head is of kind 'tail'; expected causal, masked, classes, seq2seq"),
        ('{"task": {"answers": 3}}', "the task's answers are 3; expected a JSON object"),
    ],
)
def test_damaged_cards_are_refused(adapter, content, message):
    (adapter / "ptp_ds.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_card(adapter)


@pytest.mark.parametrize("untrained", [{"accuracy": 0.25}, {"metrics": {"accuracy": 0.25}, "cross_entropy": 1.0}])
def test_the_model_card_tells_scores_settings_and_versions(untrained):
    """untrained: as result.json has it, and as it had it before 2026-11-27."""
    from ptp_ds.adapters.card import model_card

    card = {
        "task": {"name": "CB", "text": "{premise}\nAnswer:"}, "versions": {"torch": "2.13.0", "gguf": None},
        "result": {"metrics": {"accuracy": 0.75}, "untrained": untrained,
                   "majority": 0.5, "eval_split": "val", "eval_examples": 56, "seed": 3,
                   "perturbation": "pgd"},
    }  # fmt: skip
    text = model_card("some/model", card)
    assert text.startswith("---\nbase_model: some/model\nlibrary_name: peft\n")
    for part in ("# A prompt for CB", "| metric, val (56 rows) | score |", "| accuracy | 0.7500 |",
                 "| accuracy of the untrained prompt | 0.2500 |",
                 "| accuracy of the majority class | 0.5000 |", "One run: perturbation pgd, seed 3.",
                 "    {premise}\n    Answer:", "Versions: torch 2.13.0."):  # fmt: skip
        assert part in text
    assert "gguf" not in text
    assert "None" not in model_card("some/model", {})
