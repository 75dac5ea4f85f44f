"""Shards in memory that ranks share: DeepSpeed's gathers to the bit, nothing sent; and where that can't be."""

import json
import sys

import pytest
import torch

from ptp_ds.backbone.host_shards import share_on_host
from ptp_ds.ranks.distributed import Ranks
from tests.support.host_shards_worker import facts, joint_facts
from tests.support.paths import SUPPORT
from tests.support.zygote import run_script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("shards")
    done = run_script(SUPPORT / "host_shards_worker.py", [tiny_model, folder], folder, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"report-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gather_is_a_view(reports, precision):
    for report in reports:
        found = report[precision]
        assert found["shared"] == [False, True]
        assert found["same"], "scores and gradients are those of DeepSpeed's gathers, to the bit"
        assert (found["bytes"], found["descriptors"]) == (0, 0)
        assert found["gathers"] > 0
        assert found["wholes"], "each whole is the file's"
        assert found["own_shards_lie_there"], "no second copy"
        assert found["nothing_left_whole"]
        assert found["one_memory"]


def test_where_a_rank_cant_all_ranks_gather(reports):
    for report in reports:
        assert report["one rank can't map it"] == {"shared": False, "same": True}
        assert report["two hosts"] == {"shared": False}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_alone_has_the_whole_in_its_shards(precision, tiny_model, ranks):
    found = facts(tiny_model, precision, ranks)
    assert found.pop("gathers") > 0
    assert (found.pop("shared"), found.pop("bytes"), found.pop("descriptors")) == ([False, True], 0, 0)
    assert all(found.values()), found


def check_joint(found, precision):
    """One product for several layers: the same numbers but for rounding, in the same memory, each weight the file's."""
    assert found.pop("joined") == "one for q_proj+k_proj+v_proj (2 times), gate_proj+up_proj (2 times)"
    assert max(found.pop("errors")) < (1e-5 if precision == "fp32" else 0.05)
    assert found.pop("more_memory") == 0
    assert all(found.values()), found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_joint_products_of_shared_weights(reports, precision):
    for report in reports:
        check_joint(report["joint"][precision], precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_joint_products_of_one_rank_alone(precision, tiny_model, ranks):
    check_joint(joint_facts(tiny_model, precision, ranks), precision)


def test_a_model_without_shards_shares_nothing():
    assert not share_on_host(torch.nn.Linear(2, 2), Ranks(0, 1, 0, torch.device("cpu")))
