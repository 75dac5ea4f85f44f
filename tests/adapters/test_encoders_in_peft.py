"""Encoders' adapters as peft loads them: its logits are our scores, or it refuses what it would compute otherwise."""

import json
import shutil

import pytest
import torch

from ptp_ds.adapters.card import model_card
from ptp_ds.adapters.read import adapter_kind, read_adapter, read_head
from ptp_ds.adapters.served import alone, serve, whole
from ptp_ds.adapters.task import starting_head
from ptp_ds.adapters.write import write_adapter
from ptp_ds.api.predictor import Predictor
from ptp_ds.backbone.loading import load_backbone
from ptp_ds.errors import UserError
from ptp_ds.models.heads import HeadPlan
from ptp_ds.tasks import load_task
from tests.support.encoders import ENCODERS, make_backbone, make_encoder, make_head, make_values
from tests.support.reference import make_examples
from tests.support.tiny import make_wordpiece

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
IN_PEFT = ("bert", "roberta", "xlm-roberta", "electra")  # with a deep prompt


def written(family, kind, prompt, folder):
    """An adapter of random values in `folder`; its prompt and our scores [C] of an example."""
    backbone, example = make_backbone(family, kind, prompt), make_examples("single")[3]
    trained, row = make_values(backbone), backbone.rows.pack([example])
    with torch.no_grad():
        scores = backbone.score(row, backbone.inputs(row, trained), trained)[0, 0]
    values, head = backbone.head.split(trained)
    write_adapter(folder, values, "model", backbone.model.config, {}, prompt, HeadPlan(kind, False, 3), head)
    return values, scores


def peft_scores(family, kind, folder):
    from peft import PeftModel

    example = make_examples("single")[3]
    ids = torch.tensor([[*example.context_ids, *([4, 2] if kind == "masked" else [2])]])
    model = PeftModel.from_pretrained(make_encoder(family, kind), folder).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    if kind == "masked":
        log_probs = logits[len(logits) - 2].log_softmax(-1)
        logits = torch.stack([log_probs[answer[0]] for answer in example.candidate_ids])
    return logits[: len(example.candidate_ids)]


@pytest.mark.parametrize("kind", ["masked", "classes"])
@pytest.mark.parametrize("family", ENCODERS)
def test_deep_prompts(family, kind, tmp_path):
    prompt, scores = written(family, kind, "deep", tmp_path / "adapter")
    assert adapter_kind(tmp_path / "adapter") == "deep"
    assert torch.equal(read_adapter(tmp_path / "adapter", kind="deep"), prompt)
    if family in IN_PEFT:
        torch.testing.assert_close(peft_scores(family, kind, tmp_path / "adapter"), scores, atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(KeyError, match="PTP_DS_DEEP"):
        peft_scores(family, kind, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PREFIX_TUNING"}))  # as before 2026-12
    assert adapter_kind(tmp_path / "adapter") == "deep"


@pytest.mark.parametrize("kind", ["masked", "classes"])
@pytest.mark.parametrize("family", ENCODERS)
def test_soft_prompts(family, kind, tmp_path):
    _, scores = written(family, kind, "soft", tmp_path)
    torch.testing.assert_close(peft_scores(family, kind, tmp_path), scores, atol=1e-5, rtol=1e-5)


@pytest.fixture
def distilbert(tmp_path):
    """A fine-tuned classifier, whose checkpoint holds both of its layers; the head that we train on it."""
    model = make_encoder("distilbert", "classes", labels=2)
    model.save_pretrained(tmp_path / "model")
    backbone = load_backbone(tmp_path / "model", whole("fp32"), alone(), HeadPlan("classes", False, 3))
    return model, backbone.head


def test_a_fine_tuned_classifier_s_first_layer_is_where_training_starts(distilbert):
    model, head = distilbert
    assert sorted(head.trained) == [f"{part}classifier.{name}" for part in ("", "pre_") for name in ("bias", "weight")]
    start = head.start(model.config, 0)
    assert torch.equal(start["pre_classifier.weight"], model.pre_classifier.weight)
    assert torch.equal(start["pre_classifier.bias"], model.pre_classifier.bias)
    assert start["classifier.weight"].shape == (3, 32)


def test_peft_s_own_head_of_two_layers_is_read(distilbert, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    _, head = distilbert
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4, num_layers=2, token_dim=32,
                                num_attention_heads=4)  # fmt: skip
    trained = get_peft_model(make_encoder("distilbert", "classes"), config)
    trained.save_pretrained(tmp_path / "theirs")
    found = read_head(tmp_path / "theirs", head.trained, head.held)
    theirs = trained.base_model.pre_classifier.modules_to_save["default"].weight
    assert torch.equal(found["pre_classifier.weight"], theirs)


NAMED, ORDERED = {0: "Negative", 1: "Positive"}, ["negative", "positive"]  # Reviews has positive first


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("says", [True, False])
def test_classes_of_peft_s_own_classifier(monkeypatch, tmp_path, capsys, kind, says):
    """Its adapter doesn't name them: the base model's config.json may, and else the user is told what is taken."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    tokenizer = make_wordpiece()
    monkeypatch.setitem(ENCODERS, "bert", {**ENCODERS["bert"], "vocab_size": len(tokenizer)})
    model = make_encoder("bert", "classes", labels=2)
    model.config.id2label = NAMED if says else {0: "LABEL_0", 1: "LABEL_1"}
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    of_kind = PromptTuningConfig if kind == "PROMPT_TUNING" else PrefixTuningConfig
    theirs = get_peft_model(model, of_kind(task_type="SEQ_CLS", num_virtual_tokens=4)).eval()
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "theirs")
    served = serve([tmp_path / "theirs"], task="Reviews")
    told = capsys.readouterr().err
    assert list(served.task.answers) == (ORDERED if says else ORDERED[::-1])
    assert (
        "doesn't say which class is which: its classifier's outputs are taken as 0 positive, 1 negative" in told
    ) == (not says)
    ids = torch.tensor([tokenizer("Review: A quiet film.\nSentiment:")["input_ids"]])
    with torch.no_grad():
        shares = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(-1)[0].tolist()
    found = Predictor(served, "fp32").predict("A quiet film.")[0]["probabilities"]
    assert found == pytest.approx(dict(zip(served.task.answers, shares, strict=True)), abs=1e-5)
    source, left_out = served.source, "is left out, only its prompt is taken: it tells negative, positive apart"
    assert bool(starting_head(tmp_path / "theirs", source.config, source.head_plan, load_task("Reviews"))) == (not says)
    assert (left_out in capsys.readouterr().err) == says


def test_a_served_classifier_is_the_one_of_its_prompt(monkeypatch, tmp_path):
    """Whatever another run has written into the folder since, and where it is gone."""
    tokenizer = make_wordpiece()
    monkeypatch.setitem(ENCODERS, "bert", {**ENCODERS["bert"], "vocab_size": len(tokenizer)})
    model = make_encoder("bert", "classes", labels=2)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    card, trained = {"task": load_task("Reviews").spec(), "head": {"kind": "classes"}}, make_head(model, "classes")
    heads = [{name: torch.randn(shape) for name, shape in trained.trained.items()} for _ in range(2)]
    for name, head in zip("ab", heads, strict=True):
        write_adapter(tmp_path / name, torch.ones(4, 32), str(tmp_path / "model"), model.config, card, "soft",
                      HeadPlan("classes", False, 2), head)  # fmt: skip
    one, other = (Predictor(serve([tmp_path / name]), "fp32") for name in "ab")
    wanted = other.predict("A quiet film.")
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "b")
    assert other.predict("A quiet film.") == wanted
    assert one.predict("A quiet film.") != wanted


def test_an_adapter_without_the_first_layer_takes_the_model_s(distilbert, tmp_path):
    """As ours were before that layer was trained."""
    model, head = distilbert
    own = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    write_adapter(
        tmp_path / "old", torch.ones(4, 32), "x", model.config, {}, "soft", HeadPlan("classes", False, 3), own
    )
    found = read_head(tmp_path / "old", head.trained, head.held)
    assert list(found) == list(head.trained)
    assert torch.equal(found["classifier.weight"], own["classifier.weight"])
    assert torch.equal(found["pre_classifier.weight"], model.pre_classifier.weight)
    write_adapter(tmp_path / "none", torch.ones(4, 32), "x", model.config, {})
    with pytest.raises(UserError, match="holds a head of nothing; this model and task need"):
        read_head(tmp_path / "none", head.trained, head.held)


@pytest.mark.parametrize("family", [*IN_PEFT, "albert"])
def test_the_card_says_whether_peft_loads_a_deep_prompt(family):
    card = {"head": {"kind": "masked"}, "model": {"family": family}, "result": {"prompt": "deep"}}
    text = model_card("owner/model", card)
    assert ("PeftModel.from_pretrained" in text) == (family in IN_PEFT)
    assert ("which peft doesn't bring into this model's" in text) == (family not in IN_PEFT)
    assert "PeftModel" in model_card("owner/model", {**card, "head": {"kind": "causal"}})
    assert "PeftModel" in model_card("owner/model", {**card, "result": {"prompt": "soft"}})
