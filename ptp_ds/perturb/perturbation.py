"""What a perturbation is: functions that make the second stream, and the flags that reach them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb.noise import Noise
from ptp_ds.perturb.parameters import Parameter
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.perturb.shared_pass import SharedPass
from ptp_ds.perturb.text_scoring import TextScorer
from ptp_ds.tasks.example import Example


@dataclass(frozen=True)
class Twin:
    """A context in other words, of any length.

    movable: which of its tokens may still get a delta. prompt_at: where the prompt stands in the text, how many of its
    tokens are before it; None for as many as in the clean context, which has then as many tokens.
    """

    context_ids: Sequence[int]
    movable: Sequence[bool]
    prompt_at: int | None = None


Find = Callable[["SharedPass | None", PackedRow, Tensor, PerturbSettings, Noise], Tensor]


@dataclass(frozen=True)
class Attacked:
    """An attack's twins, and what the log tells of it: by name, (this rank's sum, the sum that it is a share of)."""

    twins: Sequence[Twin]
    shares: dict[str, tuple[float, float]]


Twins = Callable[[Sequence[Example], PerturbSettings, Noise], list[Twin]]
Attack = Callable[[TextScorer, PerturbSettings], Attacked]


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """How the second stream differs: in embedding space, in text space, or in both.

    find(shared, row, clean_TH, settings, noise) -> delta_TH. twins(examples, settings, noise) -> each example's context
    in other words; attack(scorer, settings) the same for the scorer's examples, found with its losses and gradients.
    start: where `find` is K times SharedPass.ascend, what it begins at, so that several prompts climb in one pass.
    Beside twins or attack, find gets no SharedPass and adds to the twins' tokens. sizes: settings that make it zero
    where they are 0. reads: flags it reads besides. carries: whether a batch is used for K optimizer steps, its delta
    moved after each (see ascend). parameters: a file's own, by name (see --perturbation_args and PerturbSettings.own);
    sizes may name them as well.
    """

    find: Find | None = None
    start: Find | None = None
    twins: Twins | None = None
    attack: Attack | None = None
    sizes: tuple[str, ...]
    reads: tuple[str, ...] = ()
    carries: bool = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def in_text(self) -> bool:
        """Whether the second stream has other tokens than the clean one."""
        return self.twins is not None or self.attack is not None
