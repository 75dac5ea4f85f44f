"""The run's configuration: one flat dataclass whose fields are the flags of scripts/train.py."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ptp_ds.backbone.activations import ACTIVATIONS
from ptp_ds.config.presets import PRESETS
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.kernels import IMPLS
from ptp_ds.models.heads import HEADS
from ptp_ds.objective import DIVERGENCES, GRADIENTS
from ptp_ds.perturb import Perturbation
from ptp_ds.perturb.ball import NORMS
from ptp_ds.perturb.custom import BUILT_IN, ChosenPerturbation, choose_perturbation
from ptp_ds.perturb.parameters import Value, values_of
from ptp_ds.perturb.units import UNITS
from ptp_ds.precision import PRECISIONS

DEFAULT_DS_CONFIG = "ds_configs/zero3.json"
# What versions did that had no such setting: where the default is another now, and where a checkpoint must share it.
BEFORE = {"divergence_gradient": "both", "average": 0.0}


def _flag(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every setting of a run. Text in the metadata is the flag's help; units are given where there are any."""

    ds_config: str = _flag(DEFAULT_DS_CONFIG, "DeepSpeed JSON; its 'auto' values are filled in from the flags")
    nvme_path: str | None = _flag(
        None, "ds_configs/zero3_nvme.json: folder on each host's own NVMe disk, for weight shards"
    )
    model: str = _flag(EMBEDDED_MODEL, "hub id, folder, or the embedded smollm2-135m")
    task: str = _flag(
        "Reviews",
        "a task of SuperGLUE (BoolQ, CB, COPA, ...), Reviews (packaged demo), or a template .json of your own",
    )
    data_dir: str | None = _flag(
        None, "folder with <Task>/<split>.jsonl, .csv or .tsv; default: the packaged demo data"
    )
    dataset: str | None = _flag(
        None, "hub dataset id, or a folder in the hub's layout (parquet); instead of --data_dir"
    )
    train_split: str = _flag("train", "split that trains the prompt")
    eval_split: str = _flag("val", "split that is reported at the end, never used to choose anything")
    select_split: str | None = _flag(
        None, "split that chooses the best prompt; default: rows held out of --train_split"
    )
    predict_split: str | None = _flag(
        None, "split, labelled or not, to write predictions/<Task>.jsonl for, in SuperGLUE's format; default: none"
    )
    holdout: float = _flag(
        0.15, "share of the training rows held out to choose the best prompt, without --select_split"
    )
    max_length: int | None = _flag(None, "longest row in tokens, prompt included; default: the backbone's context")
    prompt: str = _flag("soft", "P trained vectors in front of the row, or P keys and values in every layer",
                        ("soft", "deep"))  # fmt: skip
    head: str = _flag("auto", "what predicts: a causal, masked or encoder-decoder language model with answer words, or "
                      "a classifier trained with the prompt; auto: as the model was saved, classes for bare encoders",
                      ("auto", *HEADS))  # fmt: skip
    prompt_length: int = _flag(20, "P, number of virtual tokens")
    prompt_mlp: int | None = _flag(
        None, "hidden width of an MLP that the prompt trains through, with --lr 0.001 or so; default: no MLP"
    )
    prompt_init: str = _flag("vocab", "initialiser: vocabulary rows, a text, the class words, an adapter",
                             ("vocab", "text", "labels", "adapter"))  # fmt: skip
    init_text: str | None = _flag(None, "text for --prompt_init text")
    init_adapter: str | None = _flag(None, "folder of an adapter or of its run, for --prompt_init adapter")
    perturbation: str = _flag(
        "gaussian", f"how the second stream differs: {', '.join(BUILT_IN)}, or a .py file of your own"
    )
    perturbation_args: str | None = _flag(
        None, "parameters that the --perturbation file declares, NAME=VALUE each; --help beside that flag lists them"
    )
    preset: str | None = _flag(
        None, "perturbation, divergence, lambda, units and sizes of a published method; flags win (ptp_ds/presets.py)",
        tuple(PRESETS),
    )  # fmt: skip
    target: str = _flag("input", "what a delta in embedding space moves: the example's own words, the soft prompt in "
                        "front of it, or both", ("input", "prompt", "both"))  # fmt: skip
    divergence: str = _flag("kl", "what pulls the two predictions together", tuple(DIVERGENCES))
    divergence_gradient: str = _flag("clean_fixed", "where the divergence's gradient goes: to both predictions, or to "
                                     "the perturbed one alone, the clean one as a constant", GRADIENTS)  # fmt: skip
    reg_weight: float = _flag(1.0, "lambda, weight of the divergence")
    reg_warmup_steps: int = _flag(0, "steps over which lambda rises linearly from 0")
    mask_share: float = _flag(0.15, "mask: share of a row's words that the second stream hides, at least one")
    mask_token: str | None = _flag(
        None, "mask: what stands for a hidden word, one token; default: the model's own mask token, else ' _'"
    )
    a2t_share: float = _flag(0.1, "a2t: share of an attacked text's words that may be swapped, at least four; 0: none")
    a2t_neighbours: int = _flag(8, "a2t: near words that are looked at for each word")
    a2t_min_cosine: float = _flag(0.5, "a2t: least cosine of the input embeddings of a word and its neighbour")
    sigma: float = _flag(1.0, "gaussian, uniform: noise size of a token, in mean embedding norms")
    epsilon: float = _flag(0.1, "pgd, free: radius of the ball, in mean embedding norms")
    alpha: float | None = _flag(
        None, "pgd, free: length of an ascent step, in mean embedding norms; default 1.5 epsilon / K"
    )
    ascent_steps: int = _flag(2, "K: pgd's ascent steps; free: optimizer steps on one batch, an ascent step in each")
    norm: str = _flag("frobenius", "pgd, free: the ball's norm", NORMS)
    units: str = _flag("relative", "1 in sigma, epsilon and alpha: the mean embedding norm, an l2 norm of 1, or 1 in "
                       "every coordinate", tuple(UNITS))  # fmt: skip
    batch_size: int = _flag(8, "rows of an optimizer step over all ranks and micro-batches")
    tokens_per_step: int | None = _flag(
        None, "instead of --batch_size: rows are drawn until their tokens, both streams, fill this budget"
    )
    gradient_accumulation_steps: int = _flag(1, "micro-batches that one optimizer step is split into")
    activations: str = _flag("auto", "keep layers' activations, compute them again in backward, or keep while they fit",
                             ACTIVATIONS)  # fmt: skip
    chunk_tokens: int = _flag(2048, "tokens that a layer handles at a time (whole rows): bounds memory under recompute")
    lr: float = _flag(0.03, "AdamW learning rate of the prompt")
    weight_decay: float = _flag(0.0, "AdamW weight decay of the prompt")
    warmup_steps: int = _flag(5, "steps over which the learning rate rises linearly from 0")
    lr_schedule: str = _flag("linear", "decay after the warm-up", ("linear", "cosine", "constant"))
    max_grad_norm: float = _flag(1.0, "global l2 norm to which gradients are clipped; 0 turns clipping off")
    average: float = _flag(
        0.0, "decay of a running mean of the prompt, such as 0.95, which is then scored and saved; 0: the prompt itself"
    )
    max_steps: int = _flag(150, "optimizer steps; a resumed run may have more than before")
    schedule_steps: int | None = _flag(
        None, "step at which the learning rate's schedule ends, if --max_steps will grow later; default: --max_steps"
    )
    eval_every: int = _flag(30, "steps between evaluations on the selection rows; 0: only at the end")
    patience: int = _flag(
        0, "evaluations in a row without a higher selection score that end training; 0: it goes on to --max_steps"
    )
    save_every: int = _flag(30, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = _flag(2, "newest checkpoints kept")
    log_every: int = _flag(5, "steps between log lines")
    eval_tokens: int = _flag(4096, "tokens of an evaluation pass on each rank")
    precision: str = _flag("auto", "backbone's dtype; auto: bf16 where the hardware computes it natively, else fp32; "
                           "fp16 with dynamic loss scaling", PRECISIONS)  # fmt: skip
    kernels: str = _flag("auto", "fused kernels around the matrix products: Triton's on a CUDA GPU, torch elsewhere",
                         IMPLS)  # fmt: skip
    seed: int = _flag(0, "seed of initialisation, data order and noise")
    seeds: str | None = _flag(
        None, "instead of --seed, 0-9 or 0 1 2: a prompt for each seed, all trained at once in one job"
    )
    population: str | None = _flag(
        None,
        "JSON or YAML file: a list of members, each a name and what differs from the flags; trained at once in one job",
    )
    output_dir: str | None = _flag(None, "where the run's files go; default: runs/<task>-<perturbation>-<seed>-<time>")
    push_to_hub: str | None = _flag(
        None, "owner/name of a hub repository that the adapter is pushed to at the end; default: nothing is pushed"
    )
    hub_visibility: str = _flag("public", "of a repository that --push_to_hub makes", ("public", "private"))
    stall_timeout: float = _flag(
        1800.0, "seconds that a step, or a pass of an evaluation, may take before the rank ends itself; 0: any time"
    )
    resume: str | None = _flag(None, "auto (newest whole checkpoint of --output_dir, if any) or a checkpoint folder")

    @property
    def step_length(self) -> float:
        """alpha with its default, in mean embedding norms."""
        return self.alpha if self.alpha is not None else 1.5 * self.epsilon / max(1, self.ascent_steps)

    @property
    def schedule_end(self) -> int:
        """The step behind which a decaying learning rate is 0."""
        return self.schedule_steps if self.schedule_steps is not None else self.max_steps

    @property
    def streams(self) -> int:
        """Streams of a step: 2 with a perturbation."""
        return 2 if self.perturbs else 1

    @cached_property
    def chosen_perturbation(self) -> ChosenPerturbation:
        """The perturbation by its name; a file of the user's own is run here, once. Raises ValueError (see choose)."""
        return choose_perturbation(self.perturbation)

    @cached_property
    def own_settings(self) -> dict[str, Value]:
        """The values of the perturbation file's own parameters, by name. Raises UserError (see values_of)."""
        perturbation = self.chosen_perturbation.perturbation
        declared = perturbation.parameters if perturbation is not None else {}
        return values_of(self.perturbation_args, declared, f"--perturbation {self.perturbation}")

    @property
    def active_perturbation(self) -> Perturbation | None:
        """How the second stream differs; None where there is none."""
        return self.chosen_perturbation.perturbation if self.perturbs else None

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
