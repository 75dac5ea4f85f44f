"""Run by tests/training/test_engine.py under torchrun: counts what ZeRO-3 keeps and gathers; prints one JSON line."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.backbone.sharded_loading import build_sharded, fill_randomly
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import PackedRow, pack, pack_text_twins
from ptp_ds.perturb import Noise
from ptp_ds.perturb.neighbours import WORD, Neighbours, Vocabulary
from ptp_ds.perturb.text_scoring import TextScorer
from ptp_ds.prompts import SoftPrompt
from ptp_ds.ranks.distributed import exit_process, start_processes, stop_processes
from ptp_ds.tasks.example import Example
from ptp_ds.training.engine import Engine
from ptp_ds.training.step import settings_of, step_in_parts

# Nothing stays gathered for its own sake: DeepSpeed's defaults would hide what is counted here.
STRICT = {
    "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0,
}  # fmt: skip


def snapshot(model: torch.nn.Module) -> list[Any]:
    """Every partition, buffer and train flag of the backbone, as bytes."""
    parts: list[Any] = [parameter.ds_tensor.clone() for parameter in model.parameters()]
    parts += [buffer.clone() for buffer in model.buffers()]
    return parts


def packed(engine: Engine, examples: list[Example], run: RunConfig) -> PackedRow:
    """The examples, with the twins of an attack; every token is a word here."""
    if run.active_perturbation is None or run.active_perturbation.attack is None:
        return pack(examples)
    words = Vocabulary([WORD] * 128, [f" {chr(97 + n // 26)}{chr(97 + n % 26)}oo" for n in range(128)])
    scorer = TextScorer(engine.backbone, engine.prompt(), examples, 0, Neighbours(words, 4, 0.0))
    return pack_text_twins(
        examples, [t.context_ids for t in run.active_perturbation.attack(scorer, settings_of(run, 1.0)).twins]
    )


def main(perturbation: str, activations: str, folder: Path, parts: int) -> None:
    ranks = start_processes()
    file = folder / f"strict-{ranks.rank}.json"
    file.write_text(json.dumps({"zero_optimization": STRICT}))
    run = RunConfig(
        ds_config=str(file), perturbation=perturbation, batch_size=4 * ranks.world, gradient_accumulation_steps=4,
        ascent_steps=2,
    )  # fmt: skip
    resolved = resolve_ds_config(read_ds_config(run.ds_config), run, set(), ranks.world, 64)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip
    model = build_sharded(config, resolved)
    torch.manual_seed(ranks.rank)
    fill_randomly(model)
    backbone = Backbone(model, Activations(activations))
    check_backbone(backbone, ranks=ranks)
    engine = Engine(SoftPrompt(torch.zeros(7, 64)), backbone, resolved, ranks)
    engine.set_prompt(torch.randn(7, 64, generator=torch.Generator().manual_seed(0)))
    before, modes = snapshot(model), [module.training for module in model.modules()]
    peak, fetched, gathers = [0], [], []

    def count(*_: object) -> None:
        held = sum(p.ds_numel for p in model.model.layers.parameters() if p.ds_status.name != "NOT_AVAILABLE")
        peak[0] = max(peak[0], held)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(count)
        layer.mlp.register_full_backward_hook(count)
    generator = torch.Generator().manual_seed(ranks.rank)
    for step in range(2):
        examples = [
            Example(context_ids=torch.randint(0, 128, (size,), generator=generator).tolist(), movable=[True] * size,
                    candidate_ids=[[1, 2], [3]], gold=1, index=size) for size in (5, 9, 17, 3)
        ]  # fmt: skip
        if ranks.rank:  # nothing to attack on this rank: its passes are the others' all the same
            examples = [replace(example, attackable=[False] * len(example.context_ids)) for example in examples]
        backbone.shards.traffic.reset()
        with backbone.shards.outside_layers():
            rows = [packed(engine, examples[part::parts], run) for part in range(parts)]
            step_in_parts(
                engine, rows, [None] * parts, run, settings_of(run, 1.0), Noise(0, step), 0.01,
                global_count=run.batch_size,
            )  # fmt: skip
        fetched.append(engine.grad_norm())
        gathers.append(backbone.shards.traffic.gathers)
    kept, whole = engine.sharded_elements()
    same = all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    report = {
        "kept": kept, "whole": whole, "gathers": gathers, "peak_layers": backbone.shards.traffic.peak_layers,
        "peak_of_layers": peak[0] / sum(p.ds_numel for p in model.model.layers.parameters()),
        "grad_norms": fetched, "backbone_unchanged": same,
        "modes_unchanged": modes == [module.training for module in model.modules()] and not any(modes),
        "gathered_between_steps": sum(p.ds_numel for p in model.parameters() if p.ds_status.name == "AVAILABLE"),
        "no_gradient": all(p.grad is None and not p.requires_grad for p in model.parameters()),
    }  # fmt: skip
    (folder / f"report-{ranks.rank}.json").write_text(json.dumps(report))
    stop_processes()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    exit_process(0)  # see there: a rank now and then aborts in the interpreter's own teardown
