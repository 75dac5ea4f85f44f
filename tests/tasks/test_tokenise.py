"""Tokenised examples: which tokens may move, answers, truncation, a user's own template."""

import itertools
import json

import pytest

from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import Split, load_split, tokenise
from ptp_ds.tasks.example import Example
from ptp_ds.tasks.template import parse_task

ROOMY = 100_000
BOOLQ = {
    "passage": "The first one is of the town." + " It is of the people and of the town." * 30,
    "question": "does the passage tell of a river",
    "label": True,
}


def split_of(*rows: dict) -> Split:
    return Split(rows, [f"row {number}" for number in range(len(rows))], "")


def squeezed(text: str) -> str:
    return "".join(text.split())


def movable_texts(example: Example, tokenizer) -> list[str]:
    """Each run of movable tokens as text without spaces. Tokens of spaces alone may count either way."""
    pieces = [(squeezed(tokenizer.decode([token])), token) for token in example.context_ids]
    marked = [(token, movable) for (piece, token), movable in zip(pieces, example.movable, strict=True) if piece]
    runs = itertools.groupby(marked, key=lambda pair: pair[1])
    return [squeezed(tokenizer.decode([token for token, _ in run])) for movable, run in runs if movable]


def one(task, row: dict, tokenizer, room: int = ROOMY) -> Example:
    return tokenise(task, split_of(row), tokenizer, room).examples[0]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BoolQ", ("passage", "question")), ("CB", ("premise", "hypothesis")), ("RTE", ("premise", "hypothesis")),
        ("COPA", ("premise",)),
    ],
)  # fmt: skip
def test_movable_tokens_are_the_fields_of_the_row(name, fields, tokenizer):
    task, split = load_task(name), load_split(load_task(name), "train", None, None)
    tokenised = tokenise(task, split, tokenizer, ROOMY)
    assert tokenised.truncated == 0
    for row, example in zip(split.rows, tokenised.examples, strict=True):
        expected = [squeezed(row[field]) for field in fields]
        if name == "COPA":
            expected = [text.rstrip(".") for text in expected]
        assert movable_texts(example, tokenizer) == expected
        assert tokenizer.decode(example.context_ids) == task.render(row, "here").context


def test_the_connector_of_copa_is_never_movable(tokenizer):
    task, split = load_task("COPA"), load_split(load_task("COPA"), "train", None, None)
    for row, example in zip(split.rows, tokenise(task, split, tokenizer, ROOMY).examples, strict=True):
        fixed = [token for token, free in zip(example.context_ids, example.movable, strict=True) if not free]
        assert tokenizer.decode(fixed).strip() == {"cause": "because", "effect": "so"}[row["question"]]


def test_fixed_fields_are_never_movable(tokenizer):
    spec = {
        "name": "T", "text": "{a} of {b}:", "label": "y", "fixed": ["b"], "verbalizers": {"0": " no", "1": " yes"},
        "metrics": ["accuracy"],
    }  # fmt: skip
    example = one(parse_task(spec, "t"), {"a": "the bank", "b": "the river", "y": 1}, tokenizer)
    assert movable_texts(example, tokenizer) == ["thebank"]


def test_a_token_across_a_border_is_not_movable(tokenizer):
    spec = {
        "name": "T", "text": "un{a}ing {b}:", "label": "y", "verbalizers": {"0": " no", "1": " yes"},
        "metrics": ["accuracy"],
    }  # fmt: skip
    task, row = parse_task(spec, "t"), {"a": "wind", "b": "it", "y": 0}
    pieces = [tokenizer.decode([token]) for token in one(task, row, tokenizer).context_ids]
    for piece, movable in zip(pieces, one(task, row, tokenizer).movable, strict=True):
        inside = bool(piece.strip()) and (piece.strip() in "wind" or piece.strip() == "it")
        assert not movable or inside, f"{piece!r} holds template text"


def test_special_tokens_are_never_movable(tiny_model):
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", eos)]
    )
    example = one(load_task("BoolQ"), BOOLQ, tokenizer)
    assert (example.context_ids[0], example.movable[0]) == (eos, False)
    assert eos not in example.context_ids[1:], "the trailing one would stand between context and answer"
    assert all(eos not in candidate for candidate in example.candidate_ids)


def test_spaces_inside_a_field_are_movable(tokenizer):
    example = one(load_task("Reviews"), {"review": "Zoe   paints", "label": "positive"}, tokenizer)
    spaces = [place for place, token in enumerate(example.context_ids) if tokenizer.decode([token]).isspace()]
    assert [example.movable[place] for place in spaces] == [False, True, True, False], "the outer two: template"


@pytest.mark.parametrize("name", ["BoolQ", "CB", "RTE", "COPA"])
def test_candidates_decode_to_the_answers(name, tokenizer):
    task, split = load_task(name), load_split(load_task(name), "val", None, None)
    for row, example in zip(split.rows, tokenise(task, split, tokenizer, ROOMY).examples, strict=True):
        rendered = task.render(row, "here")
        assert [tokenizer.decode(candidate) for candidate in example.candidate_ids] == list(rendered.candidates)
        assert example.gold == rendered.gold


@pytest.mark.parametrize("name", ["BoolQ", "CB", "COPA", "RTE"])
def test_superglue_rows_fit_behind_the_prompt(name, superglue, tokenizer):
    task = load_task(name)
    split = load_split(task, "val", str(superglue), None)
    part = Split(split.rows[:300], split.where[:300], split.digest)
    tokenised = tokenise(task, part, tokenizer, 400)
    assert [example.index for example in tokenised.examples] == list(range(len(part.rows)))
    assert max(example.path_length for example in tokenised.examples) <= 400
    whole = tokenise(task, part, tokenizer, ROOMY)
    too_long = sum(example.path_length > 400 for example in whole.examples)
    assert tokenised.truncated == too_long
    for short, long in zip(tokenised.examples, whole.examples, strict=True):
        assert short.candidate_ids == long.candidate_ids
        assert short == long or short.path_length == 400


# truncation


@pytest.mark.parametrize("excess", [1, 2, 7, 50])
def test_truncation_takes_the_middle_of_the_passage(excess, tokenizer):
    task = load_task("BoolQ")
    whole = one(task, BOOLQ, tokenizer)
    tokenised = tokenise(task, split_of(BOOLQ), tokenizer, whole.path_length - excess)
    (short,) = tokenised.examples
    assert tokenised.truncated == 1
    assert short.path_length == whole.path_length - excess
    marked = tokenizer("\nQuestion:")["input_ids"]
    passage = next(at for at in range(len(whole.context_ids)) if whole.context_ids[at : at + len(marked)] == marked)
    middle = (passage - excess) / 2
    near = [start for start in range(passage - excess) if abs(start - middle) <= 1]
    kept = list(zip(whole.context_ids, whole.movable, strict=True))
    expected = [kept[:start] + kept[start + excess :] for start in near]
    assert list(zip(short.context_ids, short.movable, strict=True)) in expected
    text = tokenizer.decode(short.context_ids)
    assert text.endswith(f"\nQuestion: {BOOLQ['question']}?\nAnswer:")
    assert text.startswith("The first one is of the town. It is")
    assert short.candidate_ids == whole.candidate_ids


def test_only_long_rows_are_shortened_and_counted(tokenizer):
    task, short_row = load_task("BoolQ"), {**BOOLQ, "passage": "A river."}
    limit = one(task, BOOLQ, tokenizer).path_length - 1
    tokenised = tokenise(task, split_of(BOOLQ, short_row, BOOLQ), tokenizer, limit)
    assert tokenised.truncated == 2
    assert tokenised.examples[1].context_ids == one(task, short_row, tokenizer).context_ids


def test_a_row_of_exactly_the_limit_is_not_shortened(tokenizer):
    limit = one(load_task("BoolQ"), BOOLQ, tokenizer).path_length
    assert tokenise(load_task("BoolQ"), split_of(BOOLQ), tokenizer, limit).truncated == 0


def test_answers_of_several_tokens_count_towards_the_limit(tokenizer):
    task = load_task("COPA")
    row = {"premise": "The long ice of the lake melted.", "choice1": "It was warm.", "question": "cause", "label": 0,
           "choice2": "The wind that came from the south in the night was warm."}  # fmt: skip
    whole = one(task, row, tokenizer)
    longest = max(map(len, whole.candidate_ids))
    assert longest > min(map(len, whole.candidate_ids)) > 1
    limit = len(whole.context_ids) + longest - 1
    assert tokenise(task, split_of(row), tokenizer, limit).truncated == 0
    assert one(task, row, tokenizer, limit - 2).path_length == limit - 2


@pytest.mark.parametrize(
    ("row", "room"),
    [
        ({**BOOLQ, "passage": "A river."}, 12),
        ({**BOOLQ, "question": BOOLQ["passage"], "passage": "A river."}, 100),
    ],
)
def test_rows_that_cannot_fit_are_refused(row, room, tokenizer):
    task = load_task("BoolQ")
    excess = one(task, row, tokenizer).path_length - room
    message = (
        f"row 0: the row is {excess} tokens longer than the {room} .* field 'passage' can't give them; use a shorter"
    )
    with pytest.raises(ValueError, match=message):
        tokenise(task, split_of(row), tokenizer, room)


def test_without_a_truncate_field_long_rows_are_refused(tokenizer):
    spec = {
        "name": "T", "text": "{a}:", "label": "y", "verbalizers": {"0": " no", "1": " yes"}, "metrics": ["accuracy"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"row 0: the row is .* tokens longer than the 5 that fit"):
        tokenise(parse_task(spec, "t"), split_of({"a": BOOLQ["passage"], "y": 0}), tokenizer, 5)


# what can't be tokenised


def test_answers_that_join_the_context_are_refused(tokenizer):
    spec = {
        "name": "T", "text": "{a} riv", "label": "y", "verbalizers": {"0": "er", "1": " no"}, "metrics": ["accuracy"],
    }  # fmt: skip
    assert len(tokenizer(" river")["input_ids"]) < len(tokenizer(" riv")["input_ids"]) + 1
    with pytest.raises(ValueError, match="row 0: the tokenizer joins the end of the context with the answer's start"):
        tokenise(parse_task(spec, "t"), split_of({"a": "the", "y": 0}), tokenizer, 100)


def test_slow_tokenizers_are_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="SlowTokenizer gives no character offsets; a fast tokenizer is needed"):
        tokenise(load_task("BoolQ"), split_of(BOOLQ), SlowTokenizer(), 100)


def test_a_users_own_template_and_files_need_no_code(tmp_path, write_rows, tokenizer):
    template = tmp_path / "stance.json"
    spec = {
        "name": "Stance", "text": "{tweet}\nTowards {target|lower_first}:", "truncate": "tweet", "label": "stance",
        "verbalizers": {"1": " for", "0": " against"}, "metrics": ["macro_f1"],
    }  # fmt: skip
    template.write_text(json.dumps(spec), encoding="utf-8")
    write_rows(tmp_path / "data" / "Stance" / "dev.jsonl", [{"tweet": "Trains!", "target": "Rail", "stance": 0}])
    task = load_task(str(template))
    (example,) = tokenise(task, load_split(task, "dev", str(tmp_path / "data"), None), tokenizer, 100).examples
    assert tokenizer.decode(example.context_ids) == "Trains!\nTowards rail:"
    assert movable_texts(example, tokenizer) == ["Trains!", "rail"]
    assert [tokenizer.decode(candidate) for candidate in example.candidate_ids] == [" for", " against"]
    assert example.gold == 1
