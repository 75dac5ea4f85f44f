"""PTPTrainer: ptp_loss within transformers' own loop, accumulated, resumed, evaluated plainly; the page's examples."""

import re
import subprocess
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from ptp_ds.errors import UserError
from ptp_ds.trainer import PTPMixin, PTPSettings, PTPTrainer, ptp_loss
from ptp_ds.trainer import loss as loss_module
from ptp_ds.trainer.loss import Answers
from ptp_ds.trainer.trainer import Dealt
from tests.support.paths import ROOT
from tests.support.processes import worker_environment
from tests.support.seq2seq import make_seq2seq

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and transformers'


@pytest.fixture
def rows(tokenizer):
    """Twelve rows of uneven length, the answer's token labelled."""
    found = []
    for number in range(12):
        context = tokenizer(f"Row {number} is {'fine and good' if number % 2 else 'poor'}. It was")["input_ids"]
        answer = tokenizer(" good" if number % 2 else " bad")["input_ids"][:1]
        found.append({"input_ids": [*context, *answer], "labels": [-100] * len(context) + answer})
    return found


def model_of(folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(model, config)


def trainer_of(kind, model, rows, tokenizer, folder, ptp=None, data_collator=None, **more):
    """On a CPU, no shuffling that differs from batch size to batch size."""
    tokenizer.pad_token = tokenizer.eos_token
    given = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.05, "logging_steps": 1,
             "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
             "train_sampling_strategy": "sequential", "label_names": ["labels"]} | more  # fmt: skip
    extra = {} if ptp is None else {"ptp": ptp}
    return kind(
        model=model, args=TrainingArguments(str(folder), **given), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, **extra,
        data_collator=data_collator or DataCollatorForTokenClassification(tokenizer),
    )  # fmt: skip


def classifier_of(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)
    )


def prompt_of(model):
    return model.prompt_encoder["default"].embedding.weight.detach().clone()


def test_a_perturbations_name_is_no_settings(lively_model, rows, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"ptp is 'gaussian'; expected PTPSettings, as PTPSettings\(perturbation="):
        trainer_of(PTPTrainer, model_of(lively_model), rows, tokenizer, tmp_path, "gaussian")


def test_the_first_steps_gradient_is_ptp_losss(lively_model, rows, tokenizer, tmp_path):
    ptp = PTPSettings(perturbation="pgd", epsilon=0.5, seed=3)
    model, other = model_of(lively_model), model_of(lively_model)
    assert torch.equal(prompt_of(model), prompt_of(other))
    trainer = trainer_of(PTPTrainer, model, rows, tokenizer, tmp_path, ptp, max_steps=1)
    seen = []
    trainer.accelerator.clip_grad_norm_ = lambda parameters, norm: seen.extend(
        p.grad.clone() for p in parameters if p.requires_grad
    )
    trainer.train()
    batch = trainer.data_collator(rows[:4])
    special = set(tokenizer.all_special_ids)
    movable = batch["attention_mask"].bool() & (batch["labels"] == -100)
    movable &= torch.tensor([[int(i) not in special for i in row] for row in batch["input_ids"]])
    found = ptp_loss(other.train(), batch, ptp, step=0, movable=movable)
    found.loss.backward()
    torch.testing.assert_close(seen[0], other.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-6)
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(float(found.loss), abs=1e-4)  # the Trainer rounds
    assert line["divergence"] == pytest.approx(float(found.divergence), rel=1e-4)
    assert line["delta_norm"] == pytest.approx(float(found.delta_norm), rel=1e-5)


@pytest.mark.parametrize("perturbation", ["gaussian", "pgd", "mask"])
def test_accumulated_batches_give_one_batchs_gradient(lively_model, rows, tokenizer, tmp_path, perturbation):
    """Rows of one step get noise of their own, the same from one batch of four as from four micro-batches."""
    ptp = PTPSettings(perturbation=perturbation, epsilon=0.5, mask_token_id=5)
    equal = [max(rows, key=lambda row: len(row["input_ids"]))] * 4  # one length: noise is drawn by a token's place
    found = {}
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        model = model_of(lively_model)
        trainer = trainer_of(PTPTrainer, model, equal, tokenizer, tmp_path / str(size), ptp, max_steps=1,
                             per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_grad_norm=0.0,
                             optim="sgd", lr_scheduler_type="constant")  # fmt: skip
        start = prompt_of(model)
        trainer.train()
        found[size] = prompt_of(model) - start
    assert float(found[4].norm()) > 0
    torch.testing.assert_close(found[2], found[4], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[1], found[4], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("causal", 1), ("causal", 4), ("classifier", 1), ("classifier", 2), ("classifier", 4), ("uneven classifier", 2)],
)
def test_the_divergence_is_scaled_as_the_models_loss(lively_model, rows, tokenizer, tmp_path, kind, parts):
    """With the perturbed cross-entropy at a delta of almost nothing, the loss is twice the Trainer's own. BERT's
    classifier takes the step's number of answers and leaves it unused: its losses are summed over micro-batches.
    """
    if kind != "causal":
        rows = [{"input_ids": row["input_ids"][:6], "labels": number % 2} for number, row in enumerate(rows)]
    if kind == "uneven classifier":
        rows[1]["labels"] = rows[2]["labels"] = -100
    found = []
    for trainer_kind, ptp in ((Trainer, None), (PTPTrainer, PTPSettings(divergence="ce", sigma=1e-6))):
        model = model_of(lively_model) if kind == "causal" else classifier_of(tokenizer)
        collator = {} if kind == "causal" else {"data_collator": default_data_collator}
        trainer = trainer_of(trainer_kind, model, rows, tokenizer, tmp_path / trainer_kind.__name__, ptp, max_steps=1,
                             per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts,
                             learning_rate=0.0, **collator)  # fmt: skip
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[0] > 0.1
    assert found[1] == pytest.approx(2 * found[0], rel=1e-3)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("counts_items", [True, False])
def test_the_divergence_is_scaled_as_the_losses_of_several_devices(across, counts_items):
    """DataParallel: a loss for each of two devices, whose mean goes backward; the step has two micro-batches."""
    logits, gold = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    each = torch.nn.functional.cross_entropy(logits, gold, reduction="none").view(2, 4)
    items = torch.tensor(16 if across else 16 // 2).unsqueeze(0).expand(2, -1)  # as _get_num_items_in_batch has it
    losses = each.sum(1) / items[:, 0] if counts_items else each.mean(1)
    losses = losses * (2 if across else 1)  # as compute_loss has it
    trainer = PTPMixin.__new__(PTPMixin)
    trainer.model_accepts_loss_kwargs, trainer.compute_loss_func, trainer.label_smoother = True, None, None
    trainer.args = SimpleNamespace(n_gpu=2, average_tokens_across_devices=across)
    scale = trainer._scale(Answers(torch.arange(8), None, gold), logits, losses, items)
    torch.testing.assert_close(each.sum() * scale, losses.mean())


def test_a_micro_batch_without_answers_is_told_as_zero(lively_model, rows, tokenizer, tmp_path):
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    trainer = trainer_of(PTPTrainer, model_of(lively_model), rows, tokenizer, tmp_path, PTPSettings(), max_steps=1,
                         per_device_train_batch_size=1, gradient_accumulation_steps=2)  # fmt: skip
    trainer.train()
    line = trainer.state.log_history[0]
    assert 0 < line["divergence"] < 10
    assert 0 < line["loss"] < 20


def test_the_rows_of_a_step_have_noise_of_their_own(lively_model, rows, tokenizer, tmp_path, monkeypatch):
    """Seven equal rows by two, in steps of two micro-batches: no delta comes twice in a run, and a second run draws
    the same ones.
    """
    deltas = []
    moved_pass = loss_module.moved_pass
    monkeypatch.setattr(loss_module, "moved_pass", lambda *given: deltas.append(given[2]) or moved_pass(*given))
    trainer = trainer_of(PTPTrainer, model_of(lively_model), [rows[0]] * 7, tokenizer, tmp_path, PTPSettings(),
                         per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3)  # fmt: skip
    trainer.train()
    first = [row.clone() for delta in deltas for row in delta]
    assert [delta.shape[0] for delta in deltas] == [2, 2, 2, 1, 2, 2]
    assert all(not torch.equal(one, other) for n, one in enumerate(first) for other in first[:n])
    deltas.clear()
    trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(first, [r for d in deltas for r in d], strict=True))


def test_the_ranks_of_a_step_number_their_rows_apart():
    """Two ranks, three micro-batches of at most four rows; the last ones are smaller."""
    numbers = []
    for rank in range(2):
        trainer = PTPMixin.__new__(PTPMixin)
        trainer._dealt, trainer.args = Dealt(), SimpleNamespace(train_batch_size=4)
        trainer.accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        trainer.state = SimpleNamespace(global_step=0)
        numbers.append([trainer._numbers(size).tolist() for size in (4, 4, 3 - rank)])
        trainer.state.global_step = 1
        assert trainer._numbers(4).tolist() == numbers[rank][0]
    assert numbers == [[[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18]], [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21]]]


def test_it_trains_logs_and_evaluates_plainly(lively_model, rows, tokenizer, tmp_path):
    model = model_of(lively_model)
    trainer = trainer_of(PTPTrainer, model, rows, tokenizer, tmp_path, PTPSettings(sigma=0.2), max_steps=15,
                         learning_rate=0.2)  # fmt: skip
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 15
    assert all(line["divergence"] > 0 and line["delta_norm"] > 0 for line in lines)
    assert sum(line["loss"] for line in lines[-3:]) < 0.8 * sum(line["loss"] for line in lines[:3])
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    plain = trainer_of(Trainer, model, rows, tokenizer, tmp_path / "plain")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def test_without_a_perturbation_it_is_the_trainer_bit_for_bit(lively_model, rows, tokenizer, tmp_path):
    found = []
    for kind, ptp in ((Trainer, None), (PTPTrainer, PTPSettings(perturbation="none"))):
        model = model_of(lively_model)
        trainer_of(kind, model, rows, tokenizer, tmp_path / kind.__name__, ptp).train()
        found.append(prompt_of(model))
    assert torch.equal(*found)


def test_a_resumed_run_is_the_uninterrupted_one(lively_model, rows, tokenizer, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    ptp = PTPSettings(sigma=0.3)
    model = model_of(lively_model)
    trainer_of(PTPTrainer, model, rows, tokenizer, tmp_path, ptp, **more).train()
    again = model_of(lively_model)
    trainer_of(PTPTrainer, again, rows, tokenizer, tmp_path, ptp, **more).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    torch.testing.assert_close(prompt_of(again), prompt_of(model), rtol=1e-6, atol=1e-7)


def test_label_smoothing_stays_the_trainers(lively_model, rows, tokenizer, tmp_path):
    """The clean part is the base class's, whatever it computes; under LoRA, since it can't smooth behind a prompt."""
    found = []
    for kind, ptp in ((Trainer, None), (PTPTrainer, PTPSettings(sigma=1e-4))):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(lively_model), config)
        trainer = trainer_of(kind, model, rows, tokenizer, tmp_path / kind.__name__, ptp, label_smoothing_factor=0.3)
        trainer.train()
        found.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_what_it_cannot_train_is_one_sentence(lively_model, rows, tokenizer, tmp_path):
    every = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    trainer = trainer_of(PTPTrainer, model_of(lively_model), every, tokenizer, tmp_path, PTPSettings())
    with pytest.raises(UserError, match="Every token of the first batch is an answer"):
        trainer.train()
    pairs = [{"input_ids": row["input_ids"][:6], "labels": row["input_ids"][:3]} for row in rows]
    t5 = make_seq2seq("t5").requires_grad_()
    trainer = trainer_of(PTPTrainer, t5, pairs, tokenizer, tmp_path, PTPSettings(), default_data_collator)
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder"):
        trainer.train()


def test_trls_trainer_takes_the_mixin(lively_model, rows, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")

    class PTPSFTTrainer(PTPMixin, trl.SFTTrainer):
        pass

    import datasets

    args = trl.SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                         bf16=False, logging_steps=1, save_strategy="no", completion_only_loss=True)  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": f"Row {n} was", "completion": " good"} for n in range(8)])
    trainer = PTPSFTTrainer(model=model_of(lively_model), args=args, train_dataset=data, processing_class=tokenizer,
                            ptp=PTPSettings(sigma=0.3))  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] > 0


@pytest.mark.slow
def test_the_pages_examples_run_as_printed(tmp_path):
    text = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], env=worker_environment(), cwd=tmp_path,
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
