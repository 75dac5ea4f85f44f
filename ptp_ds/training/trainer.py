"""The train loop: batches in seeded order, the step of ptp_ds.training.step, evaluation, checkpoints, records."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.packing.layouts import Rows
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb import Noise, PerturbSettings, Twin
from ptp_ds.perturb.mask import mask
from ptp_ds.perturb.neighbours import Neighbours
from ptp_ds.perturb.perturbation import Attack
from ptp_ds.perturb.text_scoring import TextScorer
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import OutputGuard
from ptp_ds.ranks.log import get_logger
from ptp_ds.ranks.signals import StopRequest
from ptp_ds.ranks.watchdog import Watchdog
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import BatchOrder, deal_rows
from ptp_ds.tasks.example import Example
from ptp_ds.training.carried import Carried, Part, gather
from ptp_ds.training.checkpoint import Checkpoint, save_checkpoint
from ptp_ds.training.drawn import Ahead, Drawn
from ptp_ds.training.engine import Engine
from ptp_ds.training.evaluate import Evaluation, evaluate
from ptp_ds.training.examples import batch_order
from ptp_ds.training.meter import Meter, Shares
from ptp_ds.training.micro_batches import dealt
from ptp_ds.training.monitor import Monitor, peak_memory_bytes
from ptp_ds.training.progress import Progress
from ptp_ds.training.schedules import learning_rate
from ptp_ds.training.step import most_rows, step_in_parts

log = get_logger(__name__)


class NonFiniteLossError(UserError):
    """Training diverged; nothing of the broken state was saved."""


def require_finite(result: Evaluation, rows: str, step: int) -> None:
    """NonFiniteLossError for a prompt whose scores are no numbers: a row's first NaN would count as its answer."""
    if not math.isfinite(result.cross_entropy):
        raise _not_finite(f"cross-entropy on the {rows} rows", step)


def _not_finite(what: str, step: int) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"The {what} is not finite at step {step}; nothing was saved after the last checkpoint. Start anew in another "
        "--output_dir, with a lower --lr, --sigma or --epsilon or a higher --warmup_steps."
    )


@dataclass(frozen=True)
class Due:
    """What is done behind a step: its values are logged, the prompt is scored on the selection rows, it is saved."""

    logs: bool
    evaluates: bool
    saves: bool


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything that the loop needs. neighbours: near words, for a perturbation that attacks the text."""

    run: RunConfig
    task: Task
    engine: Engine
    ranks: Ranks
    settings: PerturbSettings
    train_examples: Sequence[Example]
    select_examples: Sequence[Example]
    monitor: Monitor
    output_dir: Path
    identity: dict[str, Any]
    neighbours: Neighbours | None = None
    watchdog: Watchdog | None = None

    def train(self, progress: Progress) -> Progress:
        """Runs from progress.step to the last step, or until a signal; all ranks call it."""
        stop, meter = StopRequest(self.ranks), Meter(self.ranks)
        try:
            if self.lacks_end(progress):
                output = OutputGuard(self.ranks, self.output_dir)
                self._score(progress, output)
                self.save(progress, output)
                output.agree()
            while self.goes_on(progress):
                self._doing(f"optimizer step {progress.step + 1}")
                self._optimizer_step(progress, meter)
                progress.step += 1
                self.monitor.tick(progress.step)
                progress.stopped_by = stop.agreed()
                self.after_step(progress, meter)
                if progress.stopped_by:
                    break
        finally:
            stop.restore()
        return progress

    def beat(self) -> None:
        """Something has moved: one pass of an evaluation (see Watchdog)."""
        if self.watchdog is not None:
            self.watchdog.beat()

    def evaluate(self, trained: Tensor, examples: Sequence[Example]) -> Evaluation:
        """The examples scored with a prompt; all ranks must call it."""
        budget = self.run.eval_tokens
        return evaluate(self.engine.backbone, trained, examples, self.task, self.ranks, budget, self.beat)

    def _doing(self, what: str) -> None:
        if self.watchdog is not None:
            self.watchdog.doing(what)

    def _optimizer_step(self, progress: Progress, meter: "Meter") -> None:
        step = progress.step
        with self.engine.backbone.shards.outside_layers():  # once for an attack and the step
            drawn = self._ahead.take(step)
            loss, deltas = step_in_parts(
                self.engine, drawn.rows, drawn.parted(self.carried(progress)), self.run, self.settings, drawn.noise,
                learning_rate(self.run, step), global_count=drawn.global_count, plans=drawn.plans,
                meanwhile=lambda: self._look_ahead(step + 1),
            )  # fmt: skip
        delta = drawn.joined(deltas)
        progress.carried = Carried(mine=delta) if delta is not None else None
        meter.add(loss, drawn.examples, step, drawn.shares, self.engine.broken())

    @cached_property
    def _ahead(self) -> Ahead[int, Drawn]:
        return Ahead(lambda step: self._planned(self.drawn(step, self.parts(step))).to(self.ranks.device))

    @cached_property
    def may_look_ahead(self) -> bool:
        """On a GPU, which works on meanwhile, and where rows depend on the step's number alone: not on the prompt, as
        an attack's, nor on a user's function."""
        how = self.run.active_perturbation
        by_number = how is None or not how.in_text or how.twins is mask
        return by_number and self.ranks.device.type == "cuda"

    def _look_ahead(self, step: int) -> None:
        if self.may_look_ahead and step < self.run.max_steps:
            self._ahead.prepare(step)

    def _planned(self, drawn: Drawn) -> Drawn:
        backbone, count = self.engine.backbone, len(drawn.rows)
        plans = tuple(
            backbone.plan(row, backbone.prefix_lengths(row, self.run.prompt_length), most_rows(row, self.run, count),
                          self.ranks.device)
            for row in drawn.rows
        )  # fmt: skip
        return replace(drawn, plans=plans)

    def share(self, step: int) -> tuple[int, int]:
        """(packed tokens of a step, both streams, on the rank that has most; examples on the one that has fewest)."""
        batch, hands = self._dealt(step)
        lengths = self._lengths(batch)
        most = max(sum(lengths[place] for place in hand) for hand in hands)
        return self.run.streams * most, min(len(hand) for hand in hands)

    def parts(self, step: int) -> int:
        """Micro-batches that a step takes one after the other; the same number on all ranks."""
        activations, sections = self.engine.backbone.activations, self.run.gradient_accumulation_steps
        if activations.schedule == "breadth":
            return 1
        tokens, fewest = self.share(step)
        return min(activations.parts(tokens, self.prefix, sections), fewest)

    @property
    def prefix(self) -> int:
        """Tokens that each packed row begins with."""
        return self.run.prompt_length + self._shared

    def drawn(self, step: int, parts: int = 1) -> Drawn:
        """What this rank trains on in a step, in so many micro-batches at most, on the host and without plans."""
        batch, hands = self._dealt(step)
        mine = [batch[place] for place in hands[self.ranks.rank]]
        lengths = self._lengths(mine)
        noise = Noise(self.run.seed, step, self.run.kernels)
        places, rows = dealt(lengths, parts), []
        shares: Shares = {}
        for part in places:
            packed, told = self._packed([mine[place] for place in part], noise)
            rows.append(packed)
            shares = {name: (a + shares.get(name, (0, 0))[0], b + shares.get(name, (0, 0))[1])
                      for name, (a, b) in told.items()}  # fmt: skip
        return Drawn(tuple(rows), places, tuple(lengths), shares, noise, len(batch), (None,) * len(rows))

    def _packed(self, examples: Sequence[Example], noise: Noise) -> tuple[PackedRow, Shares]:
        """The examples as one row, with twins where the perturbation changes the text, and what an attack tells."""
        perturbation = self.run.active_perturbation
        if perturbation is None or not perturbation.in_text:
            return self._rows.pack(examples, self._shared), {}
        shares: Shares = {}
        if perturbation.attack is not None:
            twins, shares = self._attacked(perturbation.attack, examples)
        else:
            assert perturbation.twins is not None
            twins = perturbation.twins(examples, self.settings, noise)
        movable = [twin.movable for twin in twins] if perturbation.find is not None else None
        texts, places = [twin.context_ids for twin in twins], [twin.prompt_at for twin in twins]
        return self._rows.pack_twins(examples, texts, movable, self._shared, places), shares

    def _attacked(self, attack: Attack, examples: Sequence[Example]) -> tuple[Sequence[Twin], Shares]:
        """Twins against the prompt as it stands, anew at each use of an example (once an epoch): nothing to save."""
        assert self.neighbours is not None
        scorer = TextScorer(self.engine.backbone, self.engine.prompt(), examples, self._shared, self.neighbours)
        found = attack(scorer, self.settings)
        return found.twins, found.shares

    @cached_property
    def _shared(self) -> int:
        """Tokens that every training row begins with and the prefix takes."""
        return self._rows.shared_start(self.train_examples)

    @property
    def _rows(self) -> Rows:
        return self.engine.backbone.rows

    def _lengths(self, examples: Sequence[Example]) -> list[int]:
        """Packed tokens of each example, one stream."""
        return [self._rows.length(example) - self._shared for example in examples]

    @cached_property
    def _order(self) -> BatchOrder:
        return batch_order(self.run, self._rows, self.train_examples)

    def _dealt(self, step: int) -> tuple[list[Example], list[list[int]]]:
        """The global batch of optimizer step `step` and each rank's places in it, section by section."""
        batch = [self.train_examples[number] for number in self._order.batch(step // self.run.batch_repeats)]
        accumulate = self.run.gradient_accumulation_steps
        hands = deal_rows(self._lengths(batch), self.ranks.world * accumulate)
        return batch, [
            [place for hand in hands[first : first + accumulate] for place in hand]
            for first in range(0, len(hands), accumulate)
        ]

    def carried(self, progress: Progress) -> Tensor | None:
        """[T, H] this rank's carried deltas for the step to come; None at a batch's first use."""
        if progress.carried is None or progress.step % self.run.batch_repeats == 0:
            return None
        batch, hands = self._dealt(progress.step)
        return progress.carried.of(self._lengths(batch), hands[self.ranks.rank], self.ranks.device)

    def _carried_parts(self, progress: Progress) -> Iterator[Part]:
        """On rank 0 each rank's carried deltas, all of which must be taken; all ranks must call it."""
        mine = self.carried(progress)
        if mine is None:
            return iter(())
        batch, hands = self._dealt(progress.step)
        return gather(self.ranks, mine, hands, self._lengths(batch))

    def goes_on(self, progress: Progress) -> bool:
        """Whether there are steps left: neither --max_steps nor --patience nor a listener has ended the run."""
        patient = not self.run.patience or progress.stale < self.run.patience
        return patient and not progress.ended and progress.step < self.run.max_steps

    def ends_here(self, progress: Progress) -> bool:
        """Whether a listener has ended the run, on rank 0; all ranks must call it."""
        if self.monitor.listeners and not progress.ended:
            progress.ended = bool(self.ranks.host_max(int(self.monitor.stop_asked)))
        return progress.ended

    def due(self, progress: Progress) -> Due:
        """What is done behind step progress.step. An end is scored whatever --eval_every says: a run that goes on from
        it has an evaluation more than one that was as long from the start."""
        step, run = progress.step, self.run
        ends = step == run.max_steps
        evaluates = _due(step, run.eval_every) or ends
        saves = _due(step, run.save_every) or ends or bool(progress.stopped_by)
        return Due(_due(step, run.log_every) or evaluates or saves, evaluates, saves)

    def after_step(self, progress: Progress, meter: "Meter") -> None:
        """Logs, evaluates and saves where step progress.step is one for it; all ranks must call it.

        Raises NonFiniteLossError on every rank where the loss or the gradient of any step isn't finite, or the prompt's
        cross-entropy on the selection rows.
        """
        due = self.due(progress)
        if not due.logs:
            return
        output = OutputGuard(self.ranks, self.output_dir)
        self.log(progress, meter, output)
        if self.ends_here(progress) or due.evaluates:
            self._score(progress, output)
            self.ends_here(progress)
        if due.saves or not self.goes_on(progress):
            self._doing(f"saving step {progress.step}")
            self.save(progress, output)
        output.agree()
        meter.restart_clock()

    def lacks_end(self, progress: Progress) -> bool:
        """Whether a run that a signal stopped unscored shall end there: its last step is evaluated like any other's."""
        step, scored = progress.step, progress.scored
        if scored is None and _due(step, self.run.eval_every):
            scored = step  # an older checkpoint doesn't say: then as often as today
        known = progress.best is not None and scored == step
        return step == self.run.max_steps and not known

    def _score(self, progress: Progress, output: OutputGuard) -> None:
        self._doing(f"the evaluation behind step {progress.step}")
        prompt = self.engine.kept()
        self.select(progress, prompt, self.evaluate(prompt, self.select_examples), output)

    def log(self, progress: Progress, meter: "Meter", output: OutputGuard) -> None:
        """The values since the last logged step, to the monitor; NonFiniteLossError: see after_step."""
        window = meter.reduce()
        if window.broken is not None:
            raise _not_finite(*window.broken)
        prompt = self.engine.prompt()
        progress.step_seconds.append(window.step_seconds)
        progress.tokens_per_second.append(window.tokens_per_second)
        peak = torch.tensor([peak_memory_bytes(self.ranks.device)], dtype=torch.float64, device=self.ranks.device)
        values = {
            **window.values, **window.shares, "grad_norm": self.engine.grad_norm(),
            "prompt_norm": float(prompt.norm(dim=-1).mean()),
            "learning_rate": learning_rate(self.run, progress.step - 1), "step_seconds": window.step_seconds,
            "tokens_per_second": window.tokens_per_second, "peak_memory_bytes": float(self.ranks.max(peak)),
        }  # fmt: skip
        self.monitor.train(progress.step, values, output)

    def select(self, progress: Progress, prompt: Tensor, result: Evaluation, output: OutputGuard) -> None:
        """Keeps the prompt where its scores on the selection rows are good enough; see Evaluation, require_finite."""
        require_finite(result, "selection", progress.step)
        progress.scored = progress.step
        marker = ""
        progress.stale = 0 if result.score > progress.highest else progress.stale + 1
        progress.highest = max(progress.highest, result.score)
        if result.within_an_error_of(progress.highest):
            progress.best, progress.best_prompt, progress.best_step = result, prompt, progress.step
            marker = "  (kept)"
        scores = {**result.metrics, "cross_entropy": result.cross_entropy}
        self.monitor.evaluation(progress.step, "select", scores, output)
        if not self.monitor.speaks:
            return
        log.info(
            "step %d  selection rows (%d): %s  ce %.4f%s", progress.step, result.examples, result.shown,
            result.cross_entropy, marker,
        )  # fmt: skip
        if not self.goes_on(progress) and not progress.ended and progress.step < self.run.max_steps:
            log.info(
                "step %d  %d evaluations without a higher score: training ends here", progress.step, progress.stale
            )

    def save(self, progress: Progress, output: OutputGuard, prunes: bool = True) -> None:
        """A checkpoint of step progress.step, for which older ones go where it `prunes`; all ranks must call it."""
        tensors = self.engine.state()
        if progress.best_prompt is not None:
            tensors["best_prompt"] = progress.best_prompt
        carried = self._carried_parts(progress)
        if self.ranks.is_main:
            most = self.engine.backbone.activations.most_tokens
            best, step = progress.best_record(), progress.step
            scored = progress.scored == step
            checkpoint = Checkpoint(step, tensors, best, self.identity, {}, most, progress.ended, scored)
            keep = self.run.keep_checkpoints if prunes else None
            with output.writing():
                save_checkpoint(self.output_dir / "checkpoints", checkpoint, keep, carried)
            for _ in carried:  # where a disk has failed: ranks wait until theirs is taken
                pass


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
