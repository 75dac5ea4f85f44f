"""ptp_ds.Predictor: predict.py's answers, transformers' own text, embeddings that give the same text elsewhere."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import ptp_ds
from ptp_ds.adapters.generate import generate
from ptp_ds.adapters.served import Served
from ptp_ds.adapters.write import write_adapter
from ptp_ds.api.data import rows_of
from ptp_ds.api.predictor import _split
from ptp_ds.commands.predict import main as predict
from ptp_ds.errors import UserError
from ptp_ds.models.source import load_config
from ptp_ds.prompts import prompt_width
from ptp_ds.tasks.data import DEMO_DATA
from ptp_ds.tasks.template import parse_task

pytestmark = pytest.mark.usefixtures("no_launcher")

REVIEWS = ["A quiet film that stays with you, long after its end.", "Dull.", "I liked it, mostly."]


@pytest.fixture(params=["soft", "deep"])
def kind(request):
    return request.param


@pytest.fixture
def saved(tmp_path, lively_model):
    """saved(kind, task) writes a random prompt of 4 tokens for the tiny model and returns the adapter's folder."""

    def write(kind: str = "soft", task=None):
        task = task or ptp_ds.load_task("Reviews")
        config = load_config(lively_model)
        prompt = torch.randn(4, prompt_width(kind, config), generator=torch.Generator().manual_seed(3))
        card = {"task": task.spec(), "result": {}, "model": {"name": str(lively_model)}}
        write_adapter(tmp_path / "adapter", prompt, str(lively_model), config, card, kind)
        return tmp_path / "adapter"

    return write


def test_predictions_are_the_commands(saved, kind, tmp_path, capsys):
    folder = saved(kind)
    rows = [{"review": text} for text in REVIEWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert predict(["--adapter", str(folder), "--input", str(tmp_path / "rows.jsonl")]) == 0
    wanted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    predictor = ptp_ds.Predictor.from_pretrained(folder)
    assert predictor.predict(rows) == wanted
    assert predictor.predict(REVIEWS) == wanted
    (one,) = predictor.predict(REVIEWS[1])
    assert one["answer"] == wanted[1]["answer"]
    assert one["probabilities"] == pytest.approx(wanted[1]["probabilities"], abs=1e-6)


def test_greedy_text_is_our_own_loops_for_one_row_and_for_a_batch(saved, kind, lively_model):
    predictor = ptp_ds.Predictor.from_pretrained(saved(kind), precision="fp32")
    served, model = predictor.served, AutoModelForCausalLM.from_pretrained(lively_model).eval()
    wanted = []
    for text in REVIEWS:
        ids = served.source.tokenizer(f"Review: {text}\nSentiment:")["input_ids"]
        found = generate(model, served.prompts[0], kind, ids, 8)
        wanted.append(served.source.tokenizer.decode(found, skip_special_tokens=True))
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert [predictor.generate(text, **given) for text in REVIEWS] == wanted
    assert predictor.generate(REVIEWS, **given) == wanted
    assert len(set(wanted)) > 1


def test_beams_and_samples_of_a_batch(saved, kind):
    predictor = ptp_ds.Predictor.from_pretrained(saved(kind), precision="fp32")
    given = {"max_new_tokens": 4, "eos_token_id": None}
    beams = predictor.generate(REVIEWS, num_beams=3, do_sample=False, **given)
    assert beams == [predictor.generate(text, num_beams=3, do_sample=False, **given) for text in REVIEWS]
    torch.manual_seed(0)
    texts = predictor.generate(REVIEWS[:2], do_sample=True, num_return_sequences=3, **given)
    assert len(texts) == 6
    assert len(set(texts)) > 2


@pytest.mark.parametrize("place", ["argument", "model"])
def test_beams_and_samples_that_a_generation_config_asks_for(saved, kind, place):
    predictor = ptp_ds.Predictor.from_pretrained(saved(kind), precision="fp32")
    given = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
    wanted = predictor.generate(REVIEWS, num_beams=3, **given)
    several = predictor.generate(REVIEWS, num_beams=3, num_return_sequences=3, **given)
    if place == "argument":
        config = {"generation_config": GenerationConfig(num_beams=3, **given)}
    else:
        config, predictor._plain().generation_config.num_beams = {}, 3
    assert predictor.generate(REVIEWS, **config, **given) == wanted
    assert predictor.generate(REVIEWS, num_return_sequences=3, **config, **given) == several
    assert predictor.generate(REVIEWS, num_beams=1, **config, **given) == predictor.generate(
        REVIEWS, num_beams=1, **given
    )


def test_the_new_tokens_of_a_generation_config(saved):
    """What is given goes first, then the configuration's, then 20."""
    predictor = ptp_ds.Predictor.from_pretrained(saved(), precision="fp32")
    given = {"do_sample": False, "eos_token_id": None}
    texts = {count: predictor.generate(REVIEWS, max_new_tokens=count, **given) for count in (3, 20, 25)}
    config = GenerationConfig(max_new_tokens=25, **given)
    assert predictor.generate(REVIEWS, generation_config=config, eos_token_id=None) == texts[25]
    assert predictor.generate(REVIEWS, generation_config=config, eos_token_id=None, max_new_tokens=3) == texts[3]
    assert predictor.generate(REVIEWS, generation_config=GenerationConfig(), **given) == texts[20]
    assert predictor.generate(REVIEWS, **given) == texts[20] != texts[25]


def test_embeddings_give_the_same_text_to_a_model_that_knows_no_adapter(saved, lively_model):
    predictor = ptp_ds.Predictor.from_pretrained(saved(), precision="fp32")
    rows_TH = predictor.embeds({"review": REVIEWS[0]})
    model = AutoModelForCausalLM.from_pretrained(lively_model).eval()
    ids = model.generate(inputs_embeds=rows_TH[None], max_new_tokens=6, do_sample=False)[0]
    text = predictor.served.source.tokenizer.decode(ids, skip_special_tokens=True)
    assert text == predictor.generate(REVIEWS[0], max_new_tokens=6, do_sample=False)
    assert torch.equal(rows_TH[:4], predictor.served.prompts[0])


def test_embeddings_of_a_row_are_those_of_its_filled_template(saved, lively_model):
    """By serving.md's client: the prompt, then the embeddings of the rendered text's tokens; a task with two fields."""
    task, row = ptp_ds.load_task("CB"), {"premise": "It rains.", "hypothesis": "It is wet."}
    predictor = ptp_ds.Predictor.from_pretrained(saved("soft", task), precision="fp32", task=task)
    model = AutoModelForCausalLM.from_pretrained(lively_model)
    ids = predictor.served.source.tokenizer(task.render(row, "row 0", labelled=False).context)["input_ids"]
    rows_TH = model.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(predictor.embeds(row), torch.cat([predictor.served.prompts[0], rows_TH]))


def test_no_rows_have_no_answers(saved):
    predictor = ptp_ds.Predictor.from_pretrained(saved())
    assert predictor.predict([]) == []
    assert predictor.generate([]) == []


def test_a_prompt_inside_the_text_stands_there(saved, lively_model):
    spec = json.loads((DEMO_DATA.parent / "templates" / "Reviews.json").read_text())
    task = parse_task({**spec, "text": "Review: {review}\n<prompt>Sentiment:"}, "test")
    predictor = ptp_ds.Predictor.from_pretrained(saved("soft", task), precision="fp32", task=task)
    rows_TH = predictor.embeds(REVIEWS[0])
    front = len(predictor.served.source.tokenizer(f"Review: {REVIEWS[0]}\n")["input_ids"])
    assert torch.equal(rows_TH[front : front + 4], predictor.served.prompts[0])
    ids = predictor.served.source.tokenizer(f"Review: {REVIEWS[0]}\nSentiment:")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(lively_model).eval()
    wanted = generate(model, predictor.served.prompts[0], "soft", ids, 6, prompt_at=front)
    assert predictor.generate(REVIEWS[0], max_new_tokens=6, do_sample=False, eos_token_id=None) == (
        predictor.served.source.tokenizer.decode(wanted, skip_special_tokens=True)
    )


def test_a_model_whose_config_names_an_attention_that_is_not_installed(saved, lively_model, tmp_path):
    shutil.copytree(lively_model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_attn_implementation": "flash_attention_2"}))
    predictors = [ptp_ds.Predictor.from_pretrained(saved(), model=model) for model in (None, str(tmp_path / "model"))]
    for answers in ([p.predict(REVIEWS) for p in predictors], [p.generate(REVIEWS) for p in predictors]):
        assert answers[0] == answers[1]


def test_threads_share_a_predictor(saved, monkeypatch):
    """transformers sets torch's default dtype while it builds a model: two at once would leave bf16 behind."""
    folder = saved()
    first, second = (ptp_ds.Predictor.from_pretrained(folder, precision="bf16") for _ in range(2))
    built = []

    def slowly(build):
        def one(*args, **kwargs):
            built.append(+1)
            time.sleep(0.1)
            found = build(*args, **kwargs)
            built.append(-1)
            return found

        return one

    for name in ("load", "plain"):
        monkeypatch.setattr(Served, name, slowly(getattr(Served, name)))
    calls = [first.predict, second.predict, first.predict, first.generate, first.generate]
    with ThreadPoolExecutor(len(calls)) as pool:
        found = [task.result() for task in [pool.submit(call, REVIEWS) for call in calls]]
    assert built == [+1, -1] * 3
    assert found[0] == found[1] == found[2]
    assert torch.get_default_dtype() == torch.float32


def test_predictions_whatever_torchs_default_dtype_is(saved, kind):
    """Another thread may load a model of its own by transformers, which sets it."""
    predictor = ptp_ds.Predictor.from_pretrained(saved(kind), precision="fp32")
    wanted = predictor.predict(REVIEWS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert predictor.predict(REVIEWS) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("precision", ["bfloat16", "float32", torch.float32])
def test_a_precision_that_there_is_not_names_those_that_there_are(saved, precision):
    with pytest.raises(UserError, match=rf"precision is '?{precision}'?; choose from auto, fp32, bf16, fp16\."):
        ptp_ds.Predictor.from_pretrained(saved(), precision=precision)


def test_embeddings_are_one_rows(saved):
    passage = {"text": "A.", "questions": [{"idx": 0, "question": "Q?", "answers": [{"idx": n, "text": "B"}
                                                                                   for n in range(2)]}]}  # fmt: skip
    predictor = ptp_ds.Predictor.from_pretrained(saved())
    for rows, count in ((REVIEWS, 3), ([], 0)):
        with pytest.raises(UserError, match=rf"embeds takes one row with one question, not {count}; call it for each"):
            predictor.embeds(rows)
    assert torch.equal(predictor.embeds(REVIEWS[:1]), predictor.embeds(REVIEWS[0]))
    several = ptp_ds.Predictor.from_pretrained(saved(), task="MultiRC")
    with pytest.raises(UserError, match="one question, not 2"):
        several.embeds({"idx": 0, "passage": passage})


def test_rows_that_are_shortened_are_named(saved, caplog):
    predictor = ptp_ds.Predictor.from_pretrained(saved(), max_length=40)
    texts = [REVIEWS[1], *["A film of the town. " * 20] * 7]
    predictor.served.examples(_split(rows_of(texts, predictor.task)))
    said = "longer than the context: shortened in 'review' (row 1, row 2, row 3, row 4, row 5 and 2 more)"
    assert caplog.messages[-1] == f"7 rows were {said}"


def test_what_does_not_fit_is_one_sentence(saved, tmp_path):
    with pytest.raises(UserError, match="Predictor: 'max_length' must be int, not '100'"):
        ptp_ds.Predictor.from_pretrained(saved(), max_length="100")
    predictor = ptp_ds.Predictor.from_pretrained(saved("deep"))
    with pytest.raises(UserError, match="A deep prompt is keys and values"):
        predictor.embeds("Fine.")
    with pytest.raises(UserError, match="max_new_tokens 1000 leaves no room"):
        predictor.generate("Fine.", max_new_tokens=1000)
    for count in (0, "5"):
        with pytest.raises(UserError, match=rf"max_new_tokens is '?{count}'?; expected a whole number of 1 or more"):
            predictor.generate("Fine.", max_new_tokens=count)
    with pytest.raises(UserError, match="the row has no field 'review'"):
        predictor.predict({"text": "Fine."})
    with pytest.raises(UserError, match=r"row 0: field 'review' holds '.ud83d' at character 4, half a character"):
        predictor.predict("bad \ud83d half")
    with pytest.raises(UserError, match="there is no such folder"):
        ptp_ds.Predictor.from_pretrained(tmp_path / "none")
