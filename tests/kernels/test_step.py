"""The whole step by the kernels against the whole step by their references: one switch, the same loss and gradient."""

import sys

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.kernels.choice import use_triton
from ptp_ds.packing.layouts import SeparateRows
from ptp_ds.packing.row import pack
from ptp_ds.perturb import PERTURBATIONS, Noise, SharedPass
from ptp_ds.perturb.ascent import ascend
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.kernel_cases import DEVICE
from tests.support.reference import make_examples, make_model, relative_error


def step(kernels: str, perturbation: str, dtype: torch.dtype, rows) -> tuple[torch.Tensor, ...]:
    """(loss, the prompt's gradient, delta)."""
    run = RunConfig(perturbation=perturbation, epsilon=0.5, sigma=0.5, kernels=kernels)
    backbone = Backbone(make_model("llama", dtype).to(DEVICE), kernels=kernels)
    check_backbone(backbone)
    if rows is not None:
        backbone.serve("soft", rows)
    prompt = (0.3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))).to(DEVICE, dtype).requires_grad_()
    row = backbone.rows.pack(make_examples("single")).to(DEVICE)
    settings, noise = settings_of(run, 1.0), Noise(3, 4, kernels)
    loss = ptp_loss(prompt, backbone, row, run, settings, noise)
    loss.total.backward()
    delta = loss.delta if not run.carries else ascend(loss.delta, loss.delta.grad, row, settings)
    return loss.total.detach(), prompt.grad, delta.detach()


TREE, OWN = None, SeparateRows(kind="causal", prompt_length=5, target="both")
QUICK = [("gaussian", torch.float32, OWN), ("uniform", torch.bfloat16, TREE), ("pgd", torch.float32, OWN),
         ("free", torch.bfloat16, TREE)]  # fmt: skip
SLOW = [
    (perturbation, dtype, rows) for perturbation in ("gaussian", "uniform", "pgd", "free")
    for dtype in (torch.float32, torch.bfloat16) for rows in (TREE, OWN) if (perturbation, dtype, rows) not in QUICK
]  # fmt: skip


@pytest.mark.parametrize(
    ("perturbation", "dtype", "rows"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_kernels_and_references_take_the_same_step(perturbation, dtype, rows):
    by_kernel, by_reference = (step(kernels, perturbation, dtype, rows) for kernels in ("triton", "torch"))
    close = 1e-4 if dtype == torch.float32 else 0.2  # roundings differ, and ascent amplifies them
    assert abs(float(by_kernel[0] - by_reference[0])) <= close * float(by_reference[0])
    for ours, theirs in zip(by_kernel[1:], by_reference[1:], strict=True):
        assert relative_error(ours, theirs) < close


def test_the_switch_reaches_every_kernel(monkeypatch):
    """Each operation of a step asks for the implementation that --kernels names."""
    asked: dict[str, set[str]] = {}
    for module in ("noise", "perturb_step", "pack_embed", "dual_divergence"):

        def note(impl, *tensors, module=module):
            asked.setdefault(module, set()).add(impl)
            return use_triton(impl, *tensors)

        monkeypatch.setattr(sys.modules[f"ptp_ds.kernels.{module}"], "use_triton", note)
    step("triton", "pgd", torch.float32, None)
    assert asked == {name: {"triton"} for name in ("noise", "perturb_step", "pack_embed", "dual_divergence")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ascent_reuses_the_moved_inputs(dtype):
    """What perturb_step wrote is what embedding the row with its delta gives, bit for bit."""
    backbone = Backbone(make_model("llama", dtype).to(DEVICE))
    row, prompt = pack(make_examples("single")).to(DEVICE), torch.zeros(5, 32, device=DEVICE, dtype=dtype)
    run = RunConfig(perturbation="pgd", epsilon=0.5)
    shared = SharedPass(backbone, prompt, row, backbone.inputs(row, prompt))
    delta = PERTURBATIONS["pgd"].find(shared, row, shared.clean_TH, settings_of(run, 1.0), Noise(3, 4))
    assert shared._moved is not None
    assert shared._moved[0] is delta
    assert torch.equal(shared._moved[2], backbone.inputs(row, prompt, clean=False, delta_TH=delta))
