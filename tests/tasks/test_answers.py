"""Answers whose tokens begin another's, which an end tells apart, or are another's, which nothing does."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.padded import PaddedBackbone
from ptp_ds.errors import UserError
from ptp_ds.objective import cross_entropy_sum
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.prompts.initialise import label_ids
from ptp_ds.tasks import load_task
from ptp_ds.tasks.answers import told_apart
from ptp_ds.tasks.data import Split, load_split, tokenise
from ptp_ds.tasks.template import parse_task
from tests.support.tiny import make_wordpiece

PROMPT = [7, 300, 41]
TEXTS = ("A fine film, ten out of ten!", "It was dull.", "The end came too soon for me", "Nobody laughed, and why?")
WSC = {
    "text": "Mr. Bond asked Anna whether he could go.", "label": True,
    "target": {"span1_text": "Mr. Bond", "span2_text": "he", "span2_index": 5},
}  # fmt: skip


def examples_of(answers, tokenizer, head="causal"):
    spec = {
        "name": "T", "text": "{x}\nOut of ten:", "label": "y", "metrics": ["accuracy"],
        "verbalizers": {str(number): answer for number, answer in enumerate(answers)},
    }  # fmt: skip
    rows = [{"x": text, "y": "0"} for text in TEXTS]
    split = Split(rows, [f"row {number}" for number in range(len(rows))], "")
    return tokenise(parse_task(spec, "t"), split, tokenizer, 400, head=head)


@pytest.mark.parametrize("head", ["causal", "seq2seq"])
def test_all_answers_of_such_a_row_are_ended(tokenizer, head):
    answers = [" 10", " 2", " 1"]
    plain = examples_of(answers, tokenizer, "masked")
    ended = examples_of(answers, tokenizer, head)
    assert (plain.ended, ended.ended) == (0, len(TEXTS))
    long, _, short = plain.examples[0].candidate_ids
    assert long[: len(short)] == short
    for before, after in zip(plain.examples, ended.examples, strict=True):
        assert after.candidate_ids == [[*ids, tokenizer.eos_token_id] for ids in before.candidate_ids]
        assert (after.context_ids, after.movable) == (before.context_ids, before.movable)


def test_other_rows_stay_as_they_are(tokenizer):
    """Of one split only the rows that need it: here the first, whose rival "Mr" begins the span."""
    other = {**WSC, "text": WSC["text"].replace("Mr.", "Jim"), "target": {**WSC["target"], "span1_text": "Jim Bond"}}
    found = tokenise(load_task("WSC"), Split([WSC, other], ["0", "1"], ""), tokenizer, 400)
    assert found.ended == 1
    assert "Mr" in found.examples[0].names
    assert [ids[-1] == tokenizer.eos_token_id for ids in found.examples[0].candidate_ids] == [True] * 3
    assert not any(tokenizer.eos_token_id in ids for ids in found.examples[1].candidate_ids)
    for name in ("BoolQ", "CB", "COPA", "RTE", "Reviews"):
        assert tokenise(load_task(name), load_split(load_task(name), "val", None, None), tokenizer, 400).ended == 0


def test_a_tokenizer_without_an_end_is_told_both_answers():
    none = SimpleNamespace(eos_token_id=None)
    said = (
        r"^here: the tokens of the answer ' 10' begin with those of ' 1', and the tokenizer has no end-of-text token "
        r"to tell the two apart; reword one of them, so that neither begins with the other\.$"
    )
    with pytest.raises(ValueError, match=said):
        told_apart([[5, 6], [5, 8], [4], [5, 6, 7]], [" 1", " 2", " x", " 10"], none, "here")
    same = [[5, 6], [5, 7], [5, 6]]  # equal answers are no case for an end: it would not tell them apart
    assert told_apart(same, ["a", "b", "a"], none, "here") == (same, False)


@pytest.mark.parametrize("head", ["masked", "causal", "seq2seq"])
@pytest.mark.parametrize("answers", [[" Good", " bad", " good"], [" \U0001f600", " \U0001f621"]])
def test_labels_whose_answers_are_the_same_tokens_are_refused(answers, head):
    """A tokenizer that folds case, and knows no such pictures; a classifier of classes reads no answer."""
    wordpiece, said = (
        make_wordpiece(),
        f"'{answers[0]}' and '{answers[-1]}' are the same tokens to the model's tokenizer",
    )
    with pytest.raises(UserError, match=f"^row 0: the answers {said}"):
        examples_of(answers, wordpiece, head)
    assert len(examples_of(answers, wordpiece, "classes").examples) == len(TEXTS)


def test_rows_of_which_a_right_and_a_wrong_answer_are_the_same_tokens_are_told():
    """Such a row stays, as the data has it; two wrong ones alike are no matter."""
    spec = {
        "name": "T", "text": "{x}", "label": "y", "metrics": ["accuracy"],
        "candidates": {"0": " {a}", "1": " {b}", "2": " {c}"},
    }  # fmt: skip
    rows = [
        {"x": "It was", "a": "Good", "b": "good", "c": "bad", "y": "0"},
        {"x": "It was", "a": "bad", "b": "good", "c": "Good", "y": "0"},
        {"x": "It was", "a": "bad", "b": "good", "c": "Good", "y": "2"},
        {"x": "It was", "a": "one", "b": "two", "c": "ten", "y": "2"},
    ]  # fmt: skip
    split = Split(rows, [f"row {number}" for number in range(len(rows))], "")
    for head in ("masked", "causal"):
        found = tokenise(parse_task(spec, "t"), split, make_wordpiece(), 400, head=head)
        assert (len(found.examples), found.undecided) == (4, ["row 0", "row 2"])
    unlabelled = tokenise(parse_task(spec, "t"), split, make_wordpiece(), 400, labelled=False)
    assert unlabelled.undecided == []


def test_a_prompt_starts_at_the_words_alone(tokenizer):
    answers = examples_of([" 10", " 1"], tokenizer).examples[0].candidate_ids
    words = [token for ids in answers for token in ids[:-1]]
    assert label_ids(len(words), tokenizer, 600, 0, answers) == words


def plain_scores(model, example):
    """[C] by one forward of token ids an answer."""
    scores = []
    for answer in example.candidate_ids:
        ids = [*PROMPT, *example.context_ids, *answer]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(ids) - len(answer) - 1
        scores.append(sum(log_probs[first + place, token] for place, token in enumerate(answer)))
    return torch.stack(scores)


@pytest.mark.parametrize("way", ["tree", "separate", "padded"])
def test_packed_scores_are_those_of_plain_forwards(lively_model, tokenizer, way):
    examples = examples_of([f" {number}" for number in range(1, 11)], tokenizer).examples
    reference = AutoModelForCausalLM.from_pretrained(lively_model).eval()
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(lively_model))
    if way == "padded":
        backbone = PaddedBackbone(backbone)
    separate = SeparateRows(kind="causal", prompt_length=len(PROMPT))
    backbone.serve("soft", TreeRows() if way == "tree" else separate, len(PROMPT))
    prompt, row = backbone.embed_ids(PROMPT), backbone.rows.pack(examples)
    with torch.no_grad():
        scores = backbone.score(row, backbone.inputs(row, prompt), prompt)[0]
    wanted = torch.stack([plain_scores(reference, example) for example in examples])
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-5)


def test_a_prompt_can_learn_the_longer_answer(lively_model, tokenizer):
    examples = examples_of([" 10", " 2", " 1"], tokenizer).examples
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(lively_model))
    backbone.serve("soft", TreeRows(), len(PROMPT))
    prompt, row = backbone.embed_ids(PROMPT).requires_grad_(), backbone.rows.pack(examples)
    optimizer, chosen = torch.optim.Adam([prompt], 0.1), []
    for _ in range(30):
        scores = backbone.score(row, backbone.inputs(row, prompt), prompt)[0]
        chosen.append(scores.argmax(-1).tolist())
        optimizer.zero_grad()
        cross_entropy_sum(scores, row.gold).backward()
        optimizer.step()
    assert row.gold.tolist() == [0] * len(TEXTS) == chosen[-1] != chosen[0]
