"""ptp_loss: the packed step's loss and gradients, by padded passes over a peft model; every kind of model, adapter."""

import dataclasses

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import ptp_ds.trainer
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.packing.row import pack
from ptp_ds.perturb import Noise
from ptp_ds.trainer import PTPSettings
from ptp_ds.trainer.deltas import batch_places, climbed_delta, masked_ids
from ptp_ds.training.step import ptp_loss as packed_loss
from ptp_ds.training.step import settings_of
from tests.support.own_loop import ptp_loss
from tests.support.packed import make_prompt
from tests.support.reference import VOCABULARY, make_examples, make_model
from tests.support.seq2seq import SEQ2SEQ

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's calls of transformers
STEP, SEED = 4, 3


def soft(model, prompt):
    """The model behind a prompt, by peft."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt.shape[0])
    found = peft.get_peft_model(model, config)
    with torch.no_grad():
        found.prompt_encoder["default"].embedding.weight.copy_(prompt)
    return found.eval()


def batch_of(examples):
    """(a padded batch, the rows' candidates [B, C], which tokens may move [B, T]): the gold answer behind each row."""
    longest = max(len(example.context_ids) for example in examples) + 1
    batch = {name: torch.zeros(len(examples), longest, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(examples), longest), -100)
    movable = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        answer, length = example.candidate_ids[example.gold][0], len(example.context_ids)
        batch["input_ids"][row, : length + 1] = torch.tensor([*example.context_ids, answer])
        batch["attention_mask"][row, : length + 1] = 1
        batch["labels"][row, length] = answer
        movable[row, :length] = torch.tensor(example.movable)
    return batch, torch.tensor([[ids[0] for ids in example.candidate_ids] for example in examples]), movable


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    ("perturbation", "more"),
    [
        ("none", {}), ("gaussian", {"sigma": 0.5}), ("uniform", {"sigma": 0.5, "divergence": "js"}),
        ("gaussian", {"divergence_gradient": "both", "divergence": "sym_kl", "reg_weight": 0.7}),
        ("pgd", {"epsilon": 0.5}), ("pgd", {"epsilon": 0.5, "norm": "linf", "units": "l2", "divergence": "ce"}),
        ("pgd", {"epsilon": 0.3, "norm": "token_l2", "ascent_steps": 3, "reg_warmup_steps": 9}),
        ("gaussian", {"sigma": 0.5, "min_confidence": 0.51}),
        ("gaussian", {"sigma": 0.5, "min_confidence": 0.5, "confidence_in": "label"}),
    ],
)  # fmt: skip
def test_the_packed_steps_loss_and_gradient(family, perturbation, more):
    """Packed rows against peft's padded batch: same noise, same starts, same ascents."""
    examples = make_examples("single")
    prompt = make_prompt().requires_grad_()
    backbone, row = Backbone(make_model(family)), pack(examples)
    run = RunConfig(perturbation=perturbation, seed=SEED, **more)
    settings = PTPSettings(perturbation=perturbation, seed=SEED, **more)
    unit = {"relative": backbone.mean_embedding_norm(), "l2": 1.0}[run.units]
    ours = packed_loss(prompt, backbone, row, run, settings_of(run, unit), Noise(SEED, STEP))
    ours.total.backward()
    model = soft(make_model(family), prompt.detach())
    batch, answer_ids, movable = batch_of(examples)
    theirs = ptp_loss(model, batch, settings, step=STEP, movable=movable, answer_ids=answer_ids)
    theirs.loss.backward()
    count = len(examples)
    assert float(theirs.loss) == pytest.approx(float(ours.total) / count, rel=1e-5)
    assert float(theirs.cross_entropy) == pytest.approx(float(ours.cross_entropy) / count, rel=1e-5)
    assert float(theirs.divergence) == pytest.approx(float(ours.divergence) / count, rel=1e-4, abs=1e-7)
    assert float(theirs.delta_norm) == pytest.approx(float(ours.delta_norm) / count, rel=1e-5)
    gradient = model.prompt_encoder["default"].embedding.weight.grad
    assert float((gradient - prompt.grad / count).norm() / (prompt.grad / count).norm()) < 1e-4
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "prompt_encoder.default.embedding.weight"
    ]


def test_without_a_perturbation_it_is_the_models_own_loss_of_one_pass():
    model = soft(make_model("llama"), make_prompt())
    batch, _, _ = batch_of(make_examples("single"))
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    for settings in (PTPSettings(perturbation="none"), PTPSettings(reg_weight=0.0), PTPSettings(sigma=0.0)):
        found = ptp_loss(model, batch, settings)
        assert torch.equal(found.loss, model(**batch).loss)
        assert float(found.divergence) == 0
    assert len(passes) == 6


def test_over_the_vocabulary_it_is_the_divergence_of_next_token_predictions():
    """Several labelled tokens a row, by hand from two plain forwards of the peft model."""
    model = soft(make_model("llama"), make_prompt())
    batch, _, movable = batch_of(make_examples("single"))
    batch["labels"][:, 0] = -100
    batch["labels"][1, 5] = batch["input_ids"][1, 5]
    movable[1, 5] = False
    settings = PTPSettings(sigma=0.5, seed=SEED, reg_weight=0.3)
    found = ptp_loss(model, batch, settings, step=STEP, movable=movable)
    embeds = model.get_base_model().get_input_embeddings()(batch["input_ids"])
    unit = float(model.get_base_model().get_input_embeddings().weight.norm(dim=-1).mean())
    from ptp_ds.kernels import noise
    from ptp_ds.seeding import derive_seed

    places = batch_places(movable, torch.arange(5))
    delta = noise("normal", derive_seed(SEED, "noise"), STEP, places, 32, 0.5 * unit / 32**0.5)
    rest = {"attention_mask": batch["attention_mask"]}
    clean = model(input_ids=batch["input_ids"], **rest).logits[:, 5:]
    moved = model(inputs_embeds=embeds + delta.reshape(embeds.shape), **rest).logits[:, 5:]
    rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
    p, q = (part[rows, columns - 1].log_softmax(-1) for part in (clean, moved))
    divergence = (p.exp() * (p - q)).sum() / len(rows)
    cross_entropy = F.cross_entropy(clean[rows, columns - 1], batch["labels"][rows, columns])
    assert len(rows) == 6
    assert float(found.divergence) == pytest.approx(float(divergence), rel=1e-5)
    assert float(found.loss) == pytest.approx(float(cross_entropy + 0.3 * divergence), rel=1e-5)


def test_deltas_stay_in_their_ball_and_off_what_is_fixed():
    examples = make_examples("single")
    batch, _, movable = batch_of(examples)
    places = batch_places(movable, torch.arange(len(examples)))
    for norm in ("frobenius", "token_l2", "linf"):
        settings = PTPSettings(perturbation="pgd", norm=norm, epsilon=0.7, ascent_steps=3)
        seen = []

        def gradient(delta, seen=seen):
            seen.append(delta)
            return torch.randn(delta.shape, generator=torch.Generator().manual_seed(len(seen)))

        delta = climbed_delta(places, 32, 2.0, settings, STEP, gradient).reshape(5, -1, 32)
        assert len(seen) == 3
        assert not delta[~movable].any()
        assert not delta[batch["labels"] != -100].any()
        size = {"frobenius": delta.flatten(1).norm(dim=-1), "token_l2": delta.norm(dim=-1),
                "linf": delta.abs() * 32**0.5}[norm]  # fmt: skip
        assert 1.3 < float(size.max()) <= 1.4


def test_masks_hide_a_share_of_the_movable_tokens_and_no_other():
    movable = torch.ones(2, 40, dtype=torch.bool)
    movable[0, 20:] = False
    movable[1, :37] = False
    ids = torch.arange(80).reshape(2, 40) + 1
    settings = PTPSettings(perturbation="mask", mask_share=0.2, mask_token_id=0)
    hidden = masked_ids(ids, movable, torch.arange(2), settings, STEP) == 0
    assert hidden.sum(-1).tolist() == [4, 1]
    assert not (hidden & ~movable).any()
    none = dataclasses.replace(settings, mask_share=0.0)
    assert torch.equal(masked_ids(ids, movable, torch.arange(2), none, STEP), ids)
    again = masked_ids(ids, movable, torch.arange(2), settings, STEP + 1) == 0
    assert not torch.equal(hidden, again)
    assert torch.equal(
        masked_ids(ids.flip(0), movable.flip(0), torch.tensor([1, 0]), settings, STEP).flip(0) == 0, hidden
    )


def encoder(auto, **more):
    config = AutoConfig.for_model(
        "bert", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, **more,
    )  # fmt: skip
    torch.manual_seed(5)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # far from uniform: a divergence is no rounding
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


ADAPTERS = {
    "soft": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "mlp": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "lora": lambda task: peft.LoraConfig(task_type=task, r=2, target_modules=["query", "q_proj"]),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("perturbation", ["gaussian", "pgd", "mask"])
def test_classifiers_and_causal_models_under_every_adapter(adapter, perturbation):
    """The divergence falls to zero with the perturbation, and all gradient goes to what is trained."""
    settings = PTPSettings(perturbation=perturbation, mask_token_id=4, epsilon=0.5)
    batch, _, movable = batch_of(make_examples("single"))
    classes = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
               "labels": torch.tensor([0, 1, 2, 0, 1])}  # fmt: skip
    for model, given in (
        (
            peft.get_peft_model(
                encoder(AutoModelForSequenceClassification, num_labels=3), ADAPTERS[adapter]("SEQ_CLS")
            ),
            classes,
        ),
        (peft.get_peft_model(make_model("llama"), ADAPTERS[adapter]("CAUSAL_LM")), batch),
    ):
        model.eval()
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        found = ptp_loss(model, given, settings, step=STEP, movable=movable)
        found.loss.backward()
        assert float(found.loss) == pytest.approx(float(found.cross_entropy + found.divergence), rel=1e-6)
        assert float(found.cross_entropy) == pytest.approx(float(model(**given).loss), rel=1e-6)
        assert float(found.divergence) > 1e-9
        trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
        assert all(gradient is not None for _, gradient in trained)
        assert any(float(gradient.abs().max()) > 0 for _, gradient in trained)
        assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("confidence_in", ["likeliest", "label"])
def test_a_classifiers_rows_without_a_class_count_nowhere(confidence_in):
    """The loss is that of a batch without them."""
    model = encoder(AutoModelForSequenceClassification)
    ids, labels = torch.randint(5, VOCABULARY, (4, 6)), torch.tensor([0, -100, 1, -100])
    settings = PTPSettings(sigma=0.5, min_confidence=0.4, confidence_in=confidence_in)
    every = ptp_loss(model, {"input_ids": ids, "labels": labels}, settings)
    some = ptp_loss(model, {"input_ids": ids[::2], "labels": labels[::2]}, settings, numbers=torch.tensor([0, 2]))
    assert float(some.divergence) > 0
    torch.testing.assert_close((every.loss, every.divergence), (some.loss, some.divergence))


def test_a_masked_model_predicts_where_the_answer_stands():
    model = encoder(AutoModelForMaskedLM)
    batch, _, movable = batch_of(make_examples("single"))
    found = ptp_loss(model, batch, PTPSettings(sigma=0.0), movable=movable)
    rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    by_hand = F.cross_entropy(model(**given).logits[rows, columns], batch["labels"][rows, columns])
    assert float(found.loss) == pytest.approx(float(by_hand), rel=1e-6)
    answer_ids = torch.stack([batch["labels"][rows, columns], (batch["labels"][rows, columns] + 1) % VOCABULARY], -1)
    chosen = ptp_loss(model, batch, PTPSettings(sigma=1.0), movable=movable, answer_ids=answer_ids)
    logits = model(**given).logits[rows, columns].gather(1, answer_ids)
    zero = torch.zeros(5, dtype=torch.int64)
    assert float(chosen.cross_entropy) == pytest.approx(float(F.cross_entropy(logits, zero)), rel=1e-5)
    assert float(chosen.divergence) > 0


def test_what_may_move_by_default():
    model = encoder(AutoModelForMaskedLM, sep_token_id=7)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [8, 7, 9, 10]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1] * 4]),
        "labels": torch.tensor([[-100] * 4, [-100, -100, -100, 10]]),
    }  # fmt: skip
    from ptp_ds.trainer.loss import movable_tokens

    assert movable_tokens(model, batch).tolist() == [[True, True, False, False], [True, False, True, False]]


def test_an_accelerate_loop_lowers_the_loss():
    from accelerate import Accelerator

    model = soft(make_model("llama"), make_prompt())
    batch, answer_ids, movable = batch_of(make_examples("single"))
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(12):
        found = ptp_loss(model, batch, PTPSettings(sigma=0.2), step=step, movable=movable, answer_ids=answer_ids)
        accelerator.backward(found.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.cross_entropy))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"perturbation": "free"}, "perturbation is 'free'; a loop of your own takes none, gaussian"),
        ({"perturbation": "mask"}, "mask needs mask_token_id"),
        ({"divergence": "kll"}, "divergence is 'kll'; choose from kl"),
        ({"sigma": -1.0}, "--sigma is -1.0; expected a finite number of 0 or more"),
    ],
)
def test_settings_that_are_wrong(given, said):
    with pytest.raises(UserError, match=said):
        PTPSettings(**given)


def test_presets_are_those_of_the_command():
    found = PTPSettings.preset("ptp-adv", epsilon=0.2)
    assert (found.perturbation, found.epsilon, found.alpha, found.ascent_steps) == ("pgd", 0.2, 0.075, 2)
    with pytest.raises(UserError, match="Unknown preset 'ptp-advv'"):
        PTPSettings.preset("ptp-advv")


def test_what_can_not_be_perturbed_is_told_before_the_first_pass():
    classifier, causal = encoder(AutoModelForSequenceClassification, num_labels=3), make_model("llama")
    ids = torch.randint(5, VOCABULARY, (4, 6))
    tokens = torch.where(torch.arange(6) == 5, ids, -100)
    square = torch.full((4, 1, 6, 6), torch.finfo(torch.float32).min).triu(1)  # what a causal model makes of none
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **SEQ2SEQ["t5"]))
    cases = [
        (t5, {"labels": ids[:, :3]}, r"T5ForConditionalGeneration is an encoder-decoder; train it by `ptp train`"),
        (classifier, {"labels": torch.rand(4, 3)}, r"labels have shape \(4, 3\) and type torch\.float32; expected"),
        (classifier, {"labels": torch.rand(4)}, r"labels have shape \(4,\) and type torch\.float32; expected"),
        (classifier, {"labels": torch.ones(4, 1).long()}, r"labels have shape \(4, 1\) and type torch\.int64"),
        (classifier, {"labels": torch.zeros(4).long(), "input_ids": ids[:, None]}, r"input_ids have shape \(4, 1, 6\)"),
        (causal, {"labels": tokens, "attention_mask": square}, r"attention_mask has shape \(4, 1, 6, 6\); expected"),
        (causal, {"labels": tokens, "attention_mask": {}}, r"attention_mask is of type dict; expected \[B, T\]"),
    ]  # fmt: skip
    for model, given, said in cases:
        model.register_forward_pre_hook(lambda *_: pytest.fail("a pass before it was told"))
        with pytest.raises(UserError, match=said):
            ptp_loss(model, {"input_ids": ids, **given}, PTPSettings())
    masked = {"input_ids": ids, "labels": tokens, "attention_mask": square}
    found = ptp_loss(make_model("llama"), masked, PTPSettings(sigma=0.5), movable=tokens == -100)
    wanted = ptp_loss(make_model("llama"), {"input_ids": ids, "labels": tokens}, PTPSettings(sigma=0.5))
    torch.testing.assert_close((found.loss, found.divergence), (wanted.loss, wanted.divergence))


def test_special_tokens_that_no_configuration_names_are_asked_for():
    """BERT's names padding alone: its [CLS] and [SEP] were perturbed as words are. Trainer's tokenizer names them."""
    model = encoder(AutoModelForSequenceClassification, num_labels=3)
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1])}
    assert model.config.pad_token_id is not None
    settings, words = PTPSettings(sigma=0.5), (ids > 3)
    with pytest.raises(
        UserError, match=r"BertForSequenceClassification names no begin, end or separator token.*all_special"
    ):
        ptp_ds.trainer.ptp_loss(model, batch, settings)
    found = ptp_ds.trainer.ptp_loss(model, batch, settings, special_ids=[0, 2, 3])
    wanted = ptp_ds.trainer.ptp_loss(model, batch, settings, movable=words)
    assert float(found.divergence) > 1e-6
    assert (found.divergence, found.delta_norm) == (wanted.divergence, wanted.delta_norm)
    model.config.sep_token_id = 3  # a configuration that names it is believed, and the ids given come beside it
    both = ptp_ds.trainer.ptp_loss(model, batch, settings, special_ids=[2])
    assert both.divergence == wanted.divergence
    assert ptp_ds.trainer.ptp_loss(model, batch, settings).divergence != wanted.divergence


def test_one_number_a_row_is_no_prediction_to_compare():
    """Of one class a softmax is 1 whatever the model says: the divergence would be 0 without a word."""
    model = encoder(AutoModelForSequenceClassification, num_labels=1)
    batch = {"input_ids": torch.arange(12).reshape(2, 6) + 5, "labels": torch.tensor([0, 1])}
    with pytest.raises(UserError, match="one number a row, no scores of classes"):
        ptp_loss(model, batch, PTPSettings())


def test_batches_that_do_not_fit():
    model = soft(make_model("llama"), make_prompt())
    batch, answer_ids, _ = batch_of(make_examples("single"))
    with pytest.raises(UserError, match="answer_ids must hold every row's labelled token once"):
        ptp_loss(model, batch, PTPSettings(), answer_ids=answer_ids.flip(0))
    with pytest.raises(UserError, match=r"answer_ids is \[1, 2\], of type list; expected a tensor\.$"):
        ptp_loss(model, batch, PTPSettings(), answer_ids=[1, 2])
    with pytest.raises(UserError, match=r"movable is \(True,\), of type tuple; expected a tensor\.$"):
        ptp_loss(model, batch, PTPSettings(), movable=(True,))
    with pytest.raises(UserError, match=r"settings is 'pgd'; expected PTPSettings, as PTPSettings\("):
        ptp_loss(model, batch, "pgd")
    rows, tokens = batch["input_ids"].shape
    more, wanted = torch.cat([answer_ids, answer_ids[:1]]), rf"token ids \[C\], or \[B, C\] with {rows} rows\.$"
    misfits = [
        ("numbers", torch.arange(rows + 1), rf"shape \({rows + 1},\) and type torch\.int64; expected integers \[B\]"),
        ("numbers", torch.rand(rows), r".* and type torch\.float32; expected integers \[B\]"),
        ("movable", torch.ones(tokens).bool(), rf"shape \({tokens},\) .*; expected booleans \[B, T\], \({rows}, "),
        ("answer_ids", more, f"shape .* and type torch.int64; expected {wanted}"),
        ("answer_ids", answer_ids.float(), f"shape .* and type torch.float32; expected {wanted}"),
    ]  # fmt: skip
    for name, given, said in misfits:
        with pytest.raises(UserError, match=f"^{name} has {said}"):
            ptp_loss(model, batch, PTPSettings(), **{name: given})
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(UserError, match="A batch needs labels, a tensor, to have a loss"):
        ptp_loss(model, unlabelled, PTPSettings(perturbation="none"))
    with pytest.raises(UserError, match="A batch needs input_ids and labels to be perturbed"):
        ptp_loss(model, unlabelled, PTPSettings())
    with pytest.raises(UserError, match="num_items_in_batch would scale the model's own loss alone; leave it out"):
        ptp_loss(model, {**batch, "num_items_in_batch": 4}, PTPSettings())
    with pytest.raises(UserError, match=r"Every token of the first batch is an answer.*\(-100 elsewhere\)"):
        ptp_loss(model, {**batch, "labels": batch["input_ids"]}, PTPSettings())
    batch["labels"][0] = -100
    with pytest.raises(UserError, match="every row has one labelled token"):
        ptp_loss(model, batch, PTPSettings(), answer_ids=answer_ids)
