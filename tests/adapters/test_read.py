"""Adapters that peft trains through an encoder: P_TUNING (MLP, LSTM) and PREFIX_TUNING with prefix_projection."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ptp_ds.adapters.read import adapter_kind, read_adapter
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.models.source import load_config
from ptp_ds.prompts import prompt_width
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import score_examples
from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.reference import make_examples
from tests.support.runs import QUICK, adapter, check

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ENCODERS = ("MLP", "LSTM", "prefix")


def adapter_of_peft(tiny_model: Path, encoder: str, folder: Path) -> Any:
    """A fresh adapter of 5 tokens, saved in `folder`, and its model; the encoder's weights are far from zero."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    common = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 5, "encoder_hidden_size": 24}
    torch.manual_seed(5)
    if encoder == "prefix":
        config = PrefixTuningConfig(**common, prefix_projection=True)
    else:
        config = PromptEncoderConfig(**common, encoder_reparameterization_type=encoder)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    return model


def scores_of_peft(model: Any, example: Example) -> torch.Tensor:
    """[C] log-probabilities, an ordinary forward a candidate."""
    scores = []
    for answer in example.candidate_ids:
        ids = torch.tensor([[*example.context_ids, *answer]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        first = log_probs.shape[0] - len(answer) - 1
        scores.append(torch.stack([log_probs[first + place, token] for place, token in enumerate(answer)]).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_our_scores_are_pefts(tiny_model, tmp_path, encoder):
    """The trained model's, with its encoder, and those of the adapter that peft loads again."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind = "deep" if encoder == "prefix" else "soft"
    trained = adapter_of_peft(tiny_model, encoder, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config["peft_type"] == ("PREFIX_TUNING" if kind == "deep" else "P_TUNING")
    assert adapter_kind(tmp_path / "theirs") == kind
    prompt = read_adapter(tmp_path / "theirs", prompt_width(kind, load_config(tiny_model)), 5, kind)
    assert torch.equal(prompt, trained.get_prompt_embedding_to_save("default"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "theirs").eval()
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(tiny_model), prompt=kind)
    examples = make_examples("multi")
    ours = score_examples(backbone, prompt, examples, Ranks(0, 1, 0, torch.device("cpu")), 4096)
    for model in (trained, loaded):
        theirs = torch.stack([scores_of_peft(model, example) for example in examples])
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    without = score_examples(backbone, 0.1 * prompt, examples, Ranks(0, 1, 0, torch.device("cpu")), 4096)
    assert float((without - ours).abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["MLP", "prefix"])
def test_they_start_a_run_and_are_evaluated(run_train, tiny_model, tmp_path, encoder):
    kind = "deep" if encoder == "prefix" else "soft"
    adapter_of_peft(tiny_model, encoder, tmp_path / "theirs")
    start = ["--prompt", kind, "--prompt_init", "adapter", "--init_adapter", tmp_path / "theirs"]
    args = [*QUICK, "--model", tiny_model, *start, "--max_steps", "1", "--lr", "1e-12"]
    check(run_train([*args, "--output_dir", tmp_path / "run"]))
    torch.testing.assert_close(adapter(tmp_path / "run"), read_adapter(tmp_path / "theirs"), atol=1e-6, rtol=1e-6)
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--adapter", str(tmp_path / "theirs"), "--model",
               str(tiny_model), "--task", "COPA", "--json", str(tmp_path / "scores.json")]  # fmt: skip
    check(subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120, check=False))
    report = json.loads((tmp_path / "scores.json").read_text())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert report["metrics"] == result["metrics"]
    assert report["cross_entropy"] == pytest.approx(result["eval_cross_entropy"], abs=1e-6)


@pytest.mark.parametrize("encoder", ["none", "MLP"])
def test_a_prompt_that_peft_made_for_an_encoder_and_decoder(tmp_path, encoder):
    """peft saves it twice, and its own forward takes the first half alone."""
    from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(5)
    base = T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)).eval()
    common = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4}
    config = (
        PromptTuningConfig(**common) if encoder == "none" else PromptEncoderConfig(**common, encoder_hidden_size=16)
    )
    get_peft_model(base, config).save_pretrained(tmp_path)
    prompt = read_adapter(tmp_path, 32, 4, "soft")
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    ids, answer = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 8]])
    with torch.no_grad():
        theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=answer).logits
        inputs = torch.cat([prompt[None], base.get_input_embeddings()(ids)], 1)
        ours = base(inputs_embeds=inputs, decoder_input_ids=answer).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
