"""The run's configuration: one flat dataclass whose fields are the flags of scripts/train.py."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ptp_ds.choices import (
    ACTIVATIONS,
    DIVERGENCES,
    GRADIENTS,
    HEADS,
    IMPLS,
    NORMS,
    PERTURBATIONS,
    PRECISIONS,
    SCHEDULES,
    UNITS,
)
from ptp_ds.config.presets import PRESETS
from ptp_ds.hosts.model_files import EMBEDDED_MODEL

if TYPE_CHECKING:  # with torch behind them: --help and what reads settings alone do without
    from ptp_ds.perturb import Perturbation
    from ptp_ds.perturb.custom import ChosenPerturbation
    from ptp_ds.perturb.parameters import Value

DEFAULT_DS_CONFIG = "ds_configs/zero3.json"
# What versions did that had no such setting: where the default is another now, and where a checkpoint must share it.
BEFORE = {
    "divergence_gradient": "both", "average": 0.0, "reg_schedule": "constant", "min_confidence": 0.0,
    "confidence_in": "likeliest", "prompt_residual": None,
}  # fmt: skip


def default_warmup(schedule: str, end: int) -> int:
    """Steps of the learning rate's warm-up where none are given: docs/results.md says why so many.

    A constant rate has no end that is known, so that a run that is extended equals one that was as long from the start.
    """
    return 30 if schedule == "constant" else min(30, end // 5)


def recorded_settings(known: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting as a run that recorded `known` had it: one that its version didn't know is as that version behaved,
    what BEFORE says, or the default."""
    before = {field.name: BEFORE.get(field.name, field.default) for field in fields(RunConfig)}
    return {field.name: _held(field, known.get(field.name, before[field.name])) for field in fields(RunConfig)}


def _held(field: dataclasses.Field, value: Any) -> Any:
    """The value, as a float where the setting is one: 1 and 1.0 are the same, and the same on record."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    return float(value) if whole and field.type in (float, float | None) else value


# --help's groups, in its order, each with what it says
GROUPS = {
    "model": "the frozen model and how DeepSpeed runs it",
    "data": "the task and its rows",
    "prompt": "what is trained",
    "perturbation": "how the second stream differs",
    "objective": "what pulls the two predictions together",
    "optimisation": "batches, steps, AdamW",
    "evaluation": "which prompt is kept, and when training ends",
    "seeds": "one prompt or several at once",
    "memory": "memory and speed; the numbers are the same to rounding",
    "output": "files, logs, resuming",
}


def _flag(default: Any, help: str, choices: Sequence[str] | None = None, *, group: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "group": group})


_model, _data, _prompt, _perturbation, _objective, _optimisation, _evaluation, _seeds, _memory, _output = (
    partial(_flag, group=name) for name in GROUPS
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every setting of a run. Text in the metadata is the flag's help; units are given where there are any."""

    ds_config: str = _model(
        DEFAULT_DS_CONFIG,
        "DeepSpeed JSON, or the name of a packaged one such as zero3; its 'auto' values are filled in from the flags",
    )
    nvme_path: str | None = _model(
        None, "ds_configs/zero3_nvme.json: folder on each host's own NVMe disk, for weight shards"
    )
    model: str = _model(EMBEDDED_MODEL, "hub id, folder, or the embedded smollm2-135m")
    task: str = _data(
        "Reviews",
        "a task of SuperGLUE (BoolQ, CB, COPA, ...), Reviews (packaged demo), or a template .json of your own",
    )
    data_dir: str | None = _data(
        None, "folder with <Task>/<split>.jsonl, .csv or .tsv; default: the packaged demo data"
    )
    dataset: str | None = _data(
        None, "hub dataset id, or a folder in the hub's layout (parquet); instead of --data_dir"
    )
    train_split: str = _data("train", "split that trains the prompt")
    eval_split: str = _data("val", "split that is reported at the end, never used to choose anything")
    select_split: str | None = _data(
        None, "split that chooses the best prompt; default: rows held out of --train_split"
    )
    predict_split: str | None = _data(
        None, "split, labelled or not, to write predictions/<Task>.jsonl for, in SuperGLUE's format; default: none"
    )
    holdout: float = _data(
        0.15, "share of the training rows held out to choose the best prompt, without --select_split"
    )
    max_length: int | None = _data(None, "longest row in tokens, prompt included; default: the backbone's context")
    prompt: str = _prompt("soft", "P trained vectors in front of the row, or P keys and values in every layer",
                        ("soft", "deep"))  # fmt: skip
    head: str = _model("auto", "what predicts: a causal, masked or encoder-decoder language model with answer words, "
                      "or a classifier trained with the prompt; auto: as the model was saved, classes for bare "
                      "encoders", ("auto", *HEADS))  # fmt: skip
    prompt_length: int = _prompt(20, "P, number of virtual tokens")
    prompt_mlp: int | None = _prompt(
        None, "hidden width of an MLP that the prompt trains through, with --lr 0.001 or so; default: no MLP"
    )
    prompt_residual: int | None = _prompt(
        None, "hidden width of a bottleneck whose output is added to the soft prompt in training; default: none"
    )
    prompt_init: str = _prompt("vocab", "initialiser: vocabulary rows, a text, the class words, an adapter",
                             ("vocab", "text", "labels", "adapter"))  # fmt: skip
    init_text: str | None = _prompt(
        None, "text for --prompt_init text; default: the instruction of the task's template"
    )
    init_adapter: str | None = _prompt(
        None, "a run's folder, an adapter's, ours or peft's, or a hub id, for --prompt_init adapter"
    )
    perturbation: str = _perturbation(
        "gaussian", f"how the second stream differs: {', '.join(PERTURBATIONS)}, or a .py file of your own"
    )
    perturbation_args: str | None = _perturbation(
        None, "parameters that the --perturbation file declares, NAME=VALUE each; --help beside that flag lists them"
    )
    preset: str | None = _perturbation(
        None, "perturbation, divergence, lambda, units and sizes of this project or of a published method; "
        "flags win (ptp_ds/config/presets.py)", tuple(PRESETS),
    )  # fmt: skip
    target: str = _perturbation("input", "what a delta in embedding space moves: the example's own words, the soft "
                        "prompt in front of it, or both", ("input", "prompt", "both"))  # fmt: skip
    divergence: str = _objective("kl", "what pulls the two predictions together", DIVERGENCES)
    divergence_gradient: str = _objective(
        "clean_fixed",
        "where the divergence's gradient goes: to both predictions, or to the perturbed one alone, the clean one as a "
        "constant",
        GRADIENTS,
    )
    reg_weight: float = _objective(1.0, "lambda, weight of the divergence")
    reg_warmup_steps: int = _objective(0, "steps over which lambda rises linearly from 0")
    reg_schedule: str = _objective(
        "constant", "lambda after its warm-up: as it is, or falling to 0 where the learning rate's schedule ends",
        ("constant", "linear", "cosine"),
    )  # fmt: skip
    min_confidence: float = _objective(
        0.0,
        "least probability that the clean prediction gives an answer for the row's divergence to count; 0: all rows do",
    )
    confidence_in: str = _objective(
        "likeliest", "which answer --min_confidence means: the likeliest one, or the row's label: above 0.5 no "
        "wrong prediction is held then", ("likeliest", "label"),
    )  # fmt: skip
    mask_share: float = _perturbation(
        0.15, "mask: share of a row's words that the second stream hides, at least one; 0: none"
    )
    mask_token: str | None = _perturbation(
        None, "mask: what stands for a hidden word, one token; default: the model's own mask token, else ' _'"
    )
    a2t_share: float = _perturbation(
        0.1, "a2t: share of an attacked text's words that may be swapped, at least four; 0: none"
    )
    a2t_neighbours: int = _perturbation(8, "a2t: near words that are looked at for each word")
    a2t_min_cosine: float = _perturbation(0.5, "a2t: least cosine of the input embeddings of a word and its neighbour")
    sigma: float = _perturbation(1.0, "gaussian, uniform: noise size of a token, in mean embedding norms")
    epsilon: float = _perturbation(0.1, "pgd, free: radius of the ball, in mean embedding norms")
    alpha: float | None = _perturbation(
        None, "pgd, free: length of an ascent step, in mean embedding norms; default 1.5 epsilon / K"
    )
    ascent_steps: int = _perturbation(
        2, "K: pgd's ascent steps; free: optimizer steps on one batch, an ascent step in each"
    )
    norm: str = _perturbation("frobenius", "pgd, free: the ball's norm", NORMS)
    units: str = _perturbation(
        "relative",
        "1 in sigma, epsilon and alpha: the mean embedding norm, an l2 norm of 1, or 1 in every coordinate",
        UNITS,
    )
    batch_size: int = _optimisation(
        8, "rows of an optimizer step over all ranks and micro-batches, in equal parts; the default is rounded up to a "
        "multiple of these, or that of the run that --resume goes on with",
    )  # fmt: skip
    tokens_per_step: int | None = _optimisation(
        None, "instead of --batch_size: rows are drawn until their tokens, both streams, fill this budget"
    )
    gradient_accumulation_steps: int = _optimisation(1, "micro-batches that one optimizer step is split into")
    activations: str = _memory("auto", "keep layers' activations, compute them again in backward, or keep those of as "
                             "many layers as fit", ACTIVATIONS)  # fmt: skip
    schedule: str = _memory(
        "auto", "breadth: all micro-batches through a layer before the next; depth: one micro-batch through all "
        "layers; auto: depth where each rank has all weights and the activations of a step don't fit, and on the "
        "generic path", SCHEDULES,
    )  # fmt: skip
    chunk_tokens: int | None = _memory(
        None, "tokens that a layer handles at a time (whole rows): bounds memory under recompute; default: 2048, on a "
        "GPU 8192",
    )  # fmt: skip
    lr: float = _optimisation(0.03, "AdamW learning rate of the prompt")
    weight_decay: float = _optimisation(0.0, "AdamW weight decay of the prompt")
    warmup_steps: int | None = _optimisation(
        None,
        "steps over which the learning rate rises linearly from 0; default: 30, but at most a fifth of a schedule that "
        "falls",
    )
    lr_schedule: str = _optimisation("linear", "decay after the warm-up", ("linear", "cosine", "constant"))
    max_grad_norm: float = _optimisation(1.0, "global l2 norm to which gradients are clipped; 0 turns clipping off")
    average: float = _optimisation(
        0.0, "decay of a running mean of the prompt, such as 0.95, which is then scored and saved; 0: the prompt itself"
    )
    max_steps: int = _optimisation(150, "optimizer steps; a resumed run may have more than before")
    schedule_steps: int | None = _optimisation(
        None, "step at which the learning rate's schedule ends, if --max_steps will grow later; default: --max_steps"
    )
    eval_every: int = _evaluation(30, "steps between evaluations on the selection rows; 0: only at the end")
    patience: int = _evaluation(
        0, "evaluations in a row without a higher selection score that end training; 0: it goes on to --max_steps"
    )
    save_every: int = _output(30, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = _output(2, "newest checkpoints kept")
    report_to: str = _output(
        "tensorboard",
        "where scalars and settings go: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio, "
        "several by commas or spaces, or none (docs/tracking.md)",
    )
    log_every: int = _output(5, "steps between log lines")
    eval_tokens: int = _evaluation(4096, "tokens of an evaluation pass on each rank")
    precision: str = _model("auto", "backbone's dtype; auto: bf16 where the hardware computes it natively, else fp32; "
                           "fp16 with dynamic loss scaling", PRECISIONS)  # fmt: skip
    kernels: str = _memory("auto", "fused kernels around the matrix products: Triton's on a CUDA GPU, torch elsewhere",
                         IMPLS)  # fmt: skip
    seed: int = _seeds(0, "seed of initialisation, data order and noise")
    seeds: str | None = _seeds(
        None, "instead of --seed, 0-9 or 0 1 2: a prompt for each seed, all trained at once in one job"
    )
    population: str | None = _seeds(
        None,
        "JSON or YAML file: a list of members, each a name and what differs from the flags; trained at once in one job",
    )
    output_dir: str | None = _output(
        None, "where the run's files go; default: runs/<task>-<perturbation>-<seed>-<time>"
    )
    push_to_hub: str | None = _output(
        None, "owner/name of a hub repository that the adapter is pushed to at the end; default: nothing is pushed"
    )
    hub_visibility: str = _output("public", "of a repository that --push_to_hub makes", ("public", "private"))
    stall_timeout: float = _output(
        1800.0, "seconds that a step, or a pass of an evaluation, may take before the rank ends itself; 0: any time"
    )
    resume: str | None = _output(None, "auto (newest whole checkpoint of --output_dir, if any) or a checkpoint folder")

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _held(field, getattr(self, field.name)))

    @property
    def step_length(self) -> float:
        """alpha with its default, in mean embedding norms."""
        return self.alpha if self.alpha is not None else 1.5 * self.epsilon / max(1, self.ascent_steps)

    @property
    def schedule_end(self) -> int:
        """The step behind which a decaying learning rate is 0."""
        return self.schedule_steps if self.schedule_steps is not None else self.max_steps

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return default_warmup(self.lr_schedule, self.schedule_end)

    @property
    def streams(self) -> int:
        """Streams of a step: 2 with a perturbation."""
        return 2 if self.perturbs else 1

    @cached_property
    def chosen_perturbation(self) -> "ChosenPerturbation":
        """The perturbation by its name; a file of the user's own is run here, once. Raises ValueError (see choose)."""
        from ptp_ds.perturb.custom import choose_perturbation

        return choose_perturbation(self.perturbation)

    @cached_property
    def own_settings(self) -> dict[str, "Value"]:
        """The values of the perturbation file's own parameters, by name. Raises UserError (see values_of)."""
        from ptp_ds.perturb.parameters import values_of

        perturbation = self.chosen_perturbation.perturbation
        declared = perturbation.parameters if perturbation is not None else {}
        return values_of(self.perturbation_args, declared, f"--perturbation {self.perturbation}")

    @property
    def active_perturbation(self) -> "Perturbation | None":
        """How the second stream differs; None where there is none."""
        return self.chosen_perturbation.perturbation if self.perturbs else None

    @property
    def delta_target(self) -> str:
        """What a delta moves, which rows are laid out for: as without --target where there is no second stream."""
        return self.target if self.perturbs else "input"

    @property
    def carries(self) -> bool:
        """Whether deltas are carried from one optimizer step to the next."""
        return self.active_perturbation is not None and self.active_perturbation.carries

    @property
    def batch_repeats(self) -> int:
        """Optimizer steps that use one batch."""
        return self.ascent_steps if self.carries else 1

    @property
    def perturbs(self) -> bool:
        """Whether a second stream is computed: not for lambda = 0 or a delta that can only be zero."""
        perturbation = self.chosen_perturbation.perturbation
        if perturbation is None or not self.reg_weight:
            return False
        values = {**vars(self), **self.own_settings}
        return not perturbation.sizes or any(values[size] > 0 for size in perturbation.sizes)
