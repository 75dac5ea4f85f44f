"""The table of families against the sweep of all that transformers has: tiny models, held against plain passes.

Those that people use most are tried in every run of the tests, the others and all, sharded too, by
scripts/test_slow.sh.
"""

import family_sweep
import pytest
import torch
from family_sweep import examine, watched
from sweep_models import families

from ptp_ds.backbone.families import FAMILIES, families_table
from tests.support.paths import ROOT

LISTED = {(family.name, head): family for family in FAMILIES for head in family.heads}
QUICK = {
    "causal": "deepseek_v3 gemma3_text gpt_oss llama4_text phi3 qwen3_moe smollm3 gptj mamba2 mpt qwen3_next",
    "masked": "eurobert nomic_bert", "seq2seq": "mt5",
}  # fmt: skip
SLOW = {
    "causal": """cohere cohere2 ernie4_5 exaone4 gemma gemma3 glm4 granite helium mixtral nemotron olmo2 olmo3 qwen2_moe
        seed_oss stablelm starcoder2""",
    "masked": "camembert deberta roformer", "seq2seq": "led longt5 mbart umt5",
}  # fmt: skip
USED = [
    *((name, kind) for kind, names in QUICK.items() for name in names.split()),
    *(pytest.param(name, kind, marks=pytest.mark.slow) for kind, names in SLOW.items() for name in names.split()),
]


def assert_as_listed(name, kind, found):
    """What the sweep found is what the table says of a family, and a variant of it is no worse than refused."""
    said = {key: found.get(key) for key in ("verdict", "path", "sentence", "error", "notes", "weights")}
    family = LISTED.get((name.split("+")[0], kind))
    if "+" in name:
        assert found["verdict"] in ("ok", "refused"), said
        return
    if family is None:
        assert found["verdict"] in ("refused", "not built"), said
        return
    assert (found["verdict"], found["path"]) == ("ok", family.path), said
    if kind == "causal":
        assert ("deep" in found) == ("deep" in family.prompts), said


@pytest.mark.parametrize(("name", "kind"), USED)
def test_families_that_people_use(name, kind):
    assert (name, kind) in LISTED
    assert_as_listed(name, kind, examine(name, kind, "large", lambda stage: None))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), list(families(["causal", "masked", "classes", "seq2seq"])))
def test_every_family(name, kind):
    found = watched(name, kind, sharded=True)
    assert_as_listed(name, kind, found)
    assert ("sharded" in found) == (found.get("path") == "packed"), found


def test_the_sweep_notices_a_wrong_score(monkeypatch):
    """It can fail: with scores that are off by a thousandth of what they tell apart."""
    real = family_sweep.compare_scores

    def wrong(case):
        score = type(case.backbone).score
        shifted = lambda self, *args, **more: score(self, *args, **more) * 1.001  # noqa: E731
        monkeypatch.setattr(type(case.backbone), "score", shifted)
        return real(case)

    monkeypatch.setattr(family_sweep, "compare_scores", wrong)
    assert examine("llama", "causal", "large", lambda stage: None)["verdict"] == "wrong"


@pytest.mark.slow
def test_the_sweep_notices_a_tensor_that_two_ranks_hold_otherwise(monkeypatch):
    """It can fail: with rotary frequencies in the shards' dtype, as zero.Init makes them."""
    from ptp_ds.backbone import sharded_loading

    def rounded(model, plain):
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(torch.bfloat16)

    monkeypatch.setattr(sharded_loading, "_restore_computed", rounded)
    found = watched("llama", "causal", sharded=True)
    assert found["verdict"] == "wrong"
    assert any("inv_freq" in name for name in found["differs"])


def test_the_page_of_families_holds_the_table():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert "\n".join(families_table()) in page
    refused = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in page.split("## Refused")[1].split("\n")
               if line.count("|") > 3}  # fmt: skip
    assert not {key for key in refused if key in LISTED}
    assert ("gemma3n_text", "causal") in refused
