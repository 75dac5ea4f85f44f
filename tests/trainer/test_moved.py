"""The perturbed pass enters by token ids: padding, positions and pooling are the clean pass's, and gradient reaches all
that is trained; also in a compiled model, under checkpointing and split over devices.
"""

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ptp_ds.errors import UserError
from ptp_ds.kernels import noise
from ptp_ds.seeding import derive_seed
from ptp_ds.trainer import PTPSettings
from ptp_ds.trainer import moved as module
from ptp_ds.trainer.deltas import batch_places
from ptp_ds.trainer.loss import base_of
from tests.support.own_loop import ptp_loss
from tests.support.reference import FAMILIES, VOCABULARY, make_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's calls of transformers
LENGTHS, PAD, WIDTH, STEP = (9, 5, 7), 1, 32, 4
LORA = {"r": 2, "init_lora_weights": False}


def classifier(family):
    """A decoder or encoder that classifies rows, far from uniform."""
    shape = {**FAMILIES["llama"], "num_key_value_heads": 4} | {"max_position_embeddings": 64, "pad_token_id": PAD}
    config = AutoConfig.for_model(family, **shape, num_labels=3)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


def causal():
    return make_model("llama").requires_grad_(True)


def batch_of(side, classes):
    """Three rows of uneven length, padded on a side; the answer is a class, or the row's last token."""
    longest, generator = max(LENGTHS), torch.Generator().manual_seed(3)
    batch = {"input_ids": torch.full((3, longest), PAD), "attention_mask": torch.zeros(3, longest, dtype=torch.int64)}
    tokens = torch.full((3, longest), -100)
    for row, length in enumerate(LENGTHS):
        first = longest - length if side == "left" else 0
        batch["input_ids"][row, first : first + length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        batch["attention_mask"][row, first : first + length] = 1
        tokens[row, first + length - 1] = batch["input_ids"][row, first + length - 1]
    return {**batch, "labels": torch.tensor([0, 2, 1]) if classes else tokens}


def delta_of(model, batch, sigma):
    """[B, T, H] the noise that ptp_loss draws for the batch, by the kernel that packed rows use."""
    movable = batch["attention_mask"].bool()
    if batch["labels"].dim() == 2:
        movable = movable & (batch["labels"] == -100)
    size = sigma * float(base_of(model).get_input_embeddings()(torch.arange(VOCABULARY)).norm(dim=-1).mean())
    places = batch_places(movable, torch.arange(3))
    drawn = noise("normal", derive_seed(0, "noise"), STEP, places, WIDTH, size / WIDTH**0.5)
    return drawn.reshape(3, -1, WIDTH)


def kl(clean, moved):
    """Mean over rows of KL from the clean to the moved prediction."""
    p, q = clean.log_softmax(-1), moved.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def by_embeddings(model, batch, embeds):
    """Logits by `inputs_embeds`, told what a model can't see in them: a decoder takes each row alone, without padding;
    RoBERTa is given its positions.
    """
    real = batch["attention_mask"].bool()
    if model.config.model_type in ("llama", "qwen3"):
        return torch.cat([model(inputs_embeds=embeds[row][real[row]][None]).logits for row in range(3)])
    positions = torch.where(real, real.cumsum(-1) + PAD, PAD) if model.config.model_type == "roberta" else None
    return model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "roberta", "bert"])
def test_a_padded_classifier_is_moved_where_the_clean_pass_reads(family, side):
    model, batch = classifier(family), batch_of(side, classes=True)
    found = ptp_loss(model, batch, PTPSettings(sigma=0.5), step=STEP)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    clean = by_embeddings(model, batch, embeds)
    torch.testing.assert_close(found.outputs.logits, clean, rtol=1e-4, atol=1e-5)
    divergence = kl(clean, by_embeddings(model, batch, embeds + delta_of(model, batch, 0.5)))
    assert float(found.divergence) == pytest.approx(float(divergence), rel=1e-4)
    assert float(found.divergence) > 1e-3
    assert abs(float(ptp_loss(model, batch, PTPSettings(sigma=1e-6), step=STEP).divergence)) < 1e-6


TRAINED = {
    "everything": lambda: causal(),
    "LoRA's share of the embedding": lambda: peft.get_peft_model(
        causal(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "v_proj"], **LORA)
    ),
    "a copy of the embedding": lambda: peft.get_peft_model(
        causal(),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], modules_to_save=["embed_tokens"], **LORA),
    ),
}


@pytest.mark.parametrize("trained", TRAINED)
def test_the_divergences_gradient_reaches_a_trained_embedding(trained):
    """By hand: embeddings plus delta, nothing detached but the clean prediction."""
    model, batch = TRAINED[trained]().eval(), batch_of("right", classes=False)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = ptp_loss(model, batch, PTPSettings(sigma=0.5), step=STEP)
    ours = torch.autograd.grad(found.loss, parameters, allow_unused=True)
    outputs = model(**batch)
    rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
    embeds = base_of(model).get_input_embeddings()(batch["input_ids"]) + delta_of(model, batch, 0.5)
    moved = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    divergence = kl(outputs.logits[rows, columns - 1].detach(), moved[rows, columns - 1])
    wanted = torch.autograd.grad(outputs.loss + divergence, parameters, retain_graph=True, allow_unused=True)
    share = torch.autograd.grad(divergence, parameters, allow_unused=True)
    at = [number for number, name in enumerate(names) if "embed_tokens" in name]
    assert at
    assert all(float(share[number].norm()) > 1e-3 for number in at)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def lora(family="causal"):
    model = causal() if family == "causal" else classifier(family)
    task = "CAUSAL_LM" if family == "causal" else "SEQ_CLS"
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules=["v_proj"], **LORA)).train()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant):
    batch, found = batch_of("right", classes=False), []
    for checkpointing in (False, True):
        model = lora()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ptp_loss(model, batch, PTPSettings(sigma=0.5, reg_weight=5.0), step=STEP).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    plain = lora()
    plain(**batch).loss.backward()
    for one, other, clean in zip(*found, [p.grad for p in plain.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert float((one - clean).norm()) > 0.01 * float(clean.norm())


def test_pgd_under_reentrant_checkpointing_is_one_sentence():
    model = lora()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UserError, match=r"reentrant gradient checkpointing can't give; set .*'use_reentrant': False"):
        ptp_loss(model, batch_of("right", classes=False), PTPSettings(perturbation="pgd"))


@pytest.mark.slow
@pytest.mark.parametrize("ran", ["not yet", "compiled before"])
@pytest.mark.parametrize("perturbation", ["gaussian", "pgd"])
def test_a_compiled_model_is_moved_too(perturbation, ran):
    """Three steps, against the same model uncompiled; one that was compiled without the hook is compiled again."""
    torch.compiler.reset()
    settings, batch = PTPSettings(perturbation=perturbation, sigma=0.5, epsilon=0.5), batch_of("right", classes=True)
    plain, model = lora("llama"), lora("llama")
    compiled = torch.compile(model, backend="aot_eager")
    if ran == "compiled before":
        compiled(**batch)
    for step in range(3):
        losses = [ptp_loss(one, batch, settings, step=step) for one in (plain, compiled)]
        for one in losses:
            one.loss.backward()
        assert float(losses[1].divergence) == pytest.approx(float(losses[0].divergence), rel=1e-4)
        assert float(losses[0].divergence) > 1e-4
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


FAMILY = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "ctrl": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64, "dff": 64},
    "xlnet": {"d_model": WIDTH, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "longformer": {"attention_window": 8},
    "big_bird": {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
}
ENCODER = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TOKENS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": PAD}


def model_of(family):
    """A model that looks up more than its input_ids, or turns them: a language model or a classifier."""
    shape = {**ENCODER, "max_position_embeddings": 128} if family in ("longformer", "big_bird") else {}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, num_labels=3, **TOKENS, **shape, **FAMILY[family])
    kind = AutoModelForCausalLM if family in ("gpt2", "ctrl") else AutoModelForSequenceClassification
    torch.manual_seed(5)
    return kind.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("family", ["gpt2", "ctrl"])
def test_token_types_are_looked_up_and_not_moved(family, rows):
    """CTRL looks its types up before its ids. Some tokens are their own type's id, and some another's across."""
    model = model_of(family)
    ids, types = torch.randint(0, 6, (rows, 9)), torch.arange(9).gt(4).long().expand(rows, 9)
    assert bool((ids == types).any())
    delta, embedding = torch.randn(rows, 9, WIDTH), model.get_input_embeddings()
    found = module.moved_pass(model, embedding, delta, {"input_ids": ids, "token_type_ids": types}).logits
    wanted = model(inputs_embeds=embedding(ids) + delta, token_type_ids=types).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float((found - model(input_ids=ids, token_type_ids=types).logits).abs().max()) > 1e-2


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_model_that_turns_its_ids_is_moved_in_their_places(tokens):
    """XLNet embeds [T, B]; three tokens are as many as rows, and two of them occur in each other's places."""
    model = model_of("xlnet")
    ids = torch.randint(5, VOCABULARY, (3, tokens))
    if tokens == 3:
        ids[0, 1] = ids[1, 0]
    delta, embedding = torch.randn(3, tokens, WIDTH), model.get_input_embeddings()
    found = module.moved_pass(model, embedding, delta, {"input_ids": ids}).logits
    torch.testing.assert_close(found, model(inputs_embeds=embedding(ids) + delta).logits, rtol=1e-4, atol=1e-5)
    assert float((found - model(input_ids=ids).logits).abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["longformer", "big_bird"])
def test_a_model_that_pads_inside_is_moved_in_the_batchs_tokens(family):
    """45 tokens are no multiple of Longformer's window, nor of BigBird's blocks."""
    model, ids = model_of(family), torch.randint(5, VOCABULARY, (3, 45))
    delta, embedding, rest = torch.randn(3, 45, WIDTH), model.get_input_embeddings(), {}
    if family == "longformer":  # by inputs_embeds it needs to be told what its first token attends to
        rest["global_attention_mask"] = torch.zeros_like(ids).index_fill(1, torch.tensor([0]), 1)
    found = module.moved_pass(model, embedding, delta, {"input_ids": ids, **rest}).logits
    wanted = model(inputs_embeds=embedding(ids) + delta, **rest).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float((found - model(input_ids=ids, **rest).logits).abs().max()) > 1e-4


def test_ids_that_the_model_replaces_are_one_sentence():
    """As some models do with the places of images; told by `movable` to leave those out, it is perturbed."""
    model, batch = causal(), batch_of("right", classes=False)
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, given: (given[0].clone().index_fill_(-1, torch.tensor([2]), 0),)
    )
    with pytest.raises(UserError, match=r"looks up other ids than those of its input_ids in 3 perturbed places"):
        ptp_loss(model, batch, PTPSettings())
    movable = batch["attention_mask"].bool() & (batch["labels"] == -100)
    movable[:, 2] = False
    assert float(ptp_loss(model, batch, PTPSettings(sigma=0.5), movable=movable).divergence) > 1e-4


def test_outside_of_the_moved_pass_the_model_is_as_it_was():
    model, batch = classifier("llama"), batch_of("right", classes=True)
    before = model(**batch).logits
    ptp_loss(model, batch, PTPSettings())
    ptp_loss(model, batch, PTPSettings(perturbation="pgd"))
    assert torch.equal(model(**batch).logits, before)
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    embedding = model.get_input_embeddings()
    with pytest.raises(AttributeError, match="ndim"):
        module.moved_pass(model, embedding, torch.ones(3, 9, WIDTH), {**batch, "attention_mask": 3})
    assert torch.equal(model(**batch).logits, before)


def test_a_model_that_embeds_elsewhere_is_one_sentence():
    model, batch = AutoModelForCausalLM.from_config(make_model("llama").config), batch_of("right", classes=False)
    spare = nn.Embedding(VOCABULARY, WIDTH)
    model.get_input_embeddings = lambda: spare
    with pytest.raises(UserError, match=r"doesn't look up its input_ids \[3, 9\] in the Embedding that"):
        ptp_loss(model, batch, PTPSettings())


def plain_of(model):
    return model


def compiled_of(model):
    return torch.compile(model, backend="eager")


def compiled_by_method(model):
    model.compile(backend="eager")
    return model


def compiled_below(model):
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapped", "passes"), [(plain_of, 1), (compiled_of, 2), (compiled_by_method, 2), (compiled_below, 2)]
)
def test_only_a_compiled_model_is_compiled_and_run_again(wrapped, passes, monkeypatch):
    """The compiler's reset throws away all that the program has compiled."""
    resets, ran = [], []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    inner = causal()
    inner.model.norm.register_forward_hook(lambda *_: ran.append(1))
    batch = batch_of("right", classes=False)
    with pytest.raises(UserError, match="doesn't look up its input_ids"):
        module.moved_pass(wrapped(inner), nn.Embedding(VOCABULARY, WIDTH), torch.ones(3, 9, WIDTH), batch)
    assert (len(resets), len(ran)) == (passes - 1, passes)


def test_embeddings_that_are_sharded_need_no_measure_in_l2():
    model, batch = causal(), batch_of("right", classes=False)
    model.get_input_embeddings().weight.ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(UserError, match="sharded by ZeRO-3 can't be measured here; give units='l2'"):
        ptp_loss(model, batch, PTPSettings())
    found = ptp_loss(model, batch, PTPSettings(units="l2", sigma=0.5))
    assert float(found.divergence) > 0


def test_each_device_of_a_split_batch_adds_its_own_rows(monkeypatch):
    """DataParallel's scatter is played: the second device is torch's meta."""
    delta, parallel = torch.randn(3, 9, WIDTH), nn.DataParallel(nn.Identity())
    parallel.device_ids = [0, 1]

    def split(given):
        return [tuple(one[:2] for one in given), tuple(one[2:].to("meta") for one in given)]

    monkeypatch.setattr(parallel, "scatter", lambda given, *_: (split(given), [{}]))
    mover, ids = module.Mover(), torch.arange(27).reshape(3, 9)
    mover.parts = module._parts_of(parallel, ids, delta)
    first = mover(None, (), {"input": ids[:2]}, torch.zeros(2, 9, WIDTH))
    assert torch.equal(first, delta[:2])
    there = mover(None, (ids[2:].to("meta"),), {}, torch.zeros(1, 9, WIDTH, device="meta"))
    assert there.device.type == "meta"
    assert mover(None, (ids[2:],), {}, torch.zeros(1, 9, WIDTH)) is None
