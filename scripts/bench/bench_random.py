"""Large models with random weights, ready to train: real shapes and dtypes, no files. Their scores mean nothing."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from bench_measure import wait
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from ptp_ds.backbone.activations import activations_on
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.backbone.shapes import NAMED, ModelShape, shape_of
from ptp_ds.backbone.sharded_loading import build_sharded, fill_randomly
from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb import Noise
from ptp_ds.planning.plan import Memory, memory_of
from ptp_ds.planning.way import Way
from ptp_ds.planning.work import Cluster, layout_of, load_of
from ptp_ds.prompts import SoftPrompt
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example
from ptp_ds.training.engine import Engine
from ptp_ds.training.step import StepLoss, settings_of, step_in_parts

_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
SHAPES = {  # tiny is for checks of the scripts themselves
    "8b": NAMED["llama-8b"] | {"rope_theta": 500000.0},
    "smollm2": NAMED["smollm2-135m"],
    "tiny": _TINY,
    "tiny-128k": _TINY | {"vocab_size": 128256},
}  # fmt: skip


def deviation_of(config: LlamaConfig) -> float:
    """Of random weights: logits of every width then differ as an 8B model's do at 0.02, far above fp32's rounding."""
    return 0.02 * (4096 / config.hidden_size) ** 0.5


def config_of_shape(name: str, **changes: Any) -> LlamaConfig:
    """transformers' configuration of one of SHAPES."""
    settings = {"tie_word_embeddings": False, **SHAPES[name], **changes}
    return LlamaConfig(**settings, max_position_embeddings=8192, pad_token_id=None)


def random_examples(
    rows: int, vocabulary: int, rank: int, draw: int = 0, answer_lengths: Sequence[int] = (1, 1)
) -> list[Example]:
    """Rows of 40 to 160 random tokens and answers of these lengths, as RTE's are; another `draw` gives other rows."""
    generator = make_generator(draw, "large", rank)
    sizes = torch.randint(40, 161, (rows,), generator=generator).tolist()

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    return [
        Example(context_ids=tokens(size), movable=[True] * size, gold=number % len(answer_lengths), index=number,
                candidate_ids=[[1 + place, *tokens(length - 1)] for place, length in enumerate(answer_lengths)])
        for number, size in enumerate(sizes)
    ]  # fmt: skip


@dataclass
class Opened:
    """A random model behind the trainer's own engine. start: [P, H] the prompt. seconds: of each phase of opening."""

    config: LlamaConfig
    run: RunConfig
    resolved: ResolvedDeepSpeed
    ranks: Ranks
    engine: Engine
    start: Tensor
    unit: float
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        return self.engine.backbone

    @cached_property
    def shape(self) -> ModelShape:
        """Shapes of its parameters, for plans."""
        return shape_of(self.config, "causal")

    @property
    def dtype(self) -> str:
        """The backbone's, as text."""
        return str(self.resolved.dtype).removeprefix("torch.")

    def rows(self, count: int, draws: int, answer_lengths: Sequence[int] = (1, 1)) -> list[PackedRow]:
        """A packed row on the host for each step: `count` examples of this rank, other ones in every row."""
        of = (self.config.vocab_size, self.ranks.rank)
        return [
            self.backbone.rows.pack(random_examples(count, *of, draw, answer_lengths)) for draw in range(draws)
        ]  # fmt: skip

    def parted(self, count: int, draws: int, parts: int) -> list[tuple[PackedRow, ...]]:
        """Rows of as many examples, each in micro-batches for a step depth first."""
        of = (self.config.vocab_size, self.ranks.rank)
        drawn = [random_examples(count, *of, draw, (1, 1)) for draw in range(draws)]
        pack = self.backbone.rows.pack
        return [tuple(pack(examples[part::parts]) for part in range(parts)) for examples in drawn]

    def loss(self, row: PackedRow | Sequence[PackedRow], number: int, run: RunConfig | None = None) -> StepLoss:
        """One optimizer step, of which nothing is read; run: another one than the model was opened for.

        row: or several, micro-batches that go one after the other through all layers.
        """
        rows = [row] if isinstance(row, PackedRow) else list(row)
        examples = sum(one.num_examples for one in rows)
        run = replace(run or self.run, batch_size=examples * self.ranks.world)
        loss, _ = step_in_parts(
            self.engine, [one.to(self.ranks.device) for one in rows], [None] * len(rows), run,
            settings_of(run, self.unit), Noise(run.seed, number), 1e-3, global_count=run.batch_size,
        )  # fmt: skip
        return loss

    def step(
        self, row: PackedRow | Sequence[PackedRow], number: int, run: RunConfig | None = None
    ) -> tuple[float, int]:
        """(the summed loss, packed tokens) of one optimizer step; see loss."""
        loss = self.loss(row, number, run)
        return float(loss.total.detach()), loss.tokens

    def planned(self, run: RunConfig, tokens: int) -> Memory:
        """ptp_ds.planning's bytes of this rank for a step of `tokens` packed tokens on it, the prefix left out."""
        cluster = Cluster(hosts=1, gpus=self.ranks.world, gpu_memory=1e12, interconnect=1.0, local=1.0, memory=1.0,
                          link=1.0, disk=1.0, operations=1.0, cuda=self.ranks.device.type == "cuda")  # fmt: skip
        load = load_of(run, self.shape, self.resolved.dtype.itemsize, tokens * self.ranks.world)
        layout = layout_of(run.ds_config, read_ds_config(run.ds_config), cluster)
        parts = run.gradient_accumulation_steps if run.schedule == "depth" else 1
        way = Way(0 if parts > 1 else self.backbone.recomputed(load.row(self.ranks.world)), parts)
        return memory_of(self.shape, load, layout, cluster, way)


def open_random(
    config: LlamaConfig, run: RunConfig, ranks: Ranks, alike: bool = False, joint: bool | None = None
) -> Opened:
    """A model of this shape as training opens one: sharded, checked, behind an engine with a random prompt.

    alike: with the same weights whatever the number of ranks, the stage and where shards lie; slower. joint: see
    Backbone.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        wait(ranks.device)
        seconds[name] = time.perf_counter() - start

    run = replace(run, batch_size=max(run.batch_size, ranks.world))
    resolved = resolve_ds_config(read_ds_config(run.ds_config), run, set(), ranks.world, config.hidden_size)
    with phase("build"):
        model = random_model(config, resolved, ranks.device, alike)
    with phase("backbone"):
        activations = activations_on(ranks.device, run.activations, run.chunk_tokens)
        backbone = Backbone(model, activations, kernels=run.kernels, joint=joint)
        backbone.shards.share(ranks)  # as before training
    with phase("check"):
        check_backbone(backbone)  # which also proves what a head may leave out
    with phase("engine"):
        generator = make_generator(0, "prompt")
        start = deviation_of(config) * torch.randn(run.prompt_length, config.hidden_size, generator=generator)
        engine = Engine(SoftPrompt(start.clone()), backbone, resolved, ranks)
        engine.set_prompt(start)
        unit = backbone.mean_embedding_norm()
    return Opened(config, run, resolved, ranks, engine, start, unit, seconds)


def random_model(config: LlamaConfig, resolved: ResolvedDeepSpeed, device: torch.device, alike: bool) -> Any:
    """The model itself, sharded under ZeRO-3, whole under ZeRO-2; alike: see open_random."""
    if resolved.stage == 3:
        model = build_sharded(config, resolved)
    else:
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=resolved.dtype)
        model.tie_weights()
    torch.manual_seed(0)
    if resolved.stage == 3 and not alike:
        fill_randomly(model, deviation_of(config))
    else:
        fill_alike(model, deviation_of(config), resolved.stage == 3)
    return model


@torch.no_grad()
def fill_alike(model: Any, deviation: float, sharded: bool) -> None:
    """fill_randomly, but every tensor is drawn whole, on rank 0 where it is sharded."""
    import deepspeed

    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if sharded else [], modifier_rank=0):
            if parameter.dim() > 1:
                parameter.normal_(0.0, deviation)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def timed_steps(
    step: Callable[[int], Any], device: torch.device, count: int, warm: bool = False
) -> tuple[list[float], list[Any]]:
    """(seconds, values) of step(1) to step(count), the device waited for at both ends.

    warm: whether a step has been done already; else step(0) comes first.
    """
    seconds, values = [], []
    if not warm:
        step(0)
    for number in range(1, count + 1):
        wait(device)
        start = time.perf_counter()
        values.append(step(number))
        wait(device)
        seconds.append(time.perf_counter() - start)
    return seconds, values
