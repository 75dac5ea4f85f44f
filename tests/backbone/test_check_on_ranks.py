"""The start-up check on two ranks that measure different things: they come to one result, and no collective is lost."""

import json

import pytest
import torch

from ptp_ds.backbone import check
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from tests.support.paths import SUPPORT
from tests.support.reference import make_model
from tests.support.zygote import run_script


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """(returncode, stderr, what each rank found)."""
    folder = tmp_path_factory.mktemp("agreement")
    done = run_script(SUPPORT / "agreement_worker.py", [folder], folder, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def both(ends, case):
    """The result of the two ranks, but for the reason, which is each one's own."""
    first, second = ({name: value for name, value in found[case].items() if name != "reason"} for found in ends[1])
    assert first == second
    assert first["sum"] == 2
    return first, [found[case]["reason"] for found in ends[1]]


def test_a_rank_that_rounds_more_than_is_never_looked_into(ends):
    """Its own rounding is then measured, by gathers that the other one must take part in."""
    found, reasons = both(ends, "rounds more")
    assert found["packs"]
    assert reasons == ["", ""]


@pytest.mark.parametrize("case", ["gathered, wrong", "whole, wrong"])
def test_what_one_rank_finds_wrong_all_refuse_alike(ends, case):
    reasons = both(ends, case)[1]
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("refused: ")
    assert "gradients differ from plain ones by 1.0e+00" in reasons[0]


def test_all_do_with_what_the_least_able_can_do(ends):
    least, well = both(ends, "can less")[0], both(ends, "well")[0]
    assert (least["packs"], least["narrows"], least["head"]) == (True, False, "row")
    assert (well["packs"], well["narrows"], well["head"]) == (True, True, "scored")


def test_where_one_packs_no_row_none_does(ends):
    found, reasons = both(ends, "fails packed")
    assert not found["packs"]
    assert "fails on another rank" in reasons[0]
    assert "no such kernel" in reasons[1]
    assert "rank 1 alone: Model family 'llama' (LlamaForCausalLM) can't be served: no such kernel." in ends[0]


@pytest.mark.parametrize("place", ["packed_pass", "_references", "_narrows"])
def test_a_rank_that_fails_alone_leaves_none_waiting(ends, place):
    """At the check's first pass, in its middle, and behind its last one."""
    reasons = both(ends, f"fails in {place}")[1]
    assert all(reason.startswith("refused: ") for reason in reasons)
    assert "fails on another rank" in reasons[0]
    assert "NotImplementedError: no such kernel" in reasons[1]


def test_a_gradient_that_is_not_a_number_is_never_the_lesser_one(monkeypatch):
    """Of the last row alone: max(1e-7, nan) is 1e-7."""
    real = check.packed_pass

    def broken(*given):
        found, local = real(*given)
        found.to_context[-1].fill_(torch.nan)
        return found, local

    monkeypatch.setattr(check, "packed_pass", broken)
    with pytest.raises(ValueError, match="packed gradients differ from plain ones by inf"):
        check_backbone(Backbone(make_model("llama")))
