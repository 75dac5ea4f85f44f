"""What the attack on texts may change: words of any script, nothing outside the attacked field, real rows."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.perturb import PERTURBATIONS
from ptp_ds.perturb.a2t import attacked_words, swappable
from ptp_ds.perturb.neighbours import BARE, OTHER, WORD, Neighbours, Vocabulary, vocabulary_of
from ptp_ds.perturb.text_scoring import TextScorer
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import Split, load_split, tokenise
from ptp_ds.tasks.example import Example
from ptp_ds.tasks.template import parse_task
from ptp_ds.training.step import settings_of
from tests.support.packed import make_prompt

A2T = PERTURBATIONS["a2t"].attack
SETTINGS = settings_of(RunConfig(perturbation="a2t"), 1.0)


def test_words_that_stand_elsewhere_in_the_row_stay():
    """Those of the question, of a fixed field, of an answer, in another form too; and words of several tokens."""
    texts = [" river", " banks", " bank", " boat", "s", " tree", ".", " the", " rivers", "!", " house"]
    kinds = [WORD, WORD, WORD, WORD, OTHER, WORD, BARE, OTHER, WORD, BARE, WORD]
    ids, words = [7, 0, 2, 3, 4, 5, 6, 10, 9, 1], [0, 1, 2, 3, 3, 4, 4, 5, 5, 6]
    free = [True] * 9 + [False]
    row = Example(context_ids=ids, movable=[True] * 10, candidate_ids=[[8], [6]], gold=0, index=0, words=words,
                  attackable=free)  # fmt: skip
    vocabulary = Vocabulary(kinds, texts)
    assert swappable(row, vocabulary) == [5, 7], "tree. and house!, not the, river(s), bank(s) nor boats"
    assert sorted(attacked_words(row)) == [0, 1, 2, 3, 4, 5]
    assert swappable(replace(row, movable=[True] * 5 + [False] * 5), vocabulary) == []
    assert vocabulary.kind(99) == OTHER
    assert vocabulary.text([7, 0, 99]) == " the river"


def cyrillic(text):
    """Each letter of the Latin alphabet as the Cyrillic one of its number."""
    return "".join(chr(ord(c) - ord("a") + 0x430) if c.isalpha() else c for c in text)


def test_words_of_another_script_are_swapped():
    """Of a byte-level vocabulary that holds them whole; the question's words, in another form too, stay."""
    passage, question = cyrillic("old dogs chased one large cat near my house"), cyrillic("did dogs chase this cat")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator([f" {word}\nQ: A: yes no" for word in (passage + " " + question).split() * 3],
                            trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    task = parse_task({"name": "T", "text": "P: {passage}\nQ: {question}\nA:", "truncate": "passage", "label": "y",
                       "verbalizers": {"0": " no", "1": " yes"}, "metrics": ["accuracy"]}, "t")  # fmt: skip
    split = Split([{"passage": passage, "question": question, "y": 0}], ["here"], "")
    (example,) = tokenise(task, split, tokenizer, 400).examples
    vocabulary = vocabulary_of(tokenizer)
    found = [vocabulary.text([example.context_ids[place]]) for place in swappable(example, vocabulary)]
    assert found == [f" {cyrillic(word)}" for word in ("old", "one", "large", "near", "my", "house")]


@pytest.mark.parametrize("name", ["RTE", "CB", "BoolQ", "COPA", "Reviews"])
def test_nothing_but_the_attacked_field_changes(name, tokenizer, tiny_model):
    """Template, hypothesis or question, connector and answers of the packaged rows stay, token by token."""
    from transformers import AutoModelForCausalLM

    task = load_task(name)
    examples = list(tokenise(task, load_split(task, "train", None, None), tokenizer, 400).examples[:6])
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(tiny_model))
    near = Neighbours(vocabulary_of(tokenizer), 8, 0.0)
    scorer = TextScorer(backbone, make_prompt(), examples, backbone.rows.shared_start(examples), near)
    twins = A2T(scorer, SETTINGS).twins
    pieces = task.render(load_split(task, "train", None, None).rows[0], "here").pieces
    inside = {name: text for text, name in pieces}[task.truncate]
    free = [t for t, open_ in zip(examples[0].context_ids, examples[0].attackable, strict=True) if open_]
    assert "".join(tokenizer.decode(free).split()) == "".join(inside.split())
    changed = 0
    for example, twin in zip(examples, twins, strict=True):
        assert len(twin.context_ids) == len(example.context_ids)
        for old, new, free in zip(example.context_ids, twin.context_ids, example.attackable, strict=True):
            assert free or old == new
            was, now = tokenizer.convert_ids_to_tokens([old, new])
            assert old == new or (was[0] == now[0] and was.lower() != now.lower() and now[1:].isalpha())
            assert old == new or was[1].isupper() == now[1].isupper()
            changed += old != new
    assert changed > 0 or name == "COPA", "its premises hold hardly a word of one token here"


def test_real_rows(superglue, tokenizer):
    """Each task's attacked text lies in its passage; what a WSC or WiC row asks about stays in it."""
    vocabulary = vocabulary_of(tokenizer)
    for name in ("RTE", "CB", "BoolQ", "COPA", "MultiRC", "WiC", "WSC"):
        if not (superglue / name / "val.jsonl").is_file():
            continue
        task, split = load_task(name), load_split(load_task(name), "val", str(superglue), None)
        small = replace(split, rows=split.rows[:20], where=split.where[:20])
        for example in tokenise(task, small, tokenizer, 100_000).examples:
            places = swappable(example, vocabulary)
            assert all(example.attackable[place] and example.movable[place] for place in places)
            asked = {place for place, free in enumerate(example.attackable) if not free}
            fixed = vocabulary.text(example.context_ids[place] for place in sorted(asked)).split()
            assert not {vocabulary.text([example.context_ids[place]]).strip() for place in places} & set(fixed)
