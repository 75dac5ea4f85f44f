"""An adapter on the model that it was trained on, or several as an ensemble: scores of a split, answers to new rows.

served = serve(["runs/cb"])                      # task, model, head and prompt as on the adapter's card
ranks = start_processes()                        # or alone(): this process
examples = served.examples(split)                # split: adapter_rows, load_rows, or rows of your own
backbone = served.load(whole(), ranks, examples)
scores_NC = served.score(backbone, examples, ranks)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptp_ds.adapters.origin import adapter_model, require_trained_on, trained_max_length, warn_if_overtaken
from ptp_ds.adapters.read import adapter_folder, adapter_kind, fitted_head, read_adapter, stored_head
from ptp_ds.adapters.task import ensemble_plan, ensemble_task
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import checked_backbone
from ptp_ds.backbone.loading import ResolvedDeepSpeed, load_backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.files import listed
from ptp_ds.models.heads import auto_class, rows_for
from ptp_ds.models.positions import row_room
from ptp_ds.models.source import BackboneSource, load_config, load_tokenizer, resolve_model
from ptp_ds.packing.layouts import Rows
from ptp_ds.precision import dtype_of
from ptp_ds.prompts import prompt_width
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.log import get_logger
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split, tokenise
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import Questions, ensemble_scores, score_prompts

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What `serve` found. folders: one adapter, or an ensemble's. model: by the name that it was asked for.

    task: the one to answer, its classes in the order that a trained classifier knows. kind, prompts: soft [P, H] or
    deep [P, D] each. heads: what lies beside each prompt (see stored_head), read with it, so that neither is another
    run's and nothing is read when rows are scored. rows: how examples become rows. room: tokens of a row that fit
    behind the prompt.
    """

    folders: tuple[Path, ...]
    model: str
    source: BackboneSource
    task: Task
    kind: str
    prompts: tuple[Tensor, ...]
    heads: tuple[dict[str, Tensor], ...]
    rows: Rows
    room: int

    @property
    def prompt_length(self) -> int:
        """P, virtual tokens."""
        return self.prompts[0].shape[0]

    def examples(self, split: Split, labelled: bool = False, left: int = 0) -> Sequence[Example]:
        """The split's examples, with room for `left` tokens behind each; warns of rows that had to be shortened.

        labelled: whether the rows' labels are read; without, the warning names the first of these rows. Raises
        ValueError for rows that don't fit (see tokenise).
        """
        task, source = self.task, self.source
        found = tokenise(task, split, source.tokenizer, self.room - left, labelled, source.head_plan.kind)
        if found.truncated:
            many = "1 row was" if found.truncated == 1 else f"{found.truncated} rows were"
            behind = f" and {left} tokens behind it" if left else ""
            which = "" if labelled else f" ({listed(found.shortened, 5)})"
            log.warning("%s longer than the context%s: shortened in %r%s", many, behind, task.truncate, which)
        if some := found.undecided:
            count = "1 row has" if len(some) == 1 else f"{len(some)} rows have"
            log.warning("%s a right and a wrong answer of the same tokens (%s)", count, listed(some, 3))
        return found.examples

    def load(self, deepspeed_config: ResolvedDeepSpeed, ranks: Ranks, examples: Sequence[Example] = ()) -> Backbone:
        """The backbone, loaded, checked and ready for this prompt's rows; every rank must call it.

        examples: what will be scored; the check then tries rows that are as long.
        """
        loaded = load_backbone(self.source.folder, deepspeed_config, ranks, self.source.head_plan, share=True)
        longest = max((example.path_length for example in examples), default=0)
        longest = longest and longest + self.prompt_length + self.rows.extra_tokens
        backbone, _ = checked_backbone(loaded, longest, ranks)
        backbone.serve(self.kind, self.rows, self.prompt_length)
        return backbone

    def plain(self, precision: str = "auto", attention: str | None = None) -> Any:
        """The model as transformers loads it, in this process, for generation: a Backbone's is bound to packed rows.

        attention: transformers' attn_implementation, None for its own choice.
        """
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.source.folder, config=self.source.config, dtype=whole(precision).dtype, attn_implementation=attention,
            use_safetensors=True, trust_remote_code=False,
        )  # fmt: skip
        return model.to(alone().device).eval().requires_grad_(False)

    def score(
        self, backbone: Backbone, examples: Sequence[Example], ranks: Ranks, budget: int = RunConfig.eval_tokens
    ) -> Tensor:
        """[N, C] fp32 candidate log-probabilities (see score_examples), an ensemble's by the mean of probabilities.

        budget: tokens of a pass on each rank. Every rank must call it. Raises ValueError where a head doesn't fit.
        """
        asked = [Questions(trained, examples, self.rows) for trained in self.trained(backbone)]
        return ensemble_scores(score_prompts(backbone, asked, ranks, budget))

    def trained(self, backbone: Backbone) -> list[Tensor]:
        """All that is trained of each adapter: the prompt's rows, then those of its head. ValueError: see score."""
        head = backbone.head
        return [
            head.join(prompt, fitted_head(folder, stored, head.trained, head.held))
            for folder, prompt, stored in zip(self.folders, self.prompts, self.heads, strict=True)
        ]


def serve(
    adapters: Sequence[str | Path], *, model: str | None = None, task: Task | str | None = None,
    max_length: int | None = None,
) -> Served:  # fmt: skip
    """The adapters on their model, all but its weights: every check that needs none.

    adapters: folders of adapters, or of the runs that wrote them. model, task, max_length: None for what the first
    adapter was trained with; a model that isn't the adapters' own is refused, another task is taken. Without task, all
    must have been trained on one. Raises ValueError for what doesn't fit together; downloads or converts the model
    first where that is needed.
    """
    folders = tuple(map(adapter_folder, adapters))
    for one in folders:
        warn_if_overtaken(one)
    first, kind = folders[0], adapter_kind(folders[0])
    task = task if isinstance(task, Task) else ensemble_task(folders, task)
    name = adapter_model(first, model)
    folder = resolve_model(name)
    config = load_config(folder)
    require_trained_on(folders, name, folder, config)
    plan, task = ensemble_plan(folders, config, task)
    auto_class(config, plan.kind, folder)
    source = BackboneSource(folder, config, load_tokenizer(folder), plan)
    prompts = [read_adapter(first, prompt_width(kind, config))]
    width, length = prompts[0].shape[1], prompts[0].shape[0]
    prompts += [read_adapter(adapter, width, length, kind) for adapter in folders[1:]]
    heads = tuple(map(stored_head, folders))
    rows = rows_for(plan, task, source.tokenizer, kind, length)
    longest = trained_max_length(first) if max_length is None else max_length
    room = row_room(longest, length, config, plan) - rows.extra_tokens
    return Served(
        folders=folders,
        model=name,
        source=source,
        task=task,
        kind=kind,
        prompts=tuple(prompts),
        heads=heads,
        rows=rows,
        room=room,
    )


def whole(precision: str = "auto") -> ResolvedDeepSpeed:
    """For Served.load: the model whole on each rank. precision: see ptp_ds.precision; ValueError where it can't be."""
    return ResolvedDeepSpeed({"zero_optimization": {"stage": 2}}, [], dtype_of(precision))


def alone() -> Ranks:
    """This process by itself, without a process group, on the GPU where there is one."""
    return Ranks(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
