#!/usr/bin/env python
"""Times a train step of ours against a plain loop over peft's PromptTuning, on the same rows, in one run.

    python scripts/bench_step.py --data_dir DATA --json bench.json

(a) peft as documented: rows padded on the right, full logits. (b) the best of it: padded on the left and
logits_to_keep=1 (or as many as the longest answer). Both carry the same regulariser: clean pass, K ascent passes for
delta's gradient, perturbed pass, one backward, AdamW step. A ratio is the median over batches of peft / ours.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptp_ds.backbone import Backbone
from ptp_ds.config import DEFAULT_DS_CONFIG, RunConfig
from ptp_ds.data import load_split, tokenise
from ptp_ds.distributed import prepare_environment, start_processes, stop_processes
from ptp_ds.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.engine import Engine
from ptp_ds.loading import load_backbone, load_config, load_tokenizer
from ptp_ds.models import EMBEDDED_MODEL, resolve_model
from ptp_ds.objective import cross_entropy_sum, divergence_sum
from ptp_ds.packing import Example, pack
from ptp_ds.perturb import Noise
from ptp_ds.prompts import SoftPrompt, initial_prompt
from ptp_ds.run import report_error, versions
from ptp_ds.seeding import make_generator
from ptp_ds.step import optimizer_step, settings_of
from ptp_ds.tasks import load_task

METHODS = ("none", "gaussian", "pgd")


class PeftLoop:
    """What a user of peft writes: padded rows, one full pass for each stream and ascent step."""

    def __init__(self, folder: Path, prompt_PH: Tensor, dtype: torch.dtype, device: torch.device, keep: bool) -> None:
        from peft import PromptTuningConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt_PH.shape[0])
        self.model, self.keep, self.device = get_peft_model(base, settings), keep, device
        weight = self.model.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            weight.copy_(prompt_PH)
        self.optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
        self.embed = base.get_input_embeddings()

    def pad(self, examples: list[Example]) -> dict[str, Tensor]:
        """Sequences [rows x candidates or rows, L], their mask and where the answers lie."""
        single = all(len(candidate) == 1 for example in examples for candidate in example.candidate_ids)
        rows: list[tuple[list[int], list[list[int]]]] = []
        for example in examples:
            answers = [list(answer) for answer in example.candidate_ids]
            if single:
                rows.append((list(example.context_ids), answers))
            else:
                rows.extend((list(example.context_ids) + answer[:-1], [answer]) for answer in answers)
        longest = max(len(ids) for ids, _ in rows)
        ids_RL = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_RL = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, (ids, _) in enumerate(rows):
            place = slice(longest - len(ids), longest) if self.keep else slice(0, len(ids))
            ids_RL[number, place], mask_RL[number, place] = torch.tensor(ids), 1
        self.rows, self.single, self.longest = rows, single, longest
        self.gold = torch.tensor([example.gold for example in examples], device=self.device)
        return {"ids": ids_RL.to(self.device), "mask": mask_RL.to(self.device)}

    def scores(self, embeds_RLH: Tensor, mask_RL: Tensor) -> Tensor:
        """[B, C] candidate log-probabilities by peft's own forward."""
        most = max(len(answer) for _, answers in self.rows for answer in answers)
        keep = {"logits_to_keep": most} if self.keep else {}
        logits = self.model(inputs_embeds=embeds_RLH, attention_mask=mask_RL, **keep).logits
        parts = []
        for number, (ids, answers) in enumerate(self.rows):
            size = len(answers[0])
            end = logits.shape[1] if self.keep else logits.shape[1] - self.longest + len(ids)
            log_probs = logits[number, end - size : end].float().log_softmax(-1)
            for answer in answers:
                parts.append(log_probs[torch.arange(size), torch.tensor(answer)].sum())
        return torch.stack(parts).view(self.gold.shape[0], -1)

    def step(self, examples: list[Example], method: str, run: RunConfig, unit: float) -> float:
        """One optimizer step; returns the summed loss."""
        padded = self.pad(examples)
        with torch.no_grad():
            clean = self.embed(padded["ids"])
        scores = self.scores(clean, padded["mask"])
        loss = cross_entropy_sum(scores, self.gold)
        if method != "none":
            scale = run.sigma * unit / clean.shape[-1] ** 0.5
            delta = torch.randn_like(clean) * scale * padded["mask"][..., None]
            for _ in range(run.ascent_steps if method == "pgd" else 0):
                delta = self._ascend(clean, delta, padded["mask"], scores.detach(), run, unit)
            perturbed = self.scores(clean + delta, padded["mask"])
            loss = loss + run.reg_weight * divergence_sum(run.divergence, scores, perturbed, self.gold)
        (loss / len(examples)).backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _ascend(
        self, clean: Tensor, delta: Tensor, mask: Tensor, scores: Tensor, run: RunConfig, unit: float
    ) -> Tensor:
        delta = delta.detach().requires_grad_()
        objective = divergence_sum(run.divergence, scores, self.scores(clean + delta, mask), self.gold)
        (gradient,) = torch.autograd.grad(objective, delta)
        moved = delta + run.step_length * unit * gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        moved = moved.detach() * mask[..., None]
        return moved * (run.epsilon * unit / moved.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)


class Ours:
    """The trainer's own step, through the DeepSpeed engine."""

    def __init__(self, engine: Engine, unit: float, device: torch.device) -> None:
        self.engine, self.unit, self.device = engine, unit, device

    def step(self, examples: list[Example], method: str, run: RunConfig, number: int) -> float:
        """One optimizer step; returns the summed loss."""
        run = replace(run, perturbation=method, batch_size=len(examples))
        row = pack(examples).to(self.device)
        settings = settings_of(run, self.unit)
        loss, _ = optimizer_step(self.engine, row, run, settings, Noise(run.seed, number), 1e-3)
        self.tokens = loss.tokens
        return float(loss.total.detach())


def timed(call: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """(seconds, the call's value), waiting for the device at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def draw_batches(examples: list[Example], rows: int, count: int, seed: int) -> list[list[Example]]:
    """Seeded batches of `rows` examples without replacement, as many as asked for (reshuffled when used up)."""
    batches: list[list[Example]] = []
    epoch = 0
    while len(batches) < count:
        order = torch.randperm(len(examples), generator=make_generator(seed, "bench", epoch)).tolist()
        batches += [[examples[i] for i in order[j : j + rows]] for j in range(0, len(order) - rows + 1, rows)]
        epoch += 1
    return batches[:count]


def measure(setting: dict[str, Any], batches: list[list[Example]], ours: Ours, peft: list[PeftLoop], run: RunConfig,
            plain_keep: list[float]) -> dict[str, Any]:  # fmt: skip
    """One row of the table. plain_keep: (b)'s seconds without regulariser, batch by batch; filled by method none."""
    method, device = setting["method"], ours.device
    times: dict[str, list[float]] = {"ours": [], "peft": [], "peft_keep": []}
    tokens: dict[str, int] = {"ours": 0, "peft": 0}
    for number, batch in enumerate(batches):
        seconds, loss = timed(lambda batch=batch, number=number: ours.step(batch, method, run, number), device)
        times["ours"].append(seconds)
        for name, loop in zip(("peft", "peft_keep"), peft, strict=True):
            seconds, value = timed(lambda batch=batch, loop=loop: loop.step(batch, method, run, ours.unit), device)
            times[name].append(seconds)
            if number == 0 and method == "none" and name == "peft":
                check_same_loss(loss, value, setting["dtype"])
        if method == "none":
            plain_keep.append(times["peft_keep"][-1])
        streams = 1 if method == "none" else 2
        tokens["ours"] += ours.tokens
        tokens["peft"] += streams * len(peft[0].rows) * (setting["prompt_length"] + peft[0].longest)
    ratios = {
        name: statistics.median(p / o for p, o in zip(times[name], times["ours"], strict=True))
        for name in ("peft", "peft_keep")
    }
    row = {
        **setting, "ours_seconds": statistics.median(times["ours"]), "peft_seconds": statistics.median(times["peft"]),
        "peft_keep_seconds": statistics.median(times["peft_keep"]), "ratio_peft": ratios["peft"],
        "ratio_peft_keep": ratios["peft_keep"], "tokens_ours": tokens["ours"] // len(batches),
        "tokens_peft": tokens["peft"] // len(batches),
    }  # fmt: skip
    if plain_keep:
        shares = [o / plain for o, plain in zip(times["ours"], plain_keep, strict=True)]
        row["share_of_peft_keep_without_regulariser"] = statistics.median(shares)
    return row


def check_same_loss(ours: float, theirs: float, dtype: str) -> None:
    """Both sides must have done the same work: the first clean losses agree."""
    bound = (1e-3 if dtype == "float32" else 5e-2) * max(1.0, abs(theirs))
    if abs(ours - theirs) > bound:
        raise ValueError(
            f"Our clean loss {ours} and peft's {theirs} differ; the benchmark would compare different work."
        )


def print_row(row: dict[str, Any]) -> None:
    share = row.get("share_of_peft_keep_without_regulariser")
    print(
        f"{row['task']:6} {row['rows']:4} {row['prompt_length']:5} {row['method']:9} {row['ours_seconds']:8.2f} "
        f"{row['peft_seconds']:8.2f} {row['peft_keep_seconds']:8.2f} {row['ratio_peft']:7.2f} "
        f"{row['ratio_peft_keep']:7.2f} {share if share is None else format(share, '8.2f')} "
        f"{row['tokens_ours']:8} {row['tokens_peft']:8}",
        flush=True,
    )


def default_data() -> str | None:
    """The developers' copy of SuperGLUE beside the checkout where there is one, else None: the packaged demo data."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "superglue"
    return str(folder) if folder.is_dir() else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument(
        "--data_dir", default=default_data(), help="folder with <Task>/train.jsonl (default: %(default)s)"
    )
    parser.add_argument("--split", default="train")
    parser.add_argument("--tasks", nargs="+", default=["RTE"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--prompt_lengths", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--pairs", type=int, default=3, help="batches timed for each setting")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--ds_config", default=DEFAULT_DS_CONFIG.replace("zero3", "zero2"))
    parser.add_argument("--json", help="write one row a setting to this file")
    return parser.parse_args()


def main() -> int:
    prepare_environment()
    args = parse()
    ranks = start_processes()
    folder = resolve_model(args.model)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    width = config.get_text_config().hidden_size
    run = RunConfig(ds_config=args.ds_config, precision=args.precision)
    resolved = resolve_ds_config(read_ds_config(args.ds_config), run, set(), ranks.world, width)
    dtype = str(resolved.dtype).removeprefix("torch.")
    print(f"{args.model} {dtype} on {ranks.device.type}, {torch.get_num_threads()} threads; seconds are medians of "
          f"{args.pairs} batches, ratios medians of pairs; rows from {args.data_dir or 'the packaged demo data'}; "
          f"{json.dumps(versions())}")  # fmt: skip
    print("task   rows prompt method       ours   peft a   peft b     a/ours b/ours ours/b0   tokens  peft's")
    table = []
    for length in args.prompt_lengths:
        backbone: Backbone = load_backbone(folder, resolved, ranks)
        prompt = initial_prompt("vocab", length, backbone, tokenizer, seed=0, text=None, answers=[])
        engine = Engine(SoftPrompt(prompt), backbone, resolved, ranks)
        ours = Ours(engine, backbone.mean_embedding_norm(), ranks.device)
        peft = [PeftLoop(folder, prompt, resolved.dtype, ranks.device, keep) for keep in (False, True)]
        for name in args.tasks:
            task = load_task(name)
            split = load_split(task, args.split, args.data_dir, None)
            examples = list(tokenise(task, split, tokenizer, 2048).examples)
            for rows in args.rows:
                batches = draw_batches(examples, rows, args.pairs + 1, seed=0)
                ours.step(batches[-1], "none", run, 0)  # warm-up, on a batch that isn't timed
                for loop in peft:
                    loop.step(batches[-1], "none", run, ours.unit)
                plain_keep: list[float] = []
                for method in args.methods:
                    engine.set_prompt(prompt)
                    setting = {"task": name, "rows": rows, "prompt_length": length, "method": method, "dtype": dtype}
                    for loop in peft:
                        loop.optimizer.param_groups[0]["params"][0].data.copy_(prompt)
                    row = measure(setting, batches[:-1], ours, peft, run, plain_keep)
                    table.append(row)
                    print_row(row)
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    stop_processes()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(report_error(error))
