"""ptp_ds.Predictor: a saved adapter on its model, ready for rows; text by transformers' own generate."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptp_ds.adapters.answers import answer_lines
from ptp_ds.adapters.generate import Inputs, generation_inputs, token_embeddings
from ptp_ds.adapters.read import adapter_folder
from ptp_ds.adapters.served import Served, alone, serve, whole
from ptp_ds.api.data import read_task, rows_of
from ptp_ds.api.manners import own_environment
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.flags import require_type
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import brief
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split
from ptp_ds.tasks.example import Example

Row = Mapping[str, Any] | str
Rows = Row | Sequence[Row] | Path
# Held while a model is built: transformers sets torch's default dtype meanwhile, the process's one for all threads.
_building = threading.Lock()


@dataclass
class Predictor:
    """An adapter's answers. The model is loaded when it is needed: once for predict, once for generate and embeds;
    threads may share it.

    served: the adapter with its model's configuration, tokenizer and task. precision: of the model, see --precision.
    """

    served: Served
    precision: str = "auto"
    _backbone: Backbone | None = field(default=None, repr=False)
    _model: Any = field(default=None, repr=False)

    @classmethod
    def from_pretrained(
        cls, adapter: str | Path, *, model: str | None = None,
        task: Task | str | Path | Mapping[str, Any] | None = None,
        precision: str = "auto", max_length: int | None = None,
    ) -> "Predictor":  # fmt: skip
        """The adapter in a run's folder, in a folder of ours or peft's, or on the hub, by its id.

        model, task, max_length: None for those of the adapter's run. Raises UserError for what doesn't fit together.
        """
        with own_environment():
            whole(precision)
            require_type("Predictor", "max_length", max_length)
            named = None if task is None else read_task(task)
            with _building:
                found = serve([adapter_folder(adapter)], model=model, task=named, max_length=max_length)
        return cls(found, precision)

    @property
    def task(self) -> Task:
        """What the adapter answers."""
        return self.served.task

    def predict(self, rows: Rows, eval_tokens: int = RunConfig.eval_tokens) -> list[dict[str, Any]]:
        """For each row `answer`, the likeliest label, and `probabilities` of all, by label.

        rows: dicts with the fields of the task's template, or texts where it has a single field; one, or several, or a
        datasets.Dataset or pandas.DataFrame; the pathlib.Path of a .jsonl, .csv or .tsv file is that file's rows. Rows
        that hold several questions give a line each, as predict.py does. eval_tokens: tokens of a pass. Raises
        UserError for a row without a field.
        """
        split = _split(rows_of(rows, self.task))
        if not split.rows:
            return []
        with own_environment():
            examples = self.served.examples(split)
            scores_NC = self.served.score(self._packed(examples), examples, alone(), eval_tokens)
        return answer_lines(self.task, split, scores_NC)

    def generate(self, rows: Rows, *, max_new_tokens: int | None = None, **kwargs: Any) -> Any:
        """The text that the model writes behind a row's context: a text for one row, a list for several.

        max_new_tokens: None for what a `generation_config` among kwargs says, 20 without one. kwargs: of transformers'
        generate (do_sample, temperature, num_beams, ...). Several rows are one batch, padded
        on the left; with num_return_sequences each row gives as many, one behind the other. Raises UserError where the
        head doesn't continue texts.
        """
        self._require_causal("generate")
        single = isinstance(rows, str | Mapping)
        given = rows_of(rows, self.task)
        if not given:
            return []
        said = (max_new_tokens, getattr(kwargs.get("generation_config"), "max_new_tokens", None), 20)
        most = next(count for count in said if count is not None)
        if not isinstance(most, int) or most < 1:
            raise UserError(f"max_new_tokens is {brief(most)}; expected a whole number of 1 or more.")
        examples = self._contexts(given, most)
        tokenizer, model = self.served.source.tokenizer, self._plain()
        inputs = generation_inputs(model, self.served.prompts[0], self.served.kind, examples, _copies(model, kwargs))
        if tokenizer.eos_token_id is not None:
            kwargs.setdefault("pad_token_id", tokenizer.pad_token_id or tokenizer.eos_token_id)
        with torch.inference_mode():
            found = model.generate(**inputs.arguments, max_new_tokens=most, **kwargs)
        return self._texts(found, inputs, single)

    def embeds(self, row: Row) -> Tensor:
        """[P + T, H] what stands in front of the model for a row: the prompt and the context's token embeddings, in the
        model's dtype, for servers that take prompt embeddings (vLLM). Raises UserError for a deep prompt, several rows
        and a row of several questions.
        """
        self._require_causal("embeds")
        if self.served.kind != "soft":
            raise UserError("A deep prompt is keys and values of every layer, not embeddings; embeds needs a soft one.")
        given = rows_of(row, self.task)
        examples = self._contexts(given, 0) if given else []
        if len(examples) != 1:
            raise UserError(f"embeds takes one row with one question, not {len(examples)}; call it for each of them.")
        return token_embeddings(self._plain(), self.served.prompts[0], examples[0]).cpu()

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Puts the adapter on the hub, as owner/name; returns its address. Raises UserError without a token."""
        from ptp_ds.adapters.share import push_adapter

        return push_adapter(self.served.folders[0], repo_id, private=private)

    def _contexts(self, rows: list[dict[str, Any]], left: int) -> Sequence[Example]:
        """The rows' contexts, with room for `left` tokens behind each."""
        if left >= self.served.room:
            raise UserError(f"max_new_tokens {left} leaves no room for a row: {self.served.room} tokens fit behind the "
                            "prompt.")  # fmt: skip
        return self.served.examples(_split(rows), left=left)

    def _texts(self, found: Any, inputs: Inputs, single: bool) -> Any:
        sequences = getattr(found, "sequences", found)  # return_dict_in_generate
        new = sequences[:, inputs.repeated :]
        texts = self.served.source.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts[0] if single and len(texts) == 1 else texts

    def _require_causal(self, what: str) -> None:
        kind = self.served.source.head_plan.kind
        if kind != "causal":
            raise UserError(f"{what} needs a causal model; {self.served.model} serves this adapter with a {kind} head.")

    def _packed(self, examples: Sequence[Example]) -> Backbone:
        """The model that packs rows, loaded once, checked with rows as long as the first ones."""
        if self._backbone is None:
            with _building:
                if self._backbone is None:
                    self._backbone = self.served.load(whole(self.precision), alone(), examples)
        return self._backbone

    def _plain(self) -> Any:
        """The model as transformers loads it, loaded once."""
        if self._model is None:
            with _building:
                if self._model is None:
                    self._model = self.served.plain(self.precision)
        return self._model


def _copies(model: Any, given: Mapping[str, Any]) -> int:
    """How often generate repeats each row: for its beams, or the texts that it returns. Its arguments go before its
    generation_config, and that before the model's own."""
    configs = (given.get("generation_config"), model.generation_config)
    counts = [
        [given.get(name), *(getattr(config, name, None) for config in configs)]
        for name in ("num_beams", "num_return_sequences")
    ]
    return max(next((int(count) for count in said if count is not None), 1) for said in counts)


def _split(rows: list[dict[str, Any]]) -> Split:
    return Split(rows, [f"row {number}" for number in range(len(rows))], "")
