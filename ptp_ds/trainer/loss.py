"""The loss for a plain or accelerate loop: the model's own, plus lambda times a divergence from a perturbed pass.

    found = ptp_loss(model, batch, PTPSettings(perturbation="pgd"), step=step)
    found.loss.backward()

The model is any of transformers', alone or under peft (soft prompts, prefixes, LoRA): causal, masked, or a classifier
of rows or tokens. The perturbed pass moves the embeddings of the batch's tokens, or replaces tokens. In train mode
dropout differs between the passes, and its noise counts as divergence: turn it off where that isn't wanted.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from ptp_ds.errors import UserError
from ptp_ds.files import brief
from ptp_ds.objective import cross_entropy_sum, divergence_sum
from ptp_ds.perturb.units import unit_of
from ptp_ds.trainer.deltas import batch_places, climbed_delta, example_norms, masked_ids, noisy_delta
from ptp_ds.trainer.moved import moved_pass, mover_of
from ptp_ds.trainer.settings import PTPSettings, require_settings
from ptp_ds.training.schedules import reg_weight_at

IGNORED = -100
_mean_norms: "WeakKeyDictionary[nn.Module, float]" = WeakKeyDictionary()


@dataclass(frozen=True)
class PTPLoss:
    """loss: to go backward from. cross_entropy, divergence: its parts before lambda, means over answers, detached.
    delta_norm: mean l2 norm of a row's delta. outputs: the clean pass's, as the model returns them.
    """

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    delta_norm: Tensor
    outputs: Any


@dataclass(frozen=True)
class Answers:
    """Where a batch's answers are predicted, and the right ones. rows, places: of the logits; no places for a
    classifier of rows. gold [N]: among the vocabulary, the classes, or the candidates. candidates: their token ids,
    [C] or [B, C].
    """

    rows: Tensor
    places: Tensor | None
    gold: Tensor
    candidates: Tensor | None = None

    @property
    def count(self) -> int:
        """N, the number of answers."""
        return self.gold.shape[0]

    def scores(self, logits: Tensor) -> Tensor:
        """[N, C] logits of what could be answered."""
        if self.places is None:
            return logits[self.rows]
        found = logits[self.rows, self.places]
        if self.candidates is None:
            return found
        if self.candidates.dim() == 1:
            return found[:, self.candidates]
        return found.gather(1, self.candidates[self.rows])


def ptp_loss(
    model: nn.Module, batch: Mapping[str, Any], settings: PTPSettings, *, step: int = 0,
    numbers: Tensor | None = None, movable: Tensor | None = None, answer_ids: Tensor | None = None,
    special_ids: Collection[int] | None = None,
) -> PTPLoss:  # fmt: skip
    """The loss of one batch, a mean over its answers: labelled tokens, or rows of a classifier.

    batch: what the model takes: input_ids [B, T], attention_mask, labels [B, T] or [B] classes, -100 where there is
    no answer. step: of the optimizer; noise differs from step to step, lambda may warm up. numbers [B]: of the rows
    in their data set, so that an example's noise doesn't depend on its batch; default: their places, which repeat
    from one of a step's micro-batches, or ranks, to the next. movable [B, T]: the tokens that may be perturbed;
    default: those that are attended to, no special ones and no answers that stand in the text. answer_ids: token ids
    of the possible answers, [C] or [B, C], one labelled token a row: the prediction is then the softmax over them, as
    in `ptp train`. special_ids: which tokens are special, a tokenizer's all_special_ids; default: what the model's
    configuration names, and where that is padding alone (BERT) movable or special_ids must be given. Without a
    perturbation the model's own loss, of one pass. Raises UserError for what doesn't fit.
    """
    require_settings(settings, "settings")
    _require_tensors(numbers=numbers, movable=movable, answer_ids=answer_ids)
    expect_perturbed(model, batch, settings, movable)
    if not isinstance(batch.get("labels"), Tensor):
        raise UserError("A batch needs labels, a tensor, to have a loss; see docs/own_loop.md.")
    _require_shapes(batch, numbers, movable, answer_ids)
    if "num_items_in_batch" in batch:
        raise UserError("num_items_in_batch would scale the model's own loss alone; leave it out and scale found.loss.")
    if settings.perturbs and movable is None:
        movable = movable_tokens(model, batch, special_ids)
        if step == 0:
            require_some(movable)
    outputs = model(**batch)
    logits = logits_of(outputs)
    answers = answers_of(model, batch["labels"], logits, answer_ids)
    if answer_ids is None:
        cross_entropy = outputs.loss
    else:
        cross_entropy = cross_entropy_sum(answers.scores(logits), answers.gold) / max(1, answers.count)
    zero = torch.zeros((), device=logits.device)
    if not settings.perturbs:
        return PTPLoss(cross_entropy, cross_entropy.detach(), zero, zero, outputs)
    assert movable is not None
    total, norm = divergence_of(model, batch, logits, answers, settings, step, numbers, movable)
    divergence = total / max(1, answers.count)
    loss = cross_entropy + reg_weight_at(settings.run, step) * divergence
    return PTPLoss(loss, cross_entropy.detach(), divergence.detach(), norm, outputs)


def _require_tensors(**given: Any) -> None:
    """UserError for an argument that is no tensor; None is none given."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise UserError(f"{name} is {brief(value)}, of type {type(value).__name__}; expected a tensor.")


def _require_shapes(
    batch: Mapping[str, Any], numbers: Tensor | None, movable: Tensor | None, answer_ids: Tensor | None
) -> None:
    """UserError for a tensor that isn't of the batch's rows and tokens, or holds fractions for numbers."""
    rows, ids = batch["labels"].shape[:1], batch.get("input_ids")
    if numbers is not None and (numbers.shape != rows or numbers.is_floating_point()):
        raise _misfit("numbers", numbers, f"integers [B], {tuple(rows)}, the rows' places in the data set")
    if movable is not None and isinstance(ids, Tensor) and movable.shape != ids.shape:
        raise _misfit("movable", movable, f"booleans [B, T], {tuple(ids.shape)}, as input_ids")
    if answer_ids is not None:
        fits = answer_ids.dim() == 1 or (answer_ids.dim() == 2 and answer_ids.shape[:1] == rows)
        if not fits or answer_ids.is_floating_point():
            raise _misfit("answer_ids", answer_ids, f"token ids [C], or [B, C] with {rows[0]} rows")


def _misfit(name: str, given: Tensor, wanted: str) -> UserError:
    return UserError(f"{name} has shape {tuple(given.shape)} and type {given.dtype}; expected {wanted}.")


def expect_perturbed(
    model: nn.Module, batch: Mapping[str, Any], settings: PTPSettings, movable: Tensor | None = None
) -> None:
    """Before the clean pass: UserError where the batch can't be perturbed; the hook of the pass that moves it."""
    if not settings.perturbs:
        return
    if not all(isinstance(batch.get(name), Tensor) for name in ("input_ids", "labels")):
        raise UserError("A batch needs input_ids and labels to be perturbed; see docs/own_loop.md.")
    answers_in_place(model)  # refuses encoder-decoders
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    if ids.dim() != 2:
        raise UserError(f"input_ids have shape {tuple(ids.shape)}; expected [B, T], a row of tokens for each answer.")
    if labels.is_floating_point() or (movable is None and labels.shape not in (ids.shape[:1], ids.shape)):
        raise _no_answers(labels)
    if movable is None and mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        found = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is of type {type(mask).__name__}"
        raise UserError(
            f"attention_mask {found}; expected [B, T], {tuple(ids.shape)}, to tell which tokens may be perturbed, or "
            "ptp_loss's movable beside it."
        )
    if settings.perturbation != "mask":
        mover_of(embedding_of(model))


def _no_answers(labels: Tensor) -> UserError:
    return UserError(
        f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; expected classes [B] or tokens [B, T]."
    )


def logits_of(outputs: Any) -> Tensor:
    """The model's logits; UserError where it returns none, as with fused losses."""
    logits: Tensor | None = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None or not logits.numel():
        raise UserError("The model returns no logits, which the divergence compares; turn fused losses off.")
    return logits


def divergence_of(
    model: nn.Module, batch: Mapping[str, Any], logits: Tensor, answers: Answers, settings: PTPSettings, step: int,
    numbers: Tensor | None, movable: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the divergence summed over the answers, with gradient to what is trained; mean l2 norm of a row's delta).

    logits: of the clean pass. The other arguments: see ptp_loss.
    """
    ids = batch["input_ids"]
    rows = ids.shape[0]
    numbers = torch.arange(rows, device=ids.device) if numbers is None else numbers.to(ids.device)
    movable = movable.to(ids.device).bool()
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    clean_NC, fixed = answers.scores(logits), settings.divergence_gradient == "clean_fixed"

    def total_of(perturbed_NC: Tensor) -> Tensor:
        sure = settings.min_confidence, settings.confidence_in == "label"
        return divergence_sum(settings.divergence, clean_NC, perturbed_NC, answers.gold, fixed, *sure)

    if settings.perturbation == "mask":
        outputs = model(input_ids=masked_ids(ids, movable, numbers, settings, step), **rest)
        perturbed_NC = answers.scores(logits_of(outputs))
        return total_of(perturbed_NC), logits.new_zeros(())
    embedding = embedding_of(model)
    width, places = width_of(embedding), batch_places(movable, numbers)
    unit = unit_of(settings.units, mean_norm_of(embedding) if settings.units == "relative" else 1.0, width)

    def scores(delta_NH: Tensor) -> Tensor:
        outputs = moved_pass(model, embedding, delta_NH.reshape(*ids.shape, width), {"input_ids": ids, **rest})
        return answers.scores(logits_of(outputs))

    def gradient(delta_NH: Tensor) -> Tensor:
        with torch.enable_grad():
            delta = delta_NH.detach().requires_grad_()
            climbed = divergence_sum(settings.divergence, clean_NC.detach(), scores(delta), answers.gold)
            return gradient_of(climbed, delta)

    if settings.perturbation == "pgd":
        delta_NH = climbed_delta(places, width, unit, settings, step, gradient)
    else:
        delta_NH = noisy_delta(places, width, unit, settings, step)
    return total_of(scores(delta_NH)), example_norms(delta_NH, rows).mean()


def gradient_of(climbed: Tensor, delta: Tensor) -> Tensor:
    """Of the divergence with respect to delta alone; UserError under reentrant checkpointing, which can't give it."""
    try:
        return torch.autograd.grad(climbed, delta)[0]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UserError(
            "pgd needs a gradient that reentrant gradient checkpointing can't give; set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or take another perturbation."
        ) from error


def answers_of(model: nn.Module, labels: Tensor, logits: Tensor, answer_ids: Tensor | None = None) -> Answers:
    """Where the model predicts what `labels` say; UserError for labels that are no answers among classes or tokens."""
    if labels.dim() == 1 and not labels.is_floating_point():
        if answer_ids is not None:
            raise UserError("answer_ids are for language models; a classifier's answers are its classes.")
        if logits.shape[-1] == 1:
            raise UserError("The model gives one number a row, no scores of classes; a divergence needs 2 or more.")
        rows = (labels != IGNORED).nonzero()[:, 0]
        return Answers(rows, None, labels[rows])
    if labels.dim() != 2 or labels.is_floating_point() or logits.dim() != 3:
        raise _no_answers(labels)
    if answer_ids is not None and is_token_classifier(model):
        raise UserError("answer_ids are for language models; a token classifier's answers are its classes.")
    shift = 0 if answers_in_place(model) else 1
    front = logits.shape[1] - labels.shape[1]  # a soft prompt's tokens
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    places = columns + front - shift
    seen = places >= 0
    rows, places, gold = rows[seen], places[seen], labels[rows[seen], columns[seen]]
    if answer_ids is None:
        return Answers(rows, places, gold)
    candidates = answer_ids.to(labels.device)
    if rows.shape[0] != labels.shape[0] or not torch.equal(rows, torch.arange(labels.shape[0], device=rows.device)):
        raise UserError("With answer_ids every row has one labelled token, its answer; the others' labels are -100.")
    matches = candidates.expand(rows.shape[0], -1) == gold[:, None]
    if not bool((matches.sum(-1) == 1).all()):
        raise UserError("answer_ids must hold every row's labelled token once.")
    return Answers(rows, places, matches.int().argmax(-1), candidates)


def movable_tokens(model: nn.Module, batch: Mapping[str, Any], special_ids: Collection[int] | None = None) -> Tensor:
    """[B, T] tokens that are attended to, no special ones and no answers; a token classifier's labels are no tokens.

    special_ids: besides those that the model's configuration names. UserError for None where that names none.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    found = torch.ones_like(ids, dtype=torch.bool)
    if batch.get("attention_mask") is not None:
        found &= batch["attention_mask"].bool()
    for special in _known_special(model, special_ids):
        found &= ids != special
    if labels is not None and labels.dim() == 2 and not is_token_classifier(model):
        found &= labels == IGNORED
    return found


def require_some(movable_BT: Tensor) -> None:
    """UserError where nothing of a batch may move. It waits for the device: for a run's first step."""
    if not bool(movable_BT.any()):
        raise UserError(
            "Every token of the first batch is an answer, special or padding: nothing may be perturbed; label the "
            "answers alone (-100 elsewhere)."
        )


def _known_special(model: nn.Module, given: Collection[int] | None) -> set[int]:
    """The token ids given, and those that the model's configuration names: begin, end, separators, padding."""
    base = base_of(model)
    config = base.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")]
    found = {one for ids in named if ids is not None for one in (ids if isinstance(ids, list) else [ids])}
    if given is None and not found:
        raise UserError(
            f"The configuration of {type(base).__name__} names no begin, end or separator token, so that they can't be "
            "told from words, which may be perturbed; give ptp_loss special_ids=tokenizer.all_special_ids or movable, "
            "and PTPTrainer processing_class=tokenizer."
        )
    padding = getattr(config, "pad_token_id", None)
    return {*found, *(given or ()), *([] if padding is None else [padding])}


def base_of(model: Any) -> Any:
    """transformers' model below wrappers of peft, torch.compile, DDP and the like."""
    for name in ("_orig_mod", "module"):
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return base_of(inner)
    return base_of(model.get_base_model()) if hasattr(model, "get_base_model") else model


def embedding_of(model: nn.Module) -> Any:
    """The module that turns token ids into input embeddings."""
    return base_of(model).get_input_embeddings()


def width_of(embedding: Any) -> int:
    """H of the input embeddings, packed or sharded."""
    return int(getattr(embedding, "embedding_dim", None) or embedding.weight.shape[-1])


def answers_in_place(model: nn.Module) -> bool:
    """Whether an answer is predicted where it stands, as by masked models and token classifiers, not one token before.
    UserError for encoder-decoders.
    """
    base = base_of(model)
    if base.config.is_encoder_decoder:
        raise UserError(f"{type(base).__name__} is an encoder-decoder; train it by `ptp train`, which knows them.")
    return is_token_classifier(model) or _is_kind(
        base, "ForMaskedLM", frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    )


def is_token_classifier(model: nn.Module) -> bool:
    """Whether the model predicts a class of each token."""
    return _is_kind(
        base_of(model), "ForTokenClassification", frozenset(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values())
    )


def _is_kind(base: nn.Module, ending: str, names: frozenset[str]) -> bool:
    """Whether the model's class, or one that it derives from, has one of transformers' names for a kind of head."""
    return any(kind.__name__ in names or kind.__name__.endswith(ending) for kind in type(base).__mro__)


@torch.no_grad()
def mean_norm_of(embedding: Any, chunk: int = 16384) -> float:
    """Mean l2 norm over the vocabulary's input embeddings, the unit of sizes; found once a module."""
    if embedding not in _mean_norms:
        weight: Any = embedding.weight
        if hasattr(weight, "ds_id"):  # ZeRO-3 holds a part
            raise UserError("Embeddings sharded by ZeRO-3 can't be measured here; give units='l2', or use `ptp train`.")
        norms = [
            embedding(torch.arange(first, min(first + chunk, weight.shape[0]), device=weight.device))
            .float()
            .norm(dim=-1)
            for first in range(0, weight.shape[0], chunk)
        ]
        _mean_norms[embedding] = float(torch.cat(norms).mean())
    return _mean_norms[embedding]
