"""The train loop of several prompts: each member's own Trainer says what it trains on and keeps its records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import OutputGuard
from ptp_ds.ranks.log import get_logger
from ptp_ds.ranks.signals import StopRequest
from ptp_ds.ranks.watchdog import Watchdog
from ptp_ds.tasks.example import Example
from ptp_ds.training.carried import Carried
from ptp_ds.training.checkpoint import prune
from ptp_ds.training.drawn import Ahead, Drawn
from ptp_ds.training.engine import Engine
from ptp_ds.training.evaluate import Evaluation, Questions, evaluation_of, score_prompts
from ptp_ds.training.failed import write_failure
from ptp_ds.training.member_adamw import MemberRate
from ptp_ds.training.meter import Meter
from ptp_ds.training.micro_batches import summed
from ptp_ds.training.population_engine import MemberEngine, PopulationEngine
from ptp_ds.training.population_monitor import PopulationMonitor
from ptp_ds.training.population_step import MemberStep, PopulationRow, population_loss, population_row
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.progress import Progress
from ptp_ds.training.schedules import learning_rate
from ptp_ds.training.step import StepLoss, carried_delta, loss_of_all
from ptp_ds.training.trainer import NonFiniteLossError, Trainer

log = get_logger(__name__)


@dataclass
class Member:
    """One prompt of a population. failed: the sentence that ended its training, '' while it goes on."""

    name: str
    prepared: Prepared
    trainer: Trainer
    progress: Progress
    meter: Meter
    failed: str = ""

    @property
    def trains(self) -> bool:
        """Whether it has steps left."""
        return not self.failed and self.trainer.goes_on(self.progress)

    def serve(self) -> None:
        """Rows are this member's from now on: where prompts stand in every row, each has its own length."""
        run = self.prepared.run
        self.trainer.engine.backbone.serve(run.prompt, self.prepared.rows, run.prompt_length)


def member_engine(engine: PopulationEngine, number: int) -> Engine:
    """What a member's Trainer is given: prompt, state and gradient norm are its own; it never steps."""
    return cast(Engine, MemberEngine(engine, number))


@dataclass(frozen=True, kw_only=True)
class PopulationTrainer:
    """members: in the order of their prompts in the engine. output: of what is written about all of them."""

    engine: PopulationEngine
    members: Sequence[Member]
    ranks: Ranks
    watchdog: Watchdog
    monitor: PopulationMonitor
    output: OutputGuard

    @property
    def alive(self) -> list[int]:
        """Numbers of the members that train."""
        return [number for number, member in enumerate(self.members) if member.trains]

    def scores(
        self, members: Sequence[Member], prompts: Sequence[Tensor], examples: Sequence[Sequence[Example]]
    ) -> list[Tensor]:
        """Scores of each member's examples with a prompt of its own, in shared passes; all ranks must call it."""
        asked = [
            Questions(prompt, rows, member.prepared.rows)
            for member, prompt, rows in zip(members, prompts, examples, strict=True)
        ]
        budget = self.members[0].trainer.run.eval_tokens
        return score_prompts(self.engine.backbone, asked, self.ranks, budget, self.watchdog.beat)

    def evaluate(
        self, members: Sequence[Member], prompts: Sequence[Tensor], examples: Sequence[Sequence[Example]]
    ) -> list[Evaluation]:
        """The metrics of `scores`."""
        scores = self.scores(members, prompts, examples)
        return [
            evaluation_of(scores_NC, rows, member.prepared.task)
            for scores_NC, rows, member in zip(scores, examples, members, strict=True)
        ]

    def train(self) -> int:
        """Steps all members while any has steps left, or until a signal, whose number it returns. All ranks call it."""
        stop = StopRequest(self.ranks)
        try:
            self._score_ends()
            while alive := self.alive:
                self.watchdog.doing(f"optimizer step {self.members[alive[0]].progress.step + 1}")
                self._step()
                stopped = stop.agreed()
                self._after_step([self.members[number] for number in alive], stopped)
                if stopped:
                    return stopped
        finally:
            stop.restore()
        return 0

    def _step(self) -> None:
        alive, backbone = tuple(self.alive), self.engine.backbone
        members = [self.members[number] for number in alive]
        step = members[0].progress.step
        with backbone.shards.outside_layers():  # once for attacks and the step
            drawn, rows = self._ahead.take((step, alive))
            carried = [one.parted(self._carried(member)) for one, member in zip(drawn, members, strict=True)]
            rows = [row.carrying([deltas[part] for deltas in carried]) for part, row in enumerate(rows)]
            counts = [one.global_count for one in drawn]

            def loss_of(trained: Tensor, row: PopulationRow) -> tuple[Tensor, list[StepLoss]]:
                options = PassOptions(self._most_rows(row, len(rows)), plan=row.plan)
                losses = population_loss(trained, backbone, row, options)
                total = self.engine.joint([loss.total for loss in losses], counts)
                return total, [replace(loss, total=loss.total.detach()) for loss in losses]

            total, found = summed(self._trained(alive), rows, loss_of)
            self.engine.backward_joint(total, counts)
        if all(member.trainer.may_look_ahead for member in members) and step + 1 < members[0].trainer.run.max_steps:
            self._ahead.prepare((step + 1, alive))
        self.engine.step_members([self._rate(member) for member in self.members])
        for place, (member, one) in enumerate(zip(members, drawn, strict=True)):
            self._record(member, one, [losses[place] for losses in found], [row.members[place] for row in rows])

    def _record(self, member: Member, drawn: Drawn, losses: Sequence[StepLoss], steps: Sequence[MemberStep]) -> None:
        """A member's losses and the deltas that it carries on, of each of its rows."""
        dtype = self.engine.backbone.dtype
        delta = drawn.joined(
            [
                carried_delta(loss, step.row, step.run, step.settings, dtype)
                for loss, step in zip(losses, steps, strict=True)
            ]
        )
        member.progress.carried = Carried(mine=delta) if delta is not None else None
        broken = member.trainer.engine.broken()
        member.meter.add(loss_of_all(losses), drawn.examples, member.progress.step, drawn.shares, broken)
        member.progress.step += 1

    def _carried(self, member: Member) -> Tensor | None:
        member.serve()
        return member.trainer.carried(member.progress)

    @cached_property
    def _ahead(self) -> Ahead[tuple[int, tuple[int, ...]], tuple[list[Drawn], list[PopulationRow]]]:
        return Ahead(lambda key: self._drawn(*key))

    def _drawn(self, step: int, alive: Sequence[int]) -> tuple[list[Drawn], list[PopulationRow]]:
        """What the members `alive` train on in optimizer step `step`: each one's, and a row of all of them on the
        device for each micro-batch."""
        parts, drawn, members = self._parts(step, alive), [], [self.members[number] for number in alive]
        for member in members:
            member.serve()
            drawn.append(member.trainer.drawn(step, parts))
        prompts, rows = [self.engine.lengths[number] for number in alive], []
        for part in range(parts):
            steps = [
                MemberStep(member.trainer.run, member.trainer.settings, one.noise, one.rows[part])
                for member, one in zip(members, drawn, strict=True)
            ]
            population = population_row(steps, prompts, self.engine.backbone.shares_passes)
            rows.append(self._planned(population, parts).to(self.ranks.device))
        return drawn, rows

    def _parts(self, step: int, alive: Sequence[int]) -> int:
        """Micro-batches that the step takes one after the other, each with rows of all members."""
        activations = self.engine.backbone.activations
        if activations.schedule == "breadth":
            return 1
        shares, prefix, sections = [], 0, self.members[alive[0]].trainer.run.gradient_accumulation_steps
        for member in (self.members[number] for number in alive):
            member.serve()
            shares.append(member.trainer.share(step))
            prefix += member.trainer.prefix
        tokens, fewest = zip(*shares, strict=True)
        return min(activations.parts(sum(tokens), prefix, sections), *fewest)

    def _planned(self, population: PopulationRow, parts: int) -> PopulationRow:
        """With the joined row's plan, where rows are joined."""
        backbone, row = self.engine.backbone, population.row
        if row is None:
            return population
        lengths = backbone.prefix_lengths(row, population.prompts[0])
        plan = backbone.plan(row, lengths, self._most_rows(population, parts), self.ranks.device)
        return replace(population, plan=plan)

    def _trained(self, alive: Sequence[int]) -> Tensor:
        trained = self.engine.trained()
        if len(alive) == len(self.members):
            return trained
        parts = trained.split(self.engine.lengths)
        return torch.cat([parts[number] for number in alive])

    def _most_rows(self, population: PopulationRow, parts: int) -> int:
        """A micro-batch's share of all members' rows, where they go side by side."""
        examples = sum(member.row.num_examples for member in population.members)
        return -(-examples // (population.members[0].run.gradient_accumulation_steps if parts == 1 else 1))

    def _rate(self, member: Member) -> MemberRate:
        run = member.trainer.run
        if member.failed:
            return MemberRate(0.0)
        return MemberRate(learning_rate(run, member.progress.step), run.weight_decay, run.max_grad_norm)

    def _after_step(self, members: Sequence[Member], stopped: int) -> None:
        """Logs, scores and saves the members that made this step, where it is one for it; see Trainer.after_step."""
        step = members[0].progress.step
        for member in members:
            member.progress.stopped_by = stopped
        due = members[0].trainer.due(members[0].progress)  # the same for all: none of its settings is a member's own
        self.monitor.tick(step, len(members))
        if not due.logs:
            return
        guards = {member.name: OutputGuard(self.ranks, member.trainer.output_dir) for member in members}
        whole = [member for member in members if self._logged(member, guards[member.name])]
        with self.output.writing():
            self.monitor.train(step, [member.trainer.monitor.latest for member in whole])
        ending = [member for member in whole if member.trainer.ends_here(member.progress)]
        if chosen := whole if due.evaluates else ending:
            chosen = self._select(chosen, guards)
            whole = [member for member in whole if not member.failed]
            by_callback = [member.name for member in chosen if member.trainer.ends_here(member.progress)]
            ended = [member.name for member in chosen if not member.trains and not member.progress.ended]
            self.monitor.ended(step, ended, by_callback)
        self._save([member for member in whole if due.saves or not member.trains], guards, step)
        for member in whole:
            member.meter.restart_clock()

    def _score_ends(self) -> None:
        """See Trainer.lacks_end."""
        members = [one for one in self.members if not one.failed and one.trainer.lacks_end(one.progress)]
        if members:
            guards = {member.name: OutputGuard(self.ranks, member.trainer.output_dir) for member in members}
            self._save(self._select(members, guards), guards, members[0].progress.step)

    def _save(self, members: Sequence[Member], guards: Mapping[str, OutputGuard], step: int) -> None:
        for member in members:
            self.watchdog.doing(f"saving step {step} of {member.name}")
            member.serve()
            member.trainer.save(member.progress, guards[member.name], prunes=False)
        for guard in guards.values():
            guard.agree()
        self._prune(members, step)  # not before all have saved: a job that is killed goes on from a step that all have
        self.output.agree()

    def _logged(self, member: Member, output: OutputGuard) -> bool:
        """Whether the member's step was a whole one; one whose loss or gradient is not finite ends here."""
        try:
            member.trainer.log(member.progress, member.meter, output)
        except NonFiniteLossError as error:
            self.fail(member, error, output)
        return not member.failed

    def fail(self, member: Member, error: NonFiniteLossError, output: OutputGuard) -> None:
        """Ends a member's training; the prompt that it keeps stays."""
        member.failed = str(error).split(";")[0]
        kept = f"the prompt of step {member.progress.best_step} stays" if member.progress.best else "none is kept"
        log.warning("warning: member %s: %s; %s, the others go on", member.name, member.failed, kept)
        if self.ranks.is_main:
            with output.writing():
                write_failure(output.folder, member.failed, member.progress, member.trainer.identity)

    def _select(self, members: Sequence[Member], guards: Mapping[str, OutputGuard]) -> list[Member]:
        """Scores prompts on the selection rows; the members without those whose scores are not finite, which end."""
        step = members[0].progress.step
        self.watchdog.doing(f"the evaluation behind step {step}")
        prompts = [member.trainer.engine.kept() for member in members]
        results = self.evaluate(members, prompts, [member.trainer.select_examples for member in members])
        for member, prompt, result in zip(members, prompts, results, strict=True):
            try:
                member.trainer.select(member.progress, prompt, result, guards[member.name])
            except NonFiniteLossError as error:
                self.fail(member, error, guards[member.name])
        whole = {number: member for number, member in enumerate(members) if not member.failed}
        with self.output.writing():
            self.monitor.evaluation(step, "select", [results[number] for number in whole])
        kept = [held.score for member in whole.values() if (held := member.progress.best) is not None]
        self.monitor.selected(step, kept)
        return list(whole.values())

    def _prune(self, members: Sequence[Member], step: int) -> None:
        if self.ranks.is_main:
            with self.output.writing():
                for member in members:
                    prune(member.trainer.output_dir / "checkpoints", step, member.trainer.run.keep_checkpoints)
