"""--preset: our flags at the settings of published methods. Data: what each one sets; flags that are given win.

All of them as we compute them: only the example's own words move, never pads, special, template or answer tokens;
losses are sums over examples divided by their number, so that lambda doesn't depend on the batch size. Sizes are
absolute (--units): under bf16 the 1e-5 of r3f and smart is rounded away, and the run says so.

preset  source                           how ours differs besides
r3f     Aghajanyan et al. 2021, fairseq  not at all: U(-1e-5, 1e-5) on every coordinate, symmetric KL, lambda 1
smart   Jiang et al. 2020, mt-dnn        noise 1e-5 and step 1e-3 are mt-dnn's; the noise is uniform within the ball,
                                         whose radius it is too; steps follow the gradient's sign; no Bregman updates
freelb  Zhu et al. 2020, RTE (ALBERT)    the clean cross-entropy stays beside the perturbed one, which is taken at the
                                         last delta, not averaged over the K; the start is random, half of the radius,
                                         not 0; the radius K alpha is as far as its unprojected steps can go
ptp-rn, Chen et al. 2023, noise and      the published sizes aren't known to us: these are what docs/defaults.md found
ptp-adv pgd                              on development tasks
vat     Miyato et al. 2018               the power iteration is an ascent step so long that projection leaves little of
                                         the random start; xi is epsilon / 2
"""

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "ptp-rn": {
        "perturbation": "gaussian", "divergence": "kl", "divergence_gradient": "clean_fixed", "reg_weight": 1.0,
        "units": "relative", "sigma": 1.0,
    },
    "ptp-adv": {
        "perturbation": "pgd", "divergence": "kl", "divergence_gradient": "clean_fixed", "reg_weight": 1.0,
        "units": "relative", "norm": "frobenius", "epsilon": 0.1, "alpha": 0.075, "ascent_steps": 2,
    },
    "smart": {
        "perturbation": "pgd", "divergence": "sym_kl", "divergence_gradient": "both", "reg_weight": 1.0,
        "units": "coordinate", "norm": "linf", "epsilon": 1e-5, "alpha": 1e-3, "ascent_steps": 1,
    },
    "freelb": {
        "perturbation": "pgd", "divergence": "ce", "reg_weight": 1.0, "units": "l2", "norm": "frobenius",
        "epsilon": 0.3, "alpha": 0.1, "ascent_steps": 3,
    },
    "r3f": {
        "perturbation": "uniform", "divergence": "sym_kl", "divergence_gradient": "both", "reg_weight": 1.0,
        "units": "coordinate",
        "sigma": 1e-5 / 3**0.5,  # the standard deviation of U(-1e-5, 1e-5)
    },
    "vat": {
        "perturbation": "pgd", "divergence": "kl", "divergence_gradient": "clean_fixed", "reg_weight": 1.0,
        "units": "l2", "norm": "frobenius", "epsilon": 1.0, "alpha": 10.0, "ascent_steps": 1,
    },
}  # fmt: skip


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, before those that `preset` names: what is given wins."""
    return {**PRESETS.get(given.get("preset") or "", {}), **given}


def preset_effect(preset: str | None, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"set": what the preset decided, "overridden": settings that differ from it}; empty without a preset."""
    if preset is None:
        return {}
    wanted = PRESETS[preset]
    kept = {name: value for name, value in wanted.items() if settings[name] == value}
    return {"set": kept, "overridden": {name: settings[name] for name in wanted if name not in kept}}


def describe_preset(preset: str | None, settings: Mapping[str, Any]) -> str:
    """preset_effect in one line, '' without a preset."""
    effect = preset_effect(preset, settings)
    shown = {kind: ", ".join(f"{name} {value}" for name, value in part.items()) for kind, part in effect.items()}
    return f"preset {preset}: " + "; given instead: ".join(filter(None, shown.values())) if shown else ""
