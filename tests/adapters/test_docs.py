"""docs/sharing.md and docs/serving.md: their commands parse, and what a server is sent is what generates here."""

import base64
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

from ptp_ds.adapters.generate import generate
from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.predict import _parse as predict
from ptp_ds.config.flags import parse_run
from ptp_ds.config.parsers import evaluate_parser, push_parser
from ptp_ds.models.source import load_config
from tests.support.paths import ROOT

PARSERS = {
    "train": parse_run, "push": lambda argv: push_parser("").parse_args(argv),
    "predict": lambda argv: predict(argv, ""), "evaluate": lambda argv: evaluate_parser().parse_args(argv),
}  # fmt: skip


def commands() -> list[tuple[str, str]]:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("sharing.md", "serving.md"))
    return re.findall(r"^    ptp (\w+) (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "flags"), commands())
def test_every_command_parses(name, flags, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    PARSERS[name](shlex.split(flags))


def test_there_are_commands():
    assert {name for name, _ in commands()} == set(PARSERS)


def test_what_a_server_is_sent_continues_as_here(tiny_model, tmp_path, tokenizer, monkeypatch):
    """serving.md's client up to the request, then transformers' own generate on the tensor that it would send."""
    from transformers import AutoModelForCausalLM

    prompt = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "runs" / "cb" / "adapter", prompt, str(tiny_model), load_config(tiny_model), {})
    (code,) = re.findall(
        r"\n\n(    import base64\n.*?)\n\n    client =", Path(ROOT / "docs/serving.md").read_text(), re.S
    )
    code = re.sub(r"^    ", "", code, flags=re.MULTILINE).replace("from openai import OpenAI\n", "")
    code = re.sub(r'MODEL = ".*"', f"MODEL = {str(tiny_model)!r}", code)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    sent = torch.load(io.BytesIO(base64.b64decode(names["embeds"])), weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    ids = tokenizer(names["text"])["input_ids"]
    assert sent.shape == (5 + len(ids), 32)
    theirs = model.generate(
        inputs_embeds=sent[None], attention_mask=torch.ones(1, sent.shape[0]), max_new_tokens=8, min_new_tokens=8,
        do_sample=False,
    )  # fmt: skip
    assert theirs[0].tolist() == generate(model, prompt, "soft", ids, 8)
