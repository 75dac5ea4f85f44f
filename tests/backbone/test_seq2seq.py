"""Encoder-decoders on the generic path: the prompt before the encoder's tokens, the answers scored by the decoder."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import checked_backbone
from ptp_ds.backbone.padded import PaddedBackbone
from ptp_ds.models.heads import Head
from ptp_ds.packing.layouts import SeparateRows
from ptp_ds.perturb import Noise
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.packed import divergence, make_prompt, symmetric_run
from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.reference import make_examples, relative_error
from tests.support.seq2seq import SEQ2SEQ, make_seq2seq, plain_scores
from tests.support.tiny import demo_texts, make_tokenizer


@pytest.mark.parametrize("perturbation", ["gaussian", "pgd"])
@pytest.mark.parametrize("shape", ["single", "ragged"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_step_gradient(family, shape, perturbation):
    backbone, reason = checked_backbone(Backbone(make_seq2seq(family), head=Head("seq2seq")))
    assert "an encoder-decoder isn't packed" in str(reason)
    assert isinstance(backbone, PaddedBackbone)
    backbone.serve("soft", SeparateRows(kind="seq2seq", prompt_length=5, tail=(1,)), 5)
    examples, prompt = make_examples(shape), make_prompt().requires_grad_()
    run = symmetric_run(perturbation, epsilon=0.5, sigma=0.5)
    settings, row = settings_of(run, backbone.mean_embedding_norm()), backbone.rows.pack(examples)
    loss = ptp_loss(prompt, backbone, row, run, settings, Noise(3, 4), PassOptions(2))
    loss.total.backward()
    model, plain, total = make_seq2seq(family), prompt.detach().clone().requires_grad_(), 0.0
    for example, part in zip(examples, loss.delta.detach().split(row.lengths), strict=True):
        clean = plain_scores(model, plain, example)
        perturbed = plain_scores(model, plain, example, part[5 : 5 + len(example.context_ids)])
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        total = total + 0.7 * divergence("sym_kl", clean, perturbed, example.gold)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, expected) < 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.slow
def test_a_run_and_its_adapter_in_peft(run_train, tmp_path):
    from peft import PeftModel

    from ptp_ds.adapters.read import read_adapter

    tokenizer = make_tokenizer()
    config = AutoConfig.for_model("t5", **{**SEQ2SEQ["t5"], "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    arguments = ["--model", tmp_path / "t5", "--task", "COPA", "--max_steps", "2", "--prompt_length", "4",
                 "--output_dir", tmp_path / "run"]  # fmt: skip
    done = run_train(arguments)
    assert done.returncode != 0
    said = "Model family 't5' can't be packed, so it needs the whole model on each rank: give --ds_config zero2 "
    assert said + "(an encoder-decoder isn't packed)." in done.stderr
    done = run_train([*arguments[:-1], tmp_path / "again", "--ds_config", ROOT / "ds_configs" / "zero2.json"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "generic path" in done.stdout
    assert json.loads((tmp_path / "again" / "result.json").read_text())["eval_examples"] > 0
    command = [sys.executable, str(ROOT / "scripts" / "predict.py"), "--model", str(tmp_path / "t5"), "--adapter",
               str(tmp_path / "again" / "adapter"), "--text", "premise=The ice melted.", "question=cause",
               "choice1=It was warm.", "choice2=I froze it."]  # fmt: skip
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(float(line.split()[1]) for line in done.stdout.splitlines()) == pytest.approx(1, abs=1e-3)
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")
    ids, answer = torch.tensor([[10, 20, 30]]), torch.tensor([[0, 7]])
    prompt = read_adapter(tmp_path / "again" / "adapter")
    with torch.no_grad():
        inputs = torch.cat([prompt, base.get_input_embeddings()(ids[0])])[None]
        wanted = base(inputs_embeds=inputs, decoder_input_ids=answer).logits
        model = PeftModel.from_pretrained(base, tmp_path / "again" / "adapter").eval()
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=answer).logits, wanted)


def test_a_sentencepiece_tokenizer(tmp_path):
    """T5's own kind: contexts keep no end token, answers begin behind them, and rows end with the tokenizer's own."""
    import sentencepiece

    from ptp_ds.models.heads import HeadPlan, rows_for
    from ptp_ds.models.source import load_tokenizer
    from ptp_ds.tasks import load_task
    from ptp_ds.tasks.data import load_split, tail_ids, tokenise

    (tmp_path / "texts.txt").write_text("\n".join(demo_texts()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=500, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    AutoConfig.for_model("t5", **SEQ2SEQ["t5"]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    tokenizer, task = load_tokenizer(tmp_path), load_task("RTE")
    assert tail_ids(tokenizer) == (tokenizer.eos_token_id,) == (1,)
    examples = tokenise(task, load_split(task, "val", None, None), tokenizer, 400).examples
    assert all(1 not in example.context_ids for example in examples)
    assert [tokenizer.decode(ids).strip() for ids in examples[0].candidate_ids] == ["True", "False"]
    assert "Question" in tokenizer.decode(examples[0].context_ids)
    rows = rows_for(HeadPlan("seq2seq"), task, tokenizer, "soft", 5)
    row = rows.pack(examples[:2])
    assert row.token_ids[row.blocks[0].length - 1] == 1
    assert [len(answers) for answers in row.targets] == [2, 2]
