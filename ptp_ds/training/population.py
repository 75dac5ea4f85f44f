"""The train loop of several prompts: each member's own Trainer says what it trains on and keeps its records."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import cast

import torch
from torch import Tensor

from ptp_ds.files import write_json
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import OutputGuard
from ptp_ds.ranks.log import get_logger
from ptp_ds.ranks.signals import StopRequest
from ptp_ds.ranks.watchdog import Watchdog
from ptp_ds.training.engine import Engine
from ptp_ds.training.member_adamw import MemberRate
from ptp_ds.training.meter import Meter
from ptp_ds.training.population_engine import MemberEngine, PopulationEngine
from ptp_ds.training.population_step import MemberStep, population_loss, population_row, shares_passes
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.schedules import learning_rate
from ptp_ds.training.step import carried_delta
from ptp_ds.training.trainer import Carried, Drawn, NonFiniteLossError, Progress, Trainer

log = get_logger(__name__)


FAILED = "failed.json"  # in a member's folder: at which step it ended, and the sentence


@dataclass
class Member:
    """One prompt of a population. failed: the sentence that ended its training, '' while it goes on."""

    name: str
    prepared: Prepared
    trainer: Trainer
    progress: Progress
    meter: Meter
    failed: str = ""

    def serve(self) -> None:
        """Rows are this member's from now on: where prompts stand in every row, each has its own length."""
        run = self.prepared.run
        self.trainer.engine.backbone.serve(run.prompt, self.prepared.rows, run.prompt_length)


def member_engine(engine: PopulationEngine, number: int) -> Engine:
    """What a member's Trainer is given: prompt, state and gradient norm are its own; it never steps."""
    return cast(Engine, MemberEngine(engine, number))


@dataclass(frozen=True, kw_only=True)
class PopulationTrainer:
    """members: in the order of their prompts in the engine."""

    engine: PopulationEngine
    members: Sequence[Member]
    ranks: Ranks
    watchdog: Watchdog

    @property
    def alive(self) -> list[int]:
        """Numbers of the members that train."""
        return [number for number, member in enumerate(self.members) if not member.failed]

    def train(self) -> int:
        """Steps all members until the last, or until a signal, whose number it returns; all ranks call it."""
        stop, steps = StopRequest(self.ranks), self.members[0].trainer.run.max_steps
        try:
            while self.alive and (step := self.members[self.alive[0]].progress.step) < steps:
                self.watchdog.doing(f"optimizer step {step + 1}")
                self._step()
                stopped = stop.agreed()
                for number in self.alive:
                    self._after_step(self.members[number], stopped)
                self._tell(step + 1, steps)
                if stopped:
                    return stopped
        finally:
            stop.restore()
        return 0

    def _step(self) -> None:
        alive, backbone = self.alive, self.engine.backbone
        with backbone.shards.outside_layers():  # once for attacks and the step
            drawn = [self._drawn(self.members[number]) for number in alive]
            steps = [
                MemberStep(trainer.run, trainer.settings, one.noise, one.row, one.carried)
                for one, trainer in zip(drawn, (self.members[number].trainer for number in alive), strict=True)
            ]
            rows = [self.engine.rows[number] for number in alive]
            population = population_row(steps, rows, shares_passes(backbone)).to(self.ranks.device)
            losses = population_loss(self._trained(alive), backbone, population, self._options(steps))
            self.engine.backward_sums([loss.total for loss in losses], [one.global_count for one in drawn])
        self.engine.step_members([self._rate(member) for member in self.members])
        for number, loss, member_step, one in zip(alive, losses, population.members, drawn, strict=True):
            member = self.members[number]
            row, run, settings = member_step.row, member_step.run, member_step.settings
            delta = carried_delta(loss, row, run, settings, backbone.dtype)
            member.progress.carried = Carried(mine=delta) if delta is not None else None
            member.meter.add(loss, row, member.progress.step, one.shares)
            member.progress.step += 1

    def _drawn(self, member: Member) -> Drawn:
        member.serve()
        return member.trainer.drawn(member.progress)

    def _trained(self, alive: Sequence[int]) -> Tensor:
        trained = self.engine.trained()
        if len(alive) == len(self.members):
            return trained
        parts = trained.split(self.engine.rows)
        return torch.cat([parts[number] for number in alive])

    def _options(self, steps: Sequence[MemberStep]) -> PassOptions:
        """Chunks of a micro-batch's share of all members' rows."""
        examples = sum(step.row.num_examples for step in steps)
        return PassOptions(max_rows=-(-examples // steps[0].run.gradient_accumulation_steps))

    def _rate(self, member: Member) -> MemberRate:
        run = member.trainer.run
        if member.failed:
            return MemberRate(0.0)
        return MemberRate(learning_rate(run, member.progress.step), run.weight_decay, run.max_grad_norm)

    def _after_step(self, member: Member, stopped: int) -> None:
        member.progress.stopped_by = stopped
        member.serve()
        try:
            member.trainer.after_step(member.progress, member.meter)
        except NonFiniteLossError as error:
            member.failed = str(error).split(";")[0]
            kept = f"the prompt of step {member.progress.best_step} stays" if member.progress.best else "none is kept"
            log.warning("warning: member %s: %s; %s, the others go on", member.name, member.failed, kept)
            output = OutputGuard(self.ranks, member.trainer.output_dir)
            if self.ranks.is_main:
                with output.writing():
                    write_json(output.folder / FAILED, {"step": member.progress.step, "failed": member.failed})
            output.agree()

    def _tell(self, step: int, steps: int) -> None:
        """A line on the console where a step was logged, and one where prompts were scored."""
        run = self.members[0].trainer.run
        latest = [self.members[number].trainer.monitor.latest for number in self.alive]
        scored = step == steps or (run.eval_every and step % run.eval_every == 0)
        if not latest or not (scored or step % run.log_every == 0):
            return
        losses, seconds = [values.get("loss", 0.0) for values in latest], latest[0].get("step_seconds", 0.0)
        log.info(
            "step %d/%d  %d members  loss %.4f (%.4f to %.4f)  %.2f s/step  %.0f s left",
            step, steps, len(latest), mean(losses), min(losses), max(losses), seconds, (steps - step) * seconds,
        )  # fmt: skip
        if scored:
            scores = [held.score for number in self.alive if (held := self.members[number].progress.best) is not None]
            if scores:
                log.info(
                    "step %d  selection rows, prompts that are kept: score %.3f (%.3f to %.3f)",
                    step, mean(scores), min(scores), max(scores),
                )  # fmt: skip
