"""transformers' Trainer with PTP's loss, as a mixin for its subclasses.

    trainer = PTPTrainer(model, args, train_dataset=rows, ptp=PTPSettings(perturbation="gaussian"))
    class PTPSFTTrainer(PTPMixin, SFTTrainer): ...

The clean pass and its loss are the Trainer's own, label smoothing and all; training alone adds the perturbed pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ptp_ds.objective import cross_entropy_sum
from ptp_ds.trainer.loss import (
    Answers,
    answers_of,
    divergence_of,
    expect_perturbed,
    logits_of,
    movable_tokens,
    require_some,
)
from ptp_ds.trainer.settings import PTPSettings, require_settings
from ptp_ds.training.schedules import reg_weight_at


@dataclass
class Dealt:
    """Which micro-batch of its step is dealt (micro_batch, from 0), and the most rows that one had."""

    most: int = 0
    micro_batch: int = 0
    _step: tuple[Any, int] | None = None

    def next(self, state: Any, step: int) -> None:
        """The step's next micro-batch. state: of a Trainer's loop; another begins at its first."""
        same = self._step is not None and self._step[0] is state and self._step[1] == step
        self.micro_batch = self.micro_batch + 1 if same else 0
        self._step = (state, step)


class PTPMixin:
    """Before a Trainer among the bases. ptp: what is added to its loss."""

    def __init__(self, *args: Any, ptp: PTPSettings | None = None, **kwargs: Any) -> None:
        self.ptp = PTPSettings() if ptp is None else ptp
        require_settings(self.ptp, "ptp")
        self._told: dict[str, Tensor] = {}
        self._told_passes = 0
        self._special: set[int] | None = None
        self._dealt = Dealt()
        super().__init__(*args, **kwargs)
        tokenizer = getattr(self, "processing_class", None)
        special = getattr(tokenizer, "all_special_ids", None)
        self._special = None if special is None else set(special)

    def compute_loss(
        self: Any, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """The Trainer's loss plus lambda times the divergence, scaled for accumulation as that loss is."""
        if not model.training or not self.ptp.perturbs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        expect_perturbed(model, inputs, self.ptp)
        batch = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        logits, movable = logits_of(outputs), self._movable(model, batch)
        answers = answers_of(model, batch["labels"], logits)
        step, numbers = self.state.global_step, self._numbers(batch["labels"].shape[0]).to(logits.device)
        total, norm = divergence_of(model, batch, logits, answers, self.ptp, step, numbers, movable)
        divergence = total * self._scale(answers, logits, loss.detach(), num_items_in_batch)
        self._tell(total.detach() / max(1, answers.count), norm)
        loss = loss + reg_weight_at(self.ptp.run, step) * divergence
        return (loss, outputs) if return_outputs else loss

    def _numbers(self: Any, rows: int) -> Tensor:
        """[rows] of this micro-batch among all rows of the step, over its micro-batches and ranks: each its own noise.
        A step's rows get the same numbers however many micro-batches they come in.
        """
        dealt, rank, ranks = self._dealt, self.accelerator.process_index, self.accelerator.num_processes
        dealt.next(self.state, self.state.global_step)
        dealt.most = max(dealt.most, rows, self.args.train_batch_size)
        return torch.arange(rows) + (dealt.micro_batch * ranks + rank) * dealt.most

    def _scale(self: Any, answers: Answers, logits: Tensor, loss: Tensor, num_items: Tensor | int | None) -> Any:
        """What a sum over this batch's answers is multiplied by, as the Trainer's own loss is (transformers 5.23)."""
        of_batch = 1 / max(1, answers.count)
        if num_items is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return of_batch
        gpus, times = max(1, self.args.n_gpu), 1
        if self.args.average_tokens_across_devices:
            times = gpus if gpus > 1 else self.accelerator.num_processes // self.get_tp_size()
        of_step = times / (num_items.flatten()[0] if isinstance(num_items, Tensor) else num_items)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            return of_step
        if gpus == 1 == self.args.gradient_accumulation_steps == self.accelerator.num_processes:
            return of_step  # the step's answers are the batch's
        # The model's own. Many classifiers take the step's number of answers and don't use it: of the two scales the
        # one that makes this loss of the cross-entropy. DataParallel's losses, one a device, are averaged.
        of_step, of_batch = of_step / gpus, times * of_batch
        with torch.no_grad():
            own, total = loss.mean(), cross_entropy_sum(answers.scores(logits), answers.gold)
            nearer = (own - total * of_step).abs() <= (own - total * of_batch).abs()
            return nearer * of_step + ~nearer * of_batch

    def _movable(self: Any, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """movable_tokens without the tokenizer's special ones; UserError at the first step where nothing may move."""
        found = movable_tokens(model, batch, self._special)
        if self.state.global_step == 0:
            require_some(found)
        return found

    def _tell(self, divergence: Tensor, norm: Tensor) -> None:
        """Sums for the log, left on the device."""
        for name, value in (("divergence", divergence), ("delta_norm", norm)):
            self._told[name] = self._told.get(name, torch.zeros_like(value)) + value
        self._told_passes += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of divergence and delta_norm since the last line to a line with a loss."""
        if "loss" in logs and self._told_passes:
            logs = {**logs, **{name: float(value) / self._told_passes for name, value in self._told.items()}}
            self._told, self._told_passes = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class PTPTrainer(PTPMixin, Trainer):
    """transformers' Trainer whose training loss is PTP's; evaluation is a plain pass. ptp: see PTPSettings."""
