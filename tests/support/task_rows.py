"""One row of each built-in task, as its official files have it."""

ROWS = {
    "BoolQ": {"passage": "Glass -- It melts.", "question": "can glass melt", "label": True},
    "CB": {"premise": "It rains, he said.", "hypothesis": "it rains", "label": "neutral"},
    "COPA": {"premise": "The ice melted. ", "choice1": "It was warm.", "choice2": "I froze it.", "question": "cause",
             "label": 1},
    "RTE": {"premise": "A came.", "hypothesis": "B came.", "label": "not_entailment"},
    "Reviews": {"review": "A fine film.", "label": "positive"},
    "WiC": {"word": "bank", "sentence1": "A river bank.", "sentence2": "He robbed a bank.", "label": False},
    "AX-b": {"sentence1": "A came.", "sentence2": "A did not come.", "label": "not_entailment"},
    "AX-g": {"idx": 3, "premise": "A met B.", "hypothesis": "B met A.", "label": "entailment"},
    "MultiRC": {"idx": 7, "passage": {"text": "It rained."}, "questions": []},
    "ReCoRD": {"passage": {"text": "Ann met Bob in Rome.\n@highlight\nA short visit", "entities": [
        {"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 15, "end": 18}, {"start": 0, "end": 2}]},
        "qas": [{"query": "Then he said: (@placeholder's town).", "answers": [{"text": "Rome"}, {"text": "rome"}]},
                {"query": "@placeholder left.", "answers": [{"text": "Ann"}, {"text": "Bob"}]}]},
    "WSC": {"text": "Mark told the old man a lie, and he believed it.", "label": False,
            "target": {"span1_text": "Mark", "span2_text": "he", "span1_index": 0, "span2_index": 8}},
}  # fmt: skip
ROWS["MultiRC"]["passage"]["questions"] = [
    {"question": "What fell?", "idx": 0, "answers": [{"text": "Rain", "label": 1}, {"text": "Snow", "label": 0}]},
    {"question": "When?", "idx": 1, "answers": [{"text": "Today", "label": 0}]},
]
