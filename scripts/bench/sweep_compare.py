"""What family_sweep.py compares: the project's scores and gradients with plain passes of an untouched model."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sweep_models import END, FIRST_TOKEN, LABELS, MASK, VOCABULARY
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import Head, is_trained
from ptp_ds.packing.layouts import Rows, SeparateRows, TreeRows
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb import Noise
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.prompts.deep import join_deep
from ptp_ds.tasks.example import Example
from ptp_ds.training.step import ptp_loss, settings_of

PROMPT = 4
_LENGTHS = (40, 3, 17, 1, 26)  # tokens of the contexts: some beyond every window, some much shorter
_ANSWERS = {
    "ragged": [(2, 1, 3), (1, 1), (3, 2, 1), (2, 2), (1, 3)],
    "single": [(1, 1), (1, 1, 1), (1, 1), (1, 1), (1, 1)],
    "labels": [(1,) * LABELS] * 5,
}  # fmt: skip


def make_examples(kind: str, shape: str, room: int) -> list[Example]:
    """Rows of very different lengths, each at most `room` tokens behind the prompt."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(FIRST_TOKEN, VOCABULARY - 4, (count,), generator=generator).tolist()

    examples, beside = [], 3 + (kind != "causal")
    for number, (length, sizes) in enumerate(zip(_LENGTHS, _ANSWERS[shape], strict=True)):
        context = draw(max(1, min(length, room - beside)))
        movable = [len(context) == 1 or place % 3 != 0 for place in range(len(context))]
        answers = [draw(size) for size in sizes]
        examples.append(Example(context_ids=context, movable=movable, candidate_ids=answers, gold=0, index=number))
    return examples


@dataclass
class Plain:
    """An untouched model that scores one example at a time, without padding, every time as a fresh copy.

    how: the inputs enter as "ids", as "embeds", or as ids whose embeddings a "hook" replaces.
    """

    model: Any
    kind: str
    how: str = "ids"

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """[n, H] what the model's input embedding makes of ids."""
        return copy.deepcopy(self.model.get_input_embeddings())(torch.tensor(ids, dtype=torch.int64))

    def logits(self, ids: Sequence[int], inputs_LH: Tensor, tensors: Mapping[str, Tensor], **more: Any) -> Tensor:
        """Logits of one row; tensors: those of a trained head."""
        model, arguments = copy.deepcopy(self.model), dict(more)
        if self.how == "embeds":
            arguments["inputs_embeds"] = inputs_LH[None]
        else:
            arguments["input_ids"] = torch.tensor([list(ids)])
        if self.kind in ("causal", "seq2seq"):
            arguments["use_cache"] = False
        used: list[bool] = []

        def replaced(module: Any, args: Any, output: Tensor) -> Tensor:
            if used or output.shape[-2:] != inputs_LH.shape:
                return output
            used.append(True)
            return inputs_LH.view(output.shape)

        if self.how == "hook":
            model.get_input_embeddings().register_forward_hook(replaced)
        out = torch.func.functional_call(model, dict(tensors), kwargs=arguments).logits[0]
        if self.how == "hook" and not used:
            raise RuntimeError("its input embedding isn't called")
        return out

    @torch.no_grad()
    def looks_ahead(self, ids: Sequence[int]) -> bool:
        """Whether a token's logits change with what stands behind it, or with how much does."""
        start = len(ids) // 2
        short, long = (self.logits(part, torch.empty(0), {})[:start] for part in (ids[:start], ids))
        return relative(long, short) > 1e-4

    def scores(
        self, example: Example, prompt_ids: Sequence[int], prompt_PH: Tensor, tensors: Mapping[str, Tensor],
        delta_LH: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[C] scores of an example's answers."""
        context = self.embed(example.context_ids)
        context = context if delta_LH is None else context + delta_LH
        scores = []
        for number, answer in enumerate(example.candidate_ids):
            behind = {"causal": [*answer], "masked": [MASK] * len(answer) + [END]}.get(self.kind, [END])
            ids = [*prompt_ids, *example.context_ids, *behind]
            inputs = torch.cat([prompt_PH, context, self.embed(behind)])
            more = {}
            if self.kind == "seq2seq":
                start = self.model.config.decoder_start_token_id
                more["decoder_input_ids"] = torch.tensor([[start, *answer[:-1]]])
            logits = self.logits(ids, inputs, tensors, **more)
            scores.append(self._score(logits, answer, number, PROMPT + len(example.context_ids)))
        return torch.stack(scores)

    def _score(self, logits: Tensor, answer: Sequence[int], number: int, end: int) -> Tensor:
        if self.kind == "classes":
            return logits[number]
        if self.kind == "seq2seq" and logits.shape[0] != len(answer):
            raise ValueError("it has no decoder of its own: decoder_input_ids are ignored")
        first = {"causal": end - 1, "masked": end, "seq2seq": 0}[self.kind]
        log_probs = logits.log_softmax(-1)
        return torch.stack([log_probs[first + place, token] for place, token in enumerate(answer)]).sum()


@dataclass
class Case:
    """A model as it is and the project's view of it; shapes: sets of examples, the one whose answers differ first."""

    plain: Plain
    backbone: Backbone
    prompt_ids: list[int]
    shapes: list[list[Example]]
    trained: Tensor

    def split(self, trained: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the prompt, the head's tensors)."""
        return self.backbone.head.split(trained)

    def truth(self, examples: Sequence[Example], trained: Tensor, deltas: Sequence[Tensor] | None = None) -> Tensor:
        """[B, C] plain scores, -inf where there is no answer."""
        prompt, tensors = self.split(trained)
        rows = [
            self.plain.scores(example, self.prompt_ids, prompt, tensors, None if deltas is None else deltas[number])
            for number, example in enumerate(examples)
        ]
        width = max(len(row) for row in rows)
        return torch.stack([F.pad(row, (0, width - len(row)), value=float("-inf")) for row in rows])


def scores_of(backbone: Backbone, row: PackedRow, trained: Tensor, delta_TH: Tensor | None = None) -> Tensor:
    """[B, C] scores through the project's own pass."""
    inputs = backbone.inputs(row, trained, clean=delta_TH is None, delta_TH=delta_TH)
    return backbone.score(row, inputs, trained)[0]


def places_of(backbone: Backbone, row: PackedRow, examples: Sequence[Example]) -> list[list[int]]:
    """Where each example's context lies among the row's tokens."""
    found, start = [], 0
    for example, length in zip(examples, row.lengths, strict=True):
        found.append([start + place for place in backbone.rows.context_places(example, 0)])
        start += length
    return found


def rows_of(kind: str) -> Rows:
    """The rows that a run with such a head has."""
    return TreeRows() if kind == "causal" else SeparateRows(kind=kind, prompt_length=PROMPT, mask_id=MASK, tail=(END,))


def head_of(model: Any, kind: str) -> Head:
    """The head that a run has: a classifier's tensors are trained."""
    named = model.named_parameters() if kind == "classes" else []
    return Head(kind, False, {name: tuple(p.shape) for name, p in named if is_trained(name)})


def make_case(plain: Plain, backbone: Backbone, room: int) -> Case:
    """A prompt of real tokens, the model's own classifier, rows that fit."""
    kind, model = plain.kind, plain.model
    shapes = ["labels"] if kind == "classes" else ["ragged", "single"]
    prompt_ids = list(range(FIRST_TOKEN + 3, FIRST_TOKEN + 3 + 5 * PROMPT, 5))
    values = dict(model.named_parameters())
    tensors = {name: values[name] for name in backbone.head.trained}
    trained = backbone.head.join(plain.embed(prompt_ids), tensors).detach()
    return Case(plain, backbone, prompt_ids, [make_examples(kind, shape, room) for shape in shapes], trained)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of scores in units of their deviation; infinite where they are absent or no numbers.

    What the scores' own precision can't hold is no difference.
    """
    present = torch.isfinite(wanted)
    if found.shape != wanted.shape or not torch.equal(torch.isfinite(found), present):
        return float("inf")
    rounding = 4 * torch.finfo(wanted.dtype).eps * wanted[present].abs()
    return float(((found - wanted)[present].abs() - rounding).clamp_min(0).max() / wanted[present].std())


def relative(found: Tensor, wanted: Tensor) -> float:
    """l2 distance of gradients relative to the right one's norm; none where both are zero."""
    apart = (found - wanted).norm()
    return float((apart / wanted.norm()).nan_to_num(float("inf"))) if apart != 0 else 0.0


@torch.no_grad()
def compare_scores(case: Case) -> float:
    """The largest distance of the project's scores from plain ones that entered as ids."""
    worst = 0.0
    for examples in case.shapes:
        row = case.backbone.rows.pack(examples)
        worst = max(worst, distance(scores_of(case.backbone, row, case.trained), case.truth(examples, case.trained)))
    return worst


def compare_gradients(case: Case) -> dict[str, float]:
    """Relative distances of a random projection's gradients: to the prompt, a trained head, the contexts' deltas."""
    examples = case.shapes[0]
    row = case.backbone.rows.pack(examples)
    generator, like = torch.Generator().manual_seed(7), case.trained
    size = 0.3 * float(case.split(like)[0].norm(dim=-1).mean()) / like.shape[1] ** 0.5
    starts = [
        size * torch.randn(len(example.context_ids), like.shape[1], generator=generator).to(like)
        for example in examples
    ]
    weights = torch.randn(row.present.shape, generator=generator).to(like)
    gradients = []
    for is_ours in (True, False):
        trained = like.clone().requires_grad_()
        deltas = [start.clone().requires_grad_() for start in starts]
        if is_ours:
            moved = torch.tensor([place for places in places_of(case.backbone, row, examples) for place in places])
            zeros = torch.zeros(row.num_tokens, like.shape[1]).to(like)
            scores = scores_of(case.backbone, row, trained, zeros.index_copy(0, moved, torch.cat(deltas)))
        else:
            scores = case.truth(examples, trained, deltas)
        total = (torch.where(row.present, scores, 0.0) * weights).sum()
        of_trained, *of_deltas = torch.autograd.grad(total, [trained, *deltas])
        gradients.append((of_trained[:PROMPT], of_trained[PROMPT:], torch.cat(of_deltas)))
    names = ("prompt", "head", "delta")
    return {name: relative(a, b) for name, a, b in zip(names, *gradients, strict=True) if a.numel()}


def compare_step(case: Case, perturbation: str) -> float:
    """Relative distance of a train step's gradient; the plain one is given the delta that the step found."""
    examples = unlikely_golds(case, case.shapes[-1 if perturbation == "pgd" else 0])
    found, deltas = step_of(case.backbone, case.trained, examples, perturbation)
    plain = case.trained.clone().requires_grad_()
    clean, perturbed = case.truth(examples, plain), case.truth(examples, plain, deltas)
    total = sum(_loss(*pair, example.gold) for *pair, example in zip(clean, perturbed, examples, strict=True))
    return relative(found, torch.autograd.grad(total, plain)[0])


def unlikely_golds(case: Case, examples: Sequence[Example]) -> list[Example]:
    """The examples, the least likely answer being the right one of each."""
    with torch.no_grad():
        clean = case.truth(examples, case.trained)
    unlikely = torch.where(torch.isfinite(clean), clean, float("inf")).argmin(-1).tolist()
    return [replace(example, gold=gold) for example, gold in zip(examples, unlikely, strict=True)]


def step_of(
    backbone: Backbone, trained: Tensor, examples: Sequence[Example], perturbation: str
) -> tuple[Tensor, list[Tensor]]:
    """(gradient of the project's train step to what is trained, each context's delta)."""
    row = backbone.rows.pack(examples)
    run = RunConfig(
        perturbation=perturbation,
        divergence="sym_kl",
        divergence_gradient="both",
        reg_weight=0.7,
        sigma=0.3,
        epsilon=0.3,
    )
    settings = settings_of(run, backbone.mean_embedding_norm())
    ours = trained.clone().requires_grad_()
    with backbone.shards.outside_layers():
        step = ptp_loss(ours, backbone, row, run, settings, Noise(3, 4), PassOptions(max_rows=2))
        (found,) = torch.autograd.grad(step.total, ours)
    assert step.delta is not None
    return found, [step.delta.detach()[torch.tensor(places)] for places in places_of(backbone, row, examples)]


@torch.no_grad()
def compare_deep(case: Case) -> float:
    """The distance of scores behind a deep prompt, made of a soft one's keys and values, from plain soft scores.

    ValueError where the family takes no deep prompt.
    """
    backbone, worst = case.backbone, 0.0
    deep = join_deep(backbone.cache_prefix(case.trained), backbone.model.config)
    backbone.serve("deep", TreeRows("deep"), PROMPT)
    for examples in case.shapes:
        scores = scores_of(backbone, backbone.rows.pack(examples), deep)
        worst = max(worst, distance(scores, case.truth(examples, case.trained)))
    backbone.serve("soft", rows_of(case.plain.kind), PROMPT)
    return worst


def _loss(clean: Tensor, perturbed: Tensor, gold: int) -> Tensor:
    """One example's cross-entropy and 0.7 times the symmetric divergence, from their definitions."""
    present = torch.isfinite(clean)
    log_p, log_q = clean[present].log_softmax(-1), perturbed[present].log_softmax(-1)
    return -log_p[gold] + 0.7 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
