"""What a model predicts with: its language-model head, its masked one, or a classifier that is trained with the prompt.

A classifier's tensors are trained beside the prompt, and held with it in one matrix: the prompt's rows first, then the
classifier's (ptp_ds.prompts.flat). peft keeps them as modules_to_save.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from ptp_ds.errors import UserError
from ptp_ds.packing.layouts import Rows, SeparateRows, TreeRows
from ptp_ds.prompts.flat import Flat
from ptp_ds.seeding import make_generator
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import tail_ids

# What the last layer hands on: "scored" [1, N, H]; "columns" [N, 1, H], each scored token as the first of its own row,
# for heads that pool there; "row" [1, T, H], zero where nothing is scored, for causal models that bring what their
# layers give into their input's shape (gpt2). A causal model starts with it and gets "scored" if the check proves it.
HeadInput = Literal["row", "scored", "columns"]
_AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}  # fmt: skip
_ENDINGS = {"ForCausalLM": "causal", "LMHeadModel": "causal", "ForMaskedLM": "masked"}
# The families' names. peft takes each module whose name ends in "classifier" for one, so DistilBERT's two layers are
# trained together.
_CLASSIFIERS = ("classifier", "score", "pre_classifier")
_BETWEEN = ("pooler", "head")  # what some families have between the encoder and the classifier
_HEAD_INPUTS: dict[str, HeadInput] = {"causal": "row", "masked": "scored", "classes": "columns", "seq2seq": "scored"}


@dataclass(frozen=True)
class HeadPlan:
    """The head that a task asks of a model: see Head. outputs: the classifier's logits."""

    kind: str = "causal"
    choice: bool = False
    outputs: int = 0


@dataclass(frozen=True)
class Head:
    """kind: see HEADS. choice: whether the classifier gives one logit to each answer, as where answers differ from row
    to row, in place of one a class. trained: names and shapes of the model's tensors that are trained. held: values of
    those that the checkpoint brings, which training starts from.
    """

    kind: str = "causal"
    choice: bool = False
    trained: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    held: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def head_input(self) -> HeadInput:
        """What the last layer hands to this head."""
        return _HEAD_INPUTS[self.kind]

    def rows(self, width: int) -> int:
        """Rows of `width` numbers that hold the trained tensors."""
        return Flat(self.trained, width).rows

    def split(self, values_RW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the prompt [P, W], the head's tensors by name) of a matrix of trained values."""
        flat = Flat(self.trained, values_RW.shape[1])
        prompt, own = values_RW.split([values_RW.shape[0] - flat.rows, flat.rows])
        return prompt, flat.split(own) if self.trained else {}

    def join(self, prompt_PW: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of split."""
        if not self.trained:
            return prompt_PW
        moved = {name: tensor.to(prompt_PW) for name, tensor in tensors.items()}
        return torch.cat([prompt_PW, Flat(self.trained, prompt_PW.shape[1]).pack(moved)])

    def start(self, config: Any, seed: int) -> dict[str, Tensor]:
        """Initial tensors, fp32: held ones as they are, norms at one, biases at zero, the rest normal with the family's
        deviation."""
        generator, found = make_generator(seed, "head"), {}
        for name, shape in self.trained.items():
            if name in self.held:
                found[name] = self.held[name].clone()
            elif name.endswith("bias"):
                found[name] = torch.zeros(shape)
            elif len(shape) == 1:
                found[name] = torch.ones(shape)
            else:
                deviation = getattr(config, "initializer_range", 0.02)
                found[name] = torch.empty(shape).normal_(0.0, deviation, generator=generator)
        return found


def head_kind(config: Any, wanted: str = "auto") -> str:
    """The kind of head that `wanted` (auto or one of HEADS) means for a model's configuration.

    auto: what the checkpoint was saved with; a bare encoder gets a classifier. Raises ValueError where the family has
    no such head, or where a causal model is asked for a classifier.
    """
    if wanted != "auto":
        return wanted
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    saved = (getattr(config, "architectures", None) or [""])[0]
    for ending, kind in _ENDINGS.items():
        if saved.endswith(ending):
            return kind
    return "classes" if is_encoder(config) else "causal"


def is_encoder(config: Any) -> bool:
    """Whether a model's family has a masked language model, as those do whose classifiers are trained here."""
    return type(config) in AutoModelForMaskedLM._model_mapping


def plan_head(config: Any, wanted: str, task: Task) -> HeadPlan:
    """The head that a run needs: a class a label, or one logit an answer where answers differ from row to row."""
    return HeadPlan(head_kind(config, wanted), task.choice, 1 if task.choice else len(task.answers))


def in_every_row(kind: str, task: Task, target: str = "input") -> bool:
    """Whether each row holds a soft prompt's tokens, in the place of one prompt in front of all; see rows_for."""
    return kind != "causal" or target != "input" or task.places_prompt


def rows_for(
    plan: HeadPlan, task: Task, tokenizer: Any, prompt: str, prompt_length: int, target: str = "input"
) -> Rows:
    """The rows of a model with such a head.

    target: see SeparateRows. A prompt that moves, or stands within the text, is not the same for all rows: each has its
    own. Raises ValueError for a masked head without a mask token, and for a deep prompt with a place in the text.
    """
    if task.places_prompt and prompt != "soft":
        raise UserError(f"Task {task.name}'s text has a place for a soft prompt; a deep one stands in every layer.")
    if not in_every_row(plan.kind, task, target):
        return TreeRows(prompt)
    if plan.kind == "causal":
        return SeparateRows(kind="causal", prompt_length=prompt_length, target=target)
    mask = tokenizer.mask_token_id
    if plan.kind == "masked" and mask is None:
        raise UserError(f"--head masked needs a mask token, and {type(tokenizer).__name__} has none.")
    in_rows = prompt_length if prompt == "soft" else 0
    return SeparateRows(
        kind=plan.kind,
        prompt_length=in_rows,
        mask_id=mask or 0,
        tail=tail_ids(tokenizer),
        choice=plan.choice,
        target=target,
    )


def auto_class(config: Any, kind: str, folder: Any) -> Any:
    """transformers' auto class for a head of this kind; ValueError naming a family that has none."""
    family = config.model_type
    if kind == "classes" and not is_encoder(config):
        raise UserError(
            f"{folder}: --head classes is for encoders; model family {family!r} is none: use --head causal."
        )
    if type(config) not in _AUTO[kind]._model_mapping:
        what = {"causal": "causal language model", "masked": "masked language model", "classes": "classifier",
                "seq2seq": "encoder and decoder"}[kind]  # fmt: skip
        raise UserError(f"{folder}: model family {family!r} has no {what} in transformers.")
    return _AUTO[kind]


def is_trained(name: str) -> bool:
    """Whether a tensor of a classification model belongs to its classifier."""
    return name.split(".", 1)[0] in _CLASSIFIERS


def is_kept(name: str) -> bool:
    """Whether a trained tensor starts from the checkpoint's values where it has them: its shape is the same for every
    task's classes, so it was trained for something."""
    return name.startswith("pre_classifier.")


def module_to_save(name: str) -> str:
    """The module of a trained tensor, by the name that peft's modules_to_save knows it by."""
    return next(part for part in name.split(".") if part in (*_CLASSIFIERS, *_BETWEEN))


def may_be_absent(name: str) -> bool:
    """Whether a checkpoint of the bare encoder may lack this tensor: it is then trained with the classifier."""
    return is_trained(name) or any(part in _BETWEEN for part in name.split("."))
