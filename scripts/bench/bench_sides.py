"""The two sides of bench_step.py, opened on the same model, task and start: ours and peft's."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_measure import PeakMemory, weights_of
from peft_loop import PeftLoop
from torch import Tensor

from ptp_ds.backbone.check import check_backbone
from ptp_ds.backbone.loading import load_backbone
from ptp_ds.backbone.sharding import OUTSIDE_LAYERS, ResolvedDeepSpeed
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.models.heads import Head, HeadPlan, auto_class, plan_head, rows_for
from ptp_ds.models.source import load_config, load_tokenizer, resolve_model
from ptp_ds.perturb import Noise
from ptp_ds.prompts import SoftPrompt, initial_ids
from ptp_ds.prompts.deep import join_deep
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import tail_ids
from ptp_ds.tasks.example import Example
from ptp_ds.training.engine import Engine
from ptp_ds.training.step import optimizer_step, settings_of


class Ours:
    """The trainer's own step, through the DeepSpeed engine."""

    def __init__(self, engine: Engine, trained: Tensor, unit: float, device: torch.device) -> None:
        self.engine, self.trained, self.unit, self.device = engine, trained, unit, device
        self.backbone = engine.backbone

    def step(self, examples: list[Example], method: str, run: RunConfig, number: int) -> float:
        """One optimizer step; returns the summed loss."""
        run = replace(run, perturbation=method, batch_size=len(examples))
        row = self.backbone.rows.pack(examples).to(self.device)
        settings = settings_of(run, self.unit)
        loss, _ = optimizer_step(
            self.engine, row, run, settings, Noise(run.seed, number), 1e-3, global_count=len(examples)
        )
        self.row_tokens, self.tokens = row.num_tokens, loss.tokens
        self.prefix_inputs = self.backbone.prefix_length(self.trained, row) if self.backbone.prompt == "soft" else 0
        return float(loss.total.detach())

    def peak_bytes(self, examples: list[Example], method: str, run: RunConfig) -> int:
        """Peak bytes that a step needs beside the weights; also warms the step up."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(examples, method, run, 0)
            return torch.cuda.max_memory_allocated() - before
        with PeakMemory(weights_of(self.backbone)) as memory:
            self.step(examples, method, run, 0)
        return memory.peak

    def traffic(self) -> dict[str, Any]:
        """Gathers since the last reset: the most of any layer, bytes, and the most elements held at once."""
        traffic = self.backbone.shards.traffic
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in self.backbone.parameters())
        layers = [count for number, count in traffic.gathers.items() if number != OUTSIDE_LAYERS]
        return {"gathers_per_layer": max(layers, default=0), "gathered_bytes": traffic.gathered_bytes,
                "peak_gathered_share": traffic.peak_elements / whole}  # fmt: skip


@dataclass(frozen=True)
class Sides:
    """What both sides share. prompt: soft or deep. peft_rows: examples of peft's micro-batch. kernels, joint: ours."""

    folder: Path
    config: Any
    tokenizer: Any
    task: Task
    plan: HeadPlan
    resolved: ResolvedDeepSpeed
    ranks: Ranks
    prompt: str
    peft_rows: int
    kernels: str
    joint: bool | None = None

    @classmethod
    def of(
        cls, model: str, task: Task, run: RunConfig, ranks: Ranks, prompt: str, peft_rows: int,
        joint: bool | None = None,
    ) -> "Sides":  # fmt: skip
        """From a model's name; ValueError for a head that peft has no loop for."""
        folder = resolve_model(model)
        config = load_config(folder)
        plan = plan_head(config, "auto", task)
        if plan.kind not in ("causal", "classes") or (plan.kind == "classes" and plan.choice):
            raise UserError("peft has no loop for this; give a causal model, or an encoder and a task of classes.")
        width = config.get_text_config().hidden_size
        resolved = resolve_ds_config(read_ds_config(run.ds_config), run, set(), ranks.world, width)
        return cls(
            folder, config, load_tokenizer(folder), task, plan, resolved, ranks, prompt, peft_rows, run.kernels, joint
        )

    @property
    def dtype(self) -> str:
        """The backbone's, as text."""
        return str(self.resolved.dtype).removeprefix("torch.")

    def open_ours(self, length: int) -> tuple[Ours, Tensor]:
        """Our side, and what is trained (prompt and head) that both start from."""
        backbone = load_backbone(
            self.folder, self.resolved, self.ranks, self.plan, self.kernels, share=True, joint=self.joint
        )
        check_backbone(backbone)  # as before training: narrow heads are proven by it
        head = backbone.head
        start = backbone.embed_ids(initial_ids("vocab", length, self.tokenizer, backbone.vocabulary, seed=0))
        tensors = head.start(self.config, 0)
        trained = head.join(start, tensors)
        if self.prompt == "deep":
            trained = head.join(join_deep(backbone.keys_of(start, trained), self.config), tensors)
        backbone.serve(self.prompt, rows_for(self.plan, self.task, self.tokenizer, self.prompt, length), length)
        engine = Engine(SoftPrompt(trained), backbone, self.resolved, self.ranks)
        return Ours(engine, trained, backbone.mean_embedding_norm(), self.ranks.device), trained

    def open_peft(self, trained: Tensor, head: Head, keep: bool) -> PeftLoop:
        """peft's side; keep: see PeftLoop."""
        auto = auto_class(self.config, self.plan.kind, self.folder)
        labels = {"num_labels": self.plan.outputs} if self.plan.kind == "classes" else {}
        base = auto.from_pretrained(self.folder, dtype=self.resolved.dtype, use_safetensors=True, **labels).to(
            self.ranks.device
        )
        return PeftLoop(
            base, trained, self.ranks.device, keep, self.peft_rows, head, self.prompt, tail_ids(self.tokenizer)
        )
