"""What a file of the user's own does with its deltas: changed in place, carried on, begun at a start of its own."""

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.packing.row import pack
from ptp_ds.perturb import Noise, SharedPass
from ptp_ds.perturb.ascent import start_delta
from ptp_ds.perturb.custom import choose_perturbation
from ptp_ds.training.step import carried_delta, ptp_loss, settings_of
from tests.support.reference import make_examples, make_model

HEAD = "from ptp_ds.perturb import Perturbation\n"
FIND = HEAD + "def find(shared, row, clean_TH, settings, noise):\n    return 0.1 * clean_TH\n"


def test_a_delta_that_is_changed_in_place_is_the_one_that_climbs(tmp_path):
    """Between two steps of ascent a file may halve its delta, by assignment or in place."""
    backbone, row = Backbone(make_model("llama")), pack(make_examples("single"))
    prompt = torch.randn(5, backbone.width, generator=torch.Generator().manual_seed(1))
    settings = settings_of(RunConfig(perturbation="pgd", epsilon=0.5), backbone.mean_embedding_norm())
    found = []
    for in_place in (True, False):
        clean = backbone.embed(row.token_ids)
        shared = SharedPass(backbone, prompt, row, clean)
        delta = shared.ascend(start_delta(row, backbone.width, settings, Noise(1, 2)), settings)
        delta = delta.mul_(0.5) if in_place else delta * 0.5
        found.append(shared.ascend(delta, settings))
    assert torch.equal(*found)


CARRIED = {
    "has no graph": "return clean_TH.detach() * 0 + 5.0",
    "is no leaf": "return (clean_TH.detach() * 0 + 5.0).requires_grad_() * 1.0",
    "is a leaf": "return (clean_TH.detach() * 0 + 5.0).requires_grad_()",
}


@pytest.mark.parametrize("body", CARRIED.values(), ids=CARRIED)
def test_a_carried_delta_is_masked_and_asked_for_its_gradient(tmp_path, body):
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}def find(shared, row, clean_TH, settings, noise):\n    {body}\n"
                    "PERTURBATION = Perturbation(find=find, sizes=('epsilon',), carries=True)\n")  # fmt: skip
    backbone, row = Backbone(make_model("llama")), pack(make_examples("single"))
    assert not row.movable.all()
    prompt = torch.randn(5, backbone.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    run = RunConfig(perturbation=str(file), epsilon=0.5)
    settings = settings_of(run, backbone.mean_embedding_norm())
    loss = ptp_loss(prompt, backbone, row, run, settings, Noise(0, 0))
    loss.total.backward()
    assert torch.equal((loss.delta != 0).any(-1), row.movable)
    assert loss.delta.grad is not None
    assert carried_delta(loss, row, run, settings, torch.float32).shape == loss.delta.shape


def test_a_files_start_is_guarded_as_its_find_is(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FIND + "def short(shared, row, clean_TH, settings, noise):\n    return clean_TH[:-1]\n"
                    "PERTURBATION = Perturbation(find=find, sizes=(), start=find)\n")  # fmt: skip
    row = pack(make_examples("single"))
    given = (None, row, torch.ones(row.num_tokens, 4), settings_of(RunConfig(), 1.0), Noise(0, 0))
    found = choose_perturbation(str(file)).perturbation.start(*given)
    assert torch.equal((found != 0).any(-1), row.movable)
    file.write_text(file.read_text().replace("start=find", "start=short"))
    with pytest.raises(
        UserError, match=rf"start returned \({row.num_tokens - 1}, 4\); expected a tensor of clean_TH's"
    ):
        choose_perturbation(str(file)).perturbation.start(*given)
