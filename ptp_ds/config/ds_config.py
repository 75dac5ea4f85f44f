"""DeepSpeed's JSON: read, checked against the flags, and every "auto" replaced by a value that is shown."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ptp_ds.backbone.shapes import ModelShape, shape_of
from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.config.batch import default_batch, gives_batch
from ptp_ds.config.run_config import RunConfig
from ptp_ds.config.zero_options import check_zero_options, resolve_zero_options
from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, nearest, read_json, shipped, shipped_names
from ptp_ds.models.source import BackboneSource
from ptp_ds.precision import enabled, resolve_precision
from ptp_ds.ranks.distributed import env_host_ranks, env_world

_FOLDER = "ds_configs"
# Top-level keys of DeepSpeed 0.19.8 that a run here may set; DeepSpeed itself ignores unknown ones in silence.
_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "fp16", "zero_optimization", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather", "comms_logger",
    "flops_profiler", "tensorboard", "csv_monitor", "wandb", "comet", "activation_checkpointing", "aio", "data_types",
    "torch_autocast", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "log_level", "checkpoint",
)  # fmt: skip
_HOLDS = {  # what a key holds where it isn't an object
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                     "gradient_clipping", "steps_per_print", "gradient_predivide_factor"), "a number"),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients",
                     "disable_allgather", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
                    "true or false"),
    **dict.fromkeys(("communication_data_type", "log_level"), "text"),
}  # fmt: skip
_OF_STEPS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
)  # fmt: skip
_TYPES = {"a number": int | float, "true or false": bool, "text": str, "an object": dict}
_OWNED = {
    "optimizer": "the optimizer is AdamW over the prompt; use --lr and --weight_decay",
    "scheduler": "the schedule is --lr_schedule with --warmup_steps",
}
_SCALED = "losses are sums over the rows of all ranks, divided by their number, and DeepSpeed scales nothing"
_NOT_HERE = {  # refused where they are on
    "prescale_gradients": _SCALED, "gradient_predivide_factor": _SCALED,
    "torch_autocast": "it has no effect here; use --precision",
    "wandb": "use --report_to wandb", "comet": "use --report_to comet_ml",
}  # fmt: skip
_HALF_STATE = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")


def read_ds_config(file: str) -> dict[str, Any]:
    """The JSON as written. Raises ValueError for a missing file, bad JSON, unknown keys or an unsupported stage."""
    path = Path(file)
    if not is_file(path) and str(path.parent) in (".", _FOLDER):  # by name, or as in a checkout, from any folder
        path = shipped(_FOLDER, path.name) or shipped(_FOLDER, f"{path.name}.json") or path
    ready = ", ".join(one.removesuffix(".json") for one in shipped_names(_FOLDER, ".json"))
    raw = read_json(path, f"--ds_config {file}", f"; give a file, or one of {ready}")
    if not isinstance(raw, dict):
        raise UserError(f"--ds_config {file}: expected one JSON object.")
    for key in raw:
        if key in _OWNED:
            raise UserError(f"--ds_config {file}: remove {key!r}: {_OWNED[key]}.")
        if key not in _KEYS:
            raise UserError(f"--ds_config {file}: unknown key {brief(key)}{nearest(key, _KEYS)}.")
        if key not in ("bf16", "fp16", "zero_optimization"):
            _check_type(file, key, raw[key])
        if key in _NOT_HERE and _is_on(raw[key]):
            raise UserError(f"--ds_config {file}: remove {key!r}: {_NOT_HERE[key]}.")
    for block in ("bf16", "fp16"):
        on = enabled(raw, block) if isinstance(raw.get(block, {}), dict) else None
        if not isinstance(on, bool) and on != "auto":
            raise UserError(f'--ds_config {file}: {block} must be an object such as {{"enabled": "auto"}}.')
        for key in _HALF_STATE:
            if raw.get(block, {}).get(key):
                raise UserError(
                    f"--ds_config {file}: remove {block}.{key}: the prompt, its gradient and AdamW's state, a few "
                    "megabytes, are fp32."
                )
    zero = raw.get("zero_optimization")
    if not isinstance(zero, dict) or not isinstance(zero.get("stage"), int) or zero["stage"] not in (2, 3):
        raise UserError(f"--ds_config {file}: zero_optimization.stage must be 2 or 3; see ds_configs/.")
    _check_zero_keys(file, zero)
    return raw


def _is_on(value: Any) -> bool:
    """Whether the value of one of _NOT_HERE asks for something: an object does where it is enabled, a factor but 1."""
    if isinstance(value, dict):
        return value.get("enabled", False) is not False
    return value is True or value not in (False, 1)


def _check_type(file: str, key: str, value: Any) -> None:
    """ValueError for a value that DeepSpeed would only stumble over later."""
    wanted = _HOLDS.get(key, "an object")
    fits = isinstance(value, _TYPES[wanted]) and isinstance(value, bool) == (wanted == "true or false")
    if wanted == "a number":
        fits = fits and abs(value) < 1 << 63
    if not fits and value != "auto":
        raise UserError(f"--ds_config {file}: {key} is {brief(value)}; expected {wanted}.")


def _check_zero_keys(file: str, zero: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = list(fields) + [field.alias for field in fields.values() if field.alias]
    for key in zero:
        if key not in known:
            shown = brief(f"zero_optimization.{key}")
            raise UserError(f"--ds_config {file}: unknown key {shown}{nearest(key, known)}.")
    for block in ("offload_param", "offload_optimizer"):
        if not isinstance(zero.get(block, {}), dict):
            raise UserError(
                f'--ds_config {file}: zero_optimization.{block} must be an object such as {{"device": "cpu"}}; '
                "leave it out to keep everything on the device."
            )
    old = {key: new for key, field in fields.items() if zero.get(key) and (new := _new_spelling(field))}
    optimizer = [key for key, new in old.items() if new == "offload_optimizer"]
    if zero.get("offload_optimizer", {}).get("device", "none") != "none" or optimizer:
        raise UserError(
            f"--ds_config {file}: remove {[*optimizer, 'offload_optimizer'][0]}: the optimizer holds the prompt only, "
            "a few megabytes."
        )
    for key, new in old.items():  # what reads the file here knows the new ones alone
        raise UserError(f"--ds_config {file}: zero_optimization.{key} is an old spelling; give {new} in its place.")
    if zero.get("module_granularity_threshold") or zero.get("stage3_module_granularity_threshold"):
        raise UserError(
            f"--ds_config {file}: remove stage3_module_granularity_threshold: it makes the root module with the "
            "trained prompt a leaf; decoder layers are leaf modules already."
        )
    check_zero_options(file, zero)
    try:
        DeepSpeedZeroConfig(**zero)  # leaves out what is "auto"
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(
            f"--ds_config {file}: {brief(name)[1:-1]} is {brief(first['input'])}: {first['msg']}."
        ) from None
    except AssertionError as error:  # both spellings of a key
        raise UserError(f"--ds_config {file}: zero_optimization: {str(error).rstrip('.')}.") from None


def _new_spelling(field: Any) -> str | None:
    """What a field of DeepSpeed's that is an old spelling is called now, None for one that isn't."""
    told = getattr(field, "json_schema_extra", None)
    return str(told["new_param"]) if isinstance(told, dict) and told.get("deprecated") else None


def for_scoring(raw: dict[str, Any]) -> dict[str, Any]:
    """The same for a command that takes no optimizer steps: what says how these go is left to be filled in."""
    return raw | dict.fromkeys(_OF_STEPS, "auto")


def resolve_here(
    raw: dict[str, Any], run: RunConfig, explicit: Collection[str], source: BackboneSource
) -> ResolvedDeepSpeed:
    """resolve_ds_config on the ranks that this process is one of, for this model."""
    offloads = raw["zero_optimization"].get("offload_param", {}).get("device") == "nvme"
    shape = shape_of(source.config, source.head_plan.kind) if offloads else None
    return resolve_ds_config(
        raw, run, set(explicit), env_world(), source.width, host_ranks=env_host_ranks(), shape=shape
    )


def resolve_ds_config(
    raw: dict[str, Any], run: RunConfig, explicit: set[str], world: int, width: int, *,
    host_ranks: int | None = None, shape: ModelShape | None = None,
) -> ResolvedDeepSpeed:  # fmt: skip
    """Fills in "auto", checks concrete values against explicit flags, and refuses contradictions with ValueError.

    explicit: flags that the user gave. world: ranks. width: H, for the bucket sizes. host_ranks: ranks of this host,
    all by default. shape: the model's, where weights go to NVMe. A batch size that nobody gave is the default's, in
    equal parts: the run's is then `train_batch_size`.
    """
    config = json.loads(json.dumps(raw))
    notes: list[str] = []
    batch = _batch_size(config, run, explicit, world, notes)
    owned = {
        "train_batch_size": (batch, "batch_size"),
        "gradient_accumulation_steps": (run.gradient_accumulation_steps, "gradient_accumulation_steps"),
        "train_micro_batch_size_per_gpu": (batch // (world * run.gradient_accumulation_steps), "batch_size"),
        "gradient_clipping": (run.max_grad_norm, "max_grad_norm"),
    }
    for key, (value, flag) in owned.items():
        given = config.get(key, "auto")
        if given != "auto" and given != value:
            source = f"--{flag}" if flag in explicit else f"the default of --{flag}"
            raise UserError(
                f'{run.ds_config} says {key} = {brief(given)}, but {source} makes it {value}; set it to "auto" or make '
                f"the two agree with --{flag}."
            )
        if given == "auto":
            notes.append(f"{key} = {value} (from --{flag})")
        config[key] = value
    dtype, note = resolve_precision(config, run.precision, run.ds_config)
    notes += [note] if note else []
    _resolve_buckets(config["zero_optimization"], width, notes)
    resolve_zero_options(
        config["zero_optimization"], run.ds_config, notes, world=world, host_ranks=host_ranks or world,
        nvme_path=run.nvme_path, shape=shape,
    )  # fmt: skip
    if not torch.cuda.is_available():
        for block in ("offload_param", "offload_optimizer"):
            if config["zero_optimization"].get(block, {}).get("pin_memory"):
                config["zero_optimization"][block]["pin_memory"] = False
                notes.append(f"zero_optimization.{block}.pin_memory = false (no GPU here)")
    config.setdefault("steps_per_print", 1 << 30)  # our own log says more
    if left := _autos(config):
        raise UserError(f'{run.ds_config}: {brief(left[0])[1:-1]} can\'t be "auto"; give a value or leave it out.')
    _try(config, run.ds_config)
    return ResolvedDeepSpeed(config, notes, dtype)


def _batch_size(config: dict[str, Any], run: RunConfig, explicit: set[str], world: int, notes: list[str]) -> int:
    """Rows of an optimizer step; UserError where a number that was given can't be dealt in equal parts."""
    parts = run.gradient_accumulation_steps
    hands = world * parts
    if run.tokens_per_step is not None:
        return hands  # a budget's batches vary in size; DeepSpeed, which doesn't scale our losses, gets a row for each
    if not run.batch_size % hands:
        return run.batch_size
    dealt = f"{world} ranks x {parts} micro-batches"
    in_file = {config.get(key, "auto") for key in ("train_batch_size", "train_micro_batch_size_per_gpu")} != {"auto"}
    if not in_file and not gives_batch(run, explicit):
        notes.append(f"batch_size = {default_batch(hands)} (the default, {run.batch_size}, rounded up for {dealt})")
        return default_batch(hands)
    below, above = run.batch_size // hands * hands, -(-run.batch_size // hands) * hands
    choices = f"{below} or {above}" if below else f"{above}"
    raise UserError(f"--batch_size {run.batch_size} can't be dealt to {dealt} in equal parts; use {choices}.")


def _try(config: dict[str, Any], file: str) -> None:
    """UserError for values that DeepSpeed's own reader refuses, here once, not on every rank."""
    from deepspeed.runtime.config import DeepSpeedConfig

    batch = ("train_batch_size", "gradient_accumulation_steps")  # depend on the ranks, and are right by now
    tried = {key: value for key, value in config.items() if key not in batch}
    try:
        DeepSpeedConfig(json.loads(json.dumps({**tried, "train_micro_batch_size_per_gpu": 1})))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"--ds_config {file}: {brief(name)[1:-1]} is {brief(first['input'])}: {first['msg']}."
        ) from None
    except Exception as error:
        said = brief(" ".join(str(error).split()))[1:-1].rstrip(".")
        raise UserError(f"--ds_config {file}: DeepSpeed can't read it ({said}).") from error


def _autos(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that are still "auto"."""
    blocks = {key: value for key, value in config.items() if isinstance(value, dict)}
    nested = [name for key, block in blocks.items() for name in _autos(block, f"{prefix}{key}.")]
    return [f"{prefix}{key}" for key, value in config.items() if value == "auto"] + nested


def _resolve_buckets(zero: dict[str, Any], width: int, notes: list[str]) -> None:
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for key, value in zero.items():
        if value == "auto" and key in sizes:
            zero[key] = sizes[key]
            notes.append(f"zero_optimization.{key} = {sizes[key]} (from the width {width})")
