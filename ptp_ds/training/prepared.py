"""A run before any process group or model exists: everything that could be checked is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.source import BackboneSource
from ptp_ds.packing.layouts import Rows
from ptp_ds.tasks import Task
from ptp_ds.training.continuation import Continuation
from ptp_ds.training.examples import RunExamples
from ptp_ds.training.monitor import Listener


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """rows: how examples become rows. identity: what a checkpoint must share with the run. adapter: the prompt that
    --prompt_init adapter starts from. adapter_head: the classifier beside it, {} for a new one. mask_id: the token that
    masks. digests: of each split's rows, by what it is for. output_dir: None where rank 0 names it by the time.
    listeners: called with every line of the log. room: tokens of a text in other words and its longest answer that
    fit behind the prompt.
    """

    run: RunConfig
    task: Task
    source: BackboneSource
    rows: Rows
    resolved: ResolvedDeepSpeed
    examples: RunExamples
    continuation: Continuation
    identity: dict[str, Any]
    mask_id: int
    room: int
    output_dir: Path | None = None
    adapter: Tensor | None = None
    adapter_head: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    listeners: tuple[Listener, ...] = ()
