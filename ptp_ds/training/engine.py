"""The DeepSpeed engine around the prompt, and its state in a form that knows no number of ranks.

The frozen backbone is no part of the engine's module: DeepSpeed shards it (zero.Init) and backbone.sharding gathers it.
"""

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.config.zero_options import BACKBONE_ONLY
from ptp_ds.errors import UserError
from ptp_ds.prompts import SoftPrompt
from ptp_ds.ranks.distributed import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
_SCALER = "loss_scaler"
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def import_muon() -> None:
    """DeepSpeed imports its Muon to tell our optimizer from it, and with Muon all of torch's compiler: three seconds of
    every start. Here its functions stay as they are written, and the compiler where it is.
    """
    from deepspeed.runtime import compiler

    own, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = own


class Engine:
    """A thin owner of the DeepSpeed engine: forward, backward, step, and the prompt's fp32 master and AdamW state.

    average: decay of a running mean of the master (see _keep_average), which is then what `kept` gives; 0 for none.
    """

    def __init__(
        self, prompt: SoftPrompt, backbone: Backbone, resolved: ResolvedDeepSpeed, ranks: Ranks,
        weight_decay: float = 0.0, average: float = 0.0,
    ) -> None:  # fmt: skip
        import deepspeed

        import_muon()
        self.ranks, self.stage, self.backbone = ranks, resolved.stage, backbone
        self.shape = tuple(prompt.weight.shape)
        optimizer = self._optimizer(prompt.weight, weight_decay)
        # Micro-batches are sections of one packed row (ptp_ds.backbone.layerwise): for DeepSpeed a step is one batch.
        config = {**resolved.config, "gradient_accumulation_steps": 1, **self._own_config()}
        config["train_micro_batch_size_per_gpu"] = config["train_batch_size"] // ranks.world
        zero = config["zero_optimization"]
        config["zero_optimization"] = {name: value for name, value in zero.items() if name not in BACKBONE_ONLY}
        self.deepspeed, *_ = deepspeed.initialize(
            model=prompt.to(ranks.device), optimizer=optimizer, config=config, dist_init_required=False
        )
        self._adamw.state.clear()  # that first step also counted as one in Adam's bias correction
        self.prompt_module: SoftPrompt = self.deepspeed.module
        self.average = average
        self._averaged = self._master.detach().clone() if average else None

    def _optimizer(self, weight: Tensor, weight_decay: float) -> torch.optim.Optimizer:
        # lr 0 until the first step: ZeRO-3 runs a step on zero gradients while it starts, which would apply decay.
        return torch.optim.AdamW([weight], lr=0.0, weight_decay=weight_decay)

    def _own_config(self) -> dict[str, Any]:
        """What DeepSpeed's configuration has to say besides, for `_optimizer`'s sake."""
        return {}

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return self.deepspeed.optimizer.optimizer

    @property
    def _master(self) -> Tensor:
        """This rank's part of the flat fp32 weight; the parts of all ranks, in order, are the weight and padding."""
        optimizer = self.deepspeed.optimizer
        if self.stage == 3:
            return optimizer.fp32_partitioned_groups_flat[0]
        return optimizer.single_partition_of_fp32_groups[0]

    def trained(self) -> Tensor:
        """[P, H] the prompt in the engine's dtype, with its graph: once an optimizer step."""
        return self.deepspeed()

    def backward_sum(self, loss_sum: Tensor, global_count: int) -> None:
        """Backward of (sum over this rank's examples) / (examples of the optimizer step on all ranks).

        DeepSpeed averages gradients over ranks, so the loss is multiplied by their number: a sum of sums remains.
        """
        self.deepspeed.backward(loss_sum * (self.ranks.world / global_count), scale_wrt_gas=False)

    def loss_scale(self) -> float:
        """What DeepSpeed multiplies the loss by before backward: 1 but under fp16."""
        return float(self.deepspeed.optimizer.loss_scale) if self.deepspeed.fp16_enabled() else 1.0

    def step(self, lr: float) -> None:
        """Clips and updates the prompt."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        self._keep_average()

    def _keep_average(self) -> None:
        """Takes the master into its running mean: an exponential one whose decay rises to `average`, so that the first
        steps don't hold on to the start (as timm's and TensorFlow's do: at most (1 + t) / (10 + t) behind t steps).
        """
        if self._averaged is not None:
            step = float(self._adamw.state.get(self._master, {}).get("step", 0.0))
            decay = min(self.average, (1 + step) / (10 + step))
            self._averaged.lerp_(self._master.detach().float().view_as(self._averaged), 1 - decay)

    def skipped(self) -> bool:
        """Whether the last step's scaled gradient overflowed fp16: DeepSpeed then left the prompt as it was."""
        return bool(self.deepspeed.fp16_enabled() and self.deepspeed.optimizer.overflow)

    def broken(self) -> Tensor | bool:
        """Whether the last step's gradient was not finite, on any rank, without a host sync. Not of a step that was
        skipped: there it is fp16's scale that was too large."""
        norm: Tensor | float | None = self.deepspeed.get_global_grad_norm()
        if norm is None or self.skipped():
            return False
        return ~norm.isfinite() if isinstance(norm, Tensor) else not math.isfinite(norm)

    def grad_norm(self) -> float:
        """Global l2 norm of the last optimizer step's gradient, before clipping; 0 for a step that was skipped."""
        if self.skipped():
            return 0.0
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def _gather(self, part: Tensor) -> Tensor:
        """[R, H] fp32 on the CPU from every rank's part; all ranks must call it."""
        flat = part.detach().float().flatten()
        parts = [torch.empty_like(flat) for _ in range(self.ranks.world)]
        torch.distributed.all_gather(parts, flat.contiguous())
        whole = torch.cat(parts)
        rows, width = self.shape
        return whole[: rows * width].view(rows, width).cpu().clone()

    def _part(self, whole_RH: Tensor) -> Tensor:
        """This rank's part of a [R, H] tensor, zero-padded like the master."""
        size = self._master.numel()
        padded = torch.zeros(size * self.ranks.world)
        padded[: whole_RH.numel()] = whole_RH.flatten().float()
        return padded[size * self.ranks.rank : size * (self.ranks.rank + 1)].to(self._master.device)

    def prompt(self) -> Tensor:
        """[P, H] fp32 on the CPU, from the master weight; all ranks must call it."""
        with torch.no_grad():
            return self.prompt_module.trained_of(self._gather(self._master))

    def kept(self) -> Tensor:
        """What is scored and saved: the prompt, or its running mean; see prompt."""
        if self._averaged is None:
            return self.prompt()
        with torch.no_grad():
            return self.prompt_module.trained_of(self._gather(self._averaged))

    def state(self) -> dict[str, Tensor]:
        """The weight under the name prompt, exp_avg, exp_avg_sq, all [R, H], and adam_step [1], on the CPU.

        With a running mean also average [R, H]. Where DeepSpeed moves fp16's loss scale also loss_scaler [4], what that
        has come to.

        The weight is the prompt itself, or what it is computed from (SoftPrompt.trained_of). All ranks must call it.
        """
        held = self._adamw.state.get(self._master, {})
        count = float(held.get("step", 0.0))
        tensors = {"prompt": self._gather(self._master), "adam_step": torch.tensor([count])}
        for name in MOMENTS:
            tensors[name] = self._gather(held[name]) if name in held else torch.zeros(self.shape)
        if self._averaged is not None:
            tensors[AVERAGE] = self._gather(self._averaged)
        if (scaler := self._dynamic_scaler()) is not None:
            tensors[_SCALER] = torch.tensor([getattr(scaler, name) for name in _SCALER_FIELDS], dtype=torch.float64)
        return tensors

    def _dynamic_scaler(self) -> Any:
        """What moves fp16's loss scale; None for a scale that the configuration fixes, and without fp16."""
        scaler = self.deepspeed.optimizer.loss_scaler if self.deepspeed.fp16_enabled() else None
        return scaler if scaler is not None and scaler.dynamic else None

    def set_prompt(self, weight_RH: Tensor) -> None:
        """Sets the weight, its fp32 master and mean and the copy in the backbone's dtype; all ranks must call it."""
        import deepspeed

        self._master.data.copy_(self._part(weight_RH).view_as(self._master))
        self._set_average(weight_RH)
        weight = self.prompt_module.weight
        sharded = [weight] if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0), torch.no_grad():
            weight.copy_(weight_RH.view(self.shape))

    def _set_average(self, weight_RH: Tensor) -> None:
        if self._averaged is not None:
            self._averaged.copy_(self._part(weight_RH).view_as(self._averaged))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Puts `state()` of a run on any number of ranks back; all ranks must call it. ValueError for another shape."""
        if (found := tuple(tensors["prompt"].shape)) != self.shape:
            raise UserError(f"The checkpoint's prompt has shape {found}, this run's {self.shape}; resume another one.")
        self.set_prompt(tensors["prompt"])
        if AVERAGE in tensors:
            self._set_average(tensors[AVERAGE])
        if float(tensors["adam_step"]) > 0:
            held: dict[str, Tensor] = {"step": tensors["adam_step"].reshape(()).clone()}
            for name in MOMENTS:
                held[name] = self._part(tensors[name]).view_as(self._master).clone()
            self._adamw.state[self._master] = held
        if (scaler := self._dynamic_scaler()) is not None and _SCALER in tensors:
            for name, value in zip(_SCALER_FIELDS, tensors[_SCALER].tolist(), strict=True):
                setattr(scaler, name, type(getattr(scaler, name))(value))

    def sharded_elements(self) -> tuple[int, int]:
        """(backbone elements this rank keeps between steps, elements of the whole backbone)."""
        kept = whole = 0
        parameter: Any
        for parameter in self.backbone.parameters():
            if hasattr(parameter, "ds_tensor"):
                kept += parameter.ds_tensor.ds_numel
                if parameter.ds_secondary_tensor is not None:  # hpZ's, whole within a host
                    kept += parameter.ds_secondary_tensor.numel()
                whole += parameter.ds_numel
            else:
                kept += parameter.numel()
                whole += parameter.numel()
        return kept, whole
