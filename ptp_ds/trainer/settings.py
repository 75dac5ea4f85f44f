"""What PTP adds to a loop: the settings of `ptp train` that a padded batch can follow."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ptp_ds.config.checks import require_valid
from ptp_ds.config.presets import PRESETS
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import brief, nearest

PERTURBATIONS = ("none", "gaussian", "uniform", "mask", "pgd")


@dataclass(frozen=True, kw_only=True)
class PTPSettings:
    """Names, defaults and meanings are those of `ptp train`; sizes are in `units`, mean embedding norms by default.

    perturbation: none, gaussian, uniform, mask or pgd. mask_share: here of a row's tokens, at least one, 0 for none;
    mask_token_id: what stands for a hidden one. seed: of noise, masks and pgd's starts. Raises UserError for what is
    out of range.
    """

    perturbation: str = "gaussian"
    divergence: str = "kl"
    divergence_gradient: str = "clean_fixed"
    reg_weight: float = 1.0
    reg_warmup_steps: int = 0
    min_confidence: float = 0.0
    confidence_in: str = "likeliest"
    units: str = "relative"
    sigma: float = 1.0
    epsilon: float = 0.1
    alpha: float | None = None
    ascent_steps: int = 2
    norm: str = "frobenius"
    mask_share: float = 0.15
    mask_token_id: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.perturbation not in PERTURBATIONS:
            raise UserError(
                f"perturbation is {self.perturbation!r}{nearest(self.perturbation, PERTURBATIONS)}; a loop of your own "
                f"takes {', '.join(PERTURBATIONS)}, the others need `ptp train`."
            )
        if self.perturbation == "mask" and self.mask_token_id is None:
            raise UserError("perturbation mask needs mask_token_id, such as the tokenizer's mask_token_id.")
        for name in ("divergence", "divergence_gradient", "confidence_in", "units", "norm"):
            field = next(field for field in fields(RunConfig) if field.name == name)
            if (value := getattr(self, name)) not in field.metadata["choices"]:
                raise UserError(f"{name} is {value!r}; choose from {', '.join(field.metadata['choices'])}.")
        require_valid(self.run)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "PTPSettings":
        """A published method's settings, as by `ptp train --preset`; changes win."""
        if name not in PRESETS:
            raise UserError(f"Unknown preset {name!r}{nearest(name, list(PRESETS))}; choose from {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    @property
    def run(self) -> RunConfig:
        """The same settings as a run has them."""
        given = {name: value for name, value in asdict(self).items() if name != "mask_token_id"}
        return RunConfig(**given)

    @property
    def perturbs(self) -> bool:
        """Whether there is a second pass: not for a weight of 0 or a delta that can only be zero."""
        return self.run.perturbs


def require_settings(given: Any, name: str) -> None:
    """UserError for what is no PTPSettings. name: of the argument."""
    if not isinstance(given, PTPSettings):
        raise UserError(f"{name} is {brief(given)}; expected PTPSettings, as PTPSettings(perturbation='gaussian').")
