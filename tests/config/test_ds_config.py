"""DeepSpeed JSON: the ready files, "auto", contradictions with flags, keys that are refused."""

import json
from pathlib import Path

import pytest
import torch

from ptp_ds import precision
from ptp_ds.backbone.shapes import config_of, shape_of
from ptp_ds.config import zero_options
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from tests.support.paths import ROOT

READY = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(autouse=True)
def _without_native_bf16(monkeypatch):
    monkeypatch.setattr(precision, "native_bf16", lambda: (False, "no GPU here"))


def written(folder: Path, content: object) -> str:
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def resolved(raw: dict, explicit: set[str] = frozenset(), world: int = 1, width: int = 32, model=None, **settings):
    return resolve_ds_config(raw, RunConfig(**settings), set(explicit), world, width, shape=model)


def stage3(**more) -> dict:
    return {"zero_optimization": {"stage": 3}, **more}


def words_of(value: object) -> list:
    if isinstance(value, dict):
        return [word for inner in value.values() for word in words_of(inner)]
    return [value]


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_ready_files_load_and_resolve(file, monkeypatch, tmp_path):
    for needs in ("require_quantiser", "require_async_io"):  # refused elsewhere: test_zero_options.py
        monkeypatch.setattr(zero_options, needs, lambda file: None)
    raw = read_ds_config(str(file))
    model = shape_of(config_of("smollm2-135m"))
    settings = {"batch_size": 8, "gradient_accumulation_steps": 2}
    settings |= {"nvme_path": str(tmp_path)} if "nvme" in file.stem else {}
    result = resolved(raw, world=2, model=model, **settings)
    assert "auto" not in words_of(result.config)
    assert result.stage == raw["zero_optimization"]["stage"]
    assert (2 if "zero2" in file.stem else 3) == result.stage
    assert result.config["train_batch_size"] == 8
    assert result.config["train_micro_batch_size_per_gpu"] == 2
    assert result.config["zero_optimization"]["reduce_bucket_size"] == 32 * 32
    assert result.dtype == torch.float32
    assert "auto" in words_of(raw), "the caller's dictionary must stay as it was read"


def test_there_are_ready_files():
    assert {file.stem for file in READY} == {
        "zero2", "zero3", "zero3_offload", "zero3_hpz", "zero3_quantized", "zero3_nvme"
    }  # fmt: skip


def test_relative_name_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("ds_configs/zero3.json")["zero_optimization"]["stage"] == 3


def test_auto_is_shown_in_notes():
    zero = {"stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    raw = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": zero}
    result = resolved(raw, {"batch_size"}, world=4, width=10, batch_size=16, max_grad_norm=0.5)
    assert result.notes == [
        "train_batch_size = 16 (from --batch_size)",
        "gradient_accumulation_steps = 1 (from --gradient_accumulation_steps)",
        "train_micro_batch_size_per_gpu = 4 (from --batch_size)",
        "gradient_clipping = 0.5 (from --max_grad_norm)",
        "precision = fp32 (no GPU here)",
        "zero_optimization.stage3_prefetch_bucket_size = 90 (from the width 10)",
        "zero_optimization.stage3_param_persistence_threshold = 100 (from the width 10)",
    ]
    assert result.config["gradient_clipping"] == 0.5
    assert result.config["zero_optimization"]["stage3_prefetch_bucket_size"] == 90


def test_concrete_values_that_agree_are_kept_without_a_note():
    raw = stage3(train_batch_size=8, gradient_accumulation_steps=2, gradient_clipping=1, steps_per_print=7)
    result = resolved(raw, world=2, gradient_accumulation_steps=2)
    assert [note.split(" =")[0] for note in result.notes] == ["train_micro_batch_size_per_gpu"]
    assert result.config["steps_per_print"] == 7


@pytest.mark.parametrize(
    ("more", "explicit", "message"),
    [
        (
            {"train_batch_size": 4},
            {"batch_size"},
            r"says train_batch_size = 4, but --batch_size makes it 8; .*\"auto\"",
        ),
        ({"train_batch_size": 4}, set(), "train_batch_size = 4, but the default of --batch_size makes it 8"),
        ({"train_micro_batch_size_per_gpu": 1}, set(), "train_micro_batch_size_per_gpu = 1, but .* makes it 8"),
        ({"gradient_accumulation_steps": 3}, set(), "gradient_accumulation_steps = 3, but .* makes it 1"),
        ({"gradient_clipping": 2}, set(), r"gradient_clipping = 2, but .*--max_grad_norm makes it 1\.0"),
    ],
)
def test_contradictions_with_flags(more, explicit, message):
    with pytest.raises(ValueError, match=message):
        resolved(stage3(**more), explicit)


def test_pinned_memory_is_left_out_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = resolved({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}})
    assert result.config["zero_optimization"]["offload_param"]["pin_memory"] is False
    assert "zero_optimization.offload_param.pin_memory = false (no GPU here)" in result.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stage3(train_bach_size=4), r"unknown key 'train_bach_size' \(did you mean 'train_batch_size'\?\)"),
        (stage3(qqqq=4), r"unknown key 'qqqq'\."),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}},
         r"unknown key 'zero_optimization.overlap_com' \(did you mean 'overlap_comm'\?\)"),
        (stage3(optimizer={"type": "Adam"}), "remove 'optimizer': .*use --lr and --weight_decay"),
        (stage3(scheduler={}), "remove 'scheduler': .*--lr_schedule with --warmup_steps"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization\.stage must be 2 or 3"),
        ({"zero_optimization": {"stage": 1}}, r"zero_optimization\.stage must be 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, r"zero_optimization\.stage must be 2 or 3"),
        ({"zero_optimization": 3}, r"zero_optimization\.stage must be 2 or 3"),
        ({}, r"zero_optimization\.stage must be 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "remove offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 5}},
         "remove stage3_module_granularity_threshold: it makes the root module"),
        ({"zero_optimization": {"stage": 3, "module_granularity_threshold": 5}},
         "remove stage3_module_granularity_threshold"),
        ({"zero_optimization": {"stage": 3, "cpu_offload": True}}, "remove cpu_offload: the optimizer holds the"),
        ({"zero_optimization": {"stage": 3, "cpu_offload": False, "offload_optimizer": {}}},
         "Cannot provide deprecated parameter 'cpu_offload' and replacing parameter 'offload_optimizer' together"),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}},
         r"zero_optimization\.cpu_offload_param is an old spelling; give offload_param in its place"),
        ({"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}},
         "is an old spelling; give gather_16bit_weights_on_model_save in its place"),
        (stage3(prescale_gradients=True), "remove 'prescale_gradients': losses are sums over the rows of all ranks"),
        (stage3(gradient_predivide_factor=4.0), "remove 'gradient_predivide_factor': losses are sums"),
        (stage3(torch_autocast={"enabled": True}), "remove 'torch_autocast': it has no effect here; use --precision"),
        (stage3(wandb={"enabled": True}), r"remove 'wandb': use --report_to wandb\."),
        (stage3(comet={"enabled": True}), r"remove 'comet': use --report_to comet_ml\."),
        (stage3(bf16={"enabled": "auto", "bf16_master_weights_and_grads": True}),
         r"remove bf16\.bf16_master_weights_and_grads: the prompt, its gradient and AdamW's state, .* are fp32"),
        (stage3(bf16={"enabled": True, "bf16_optimizer_states": True}), r"remove bf16\.bf16_optimizer_states: "),
        (stage3(fp16={"enabled": True, "fp16_master_weights_and_grads": True}),
         r"remove fp16\.fp16_master_weights_and_grads: "),
        ([1], "expected one JSON object"),
        ("{'a': 1}", r"not valid JSON \("),
    ],
)  # fmt: skip
def test_refused_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_ds_config(written(tmp_path, content))
    assert "ds.json" in str(caught.value)


def test_harmless_blocks_are_accepted(tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "none"}, "cpu_offload_param": False}
    content = {"fp16": {"enabled": False}, "wall_clock_breakdown": False, "zero_optimization": zero}
    content |= {"prescale_gradients": False, "gradient_predivide_factor": 1.0, "torch_autocast": {"enabled": False}}
    content |= {"wandb": {"enabled": False, "project": "mine"}, "comet": {}}
    assert read_ds_config(written(tmp_path, content)) == content


def test_missing_file():
    with pytest.raises(ValueError, match=r"--ds_config none\.json: No such file or directory; give a file, or one of"):
        read_ds_config("none.json")


def test_auto_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r'zero_optimization\.sub_group_size can\'t be "auto"; give a value'):
        resolved({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})


@pytest.mark.parametrize(
    ("batch", "world", "accumulate", "choices"),
    [(10, 4, 1, "8 or 12"), (10, 2, 2, "8 or 12"), (3, 4, 1, "4"), (9, 2, 1, "8 or 10")],
)
def test_batch_that_ranks_cannot_share(batch, world, accumulate, choices):
    message = rf"--batch_size {batch} can't be dealt to {world} ranks x {accumulate} micro-batches .*; use {choices}\."
    with pytest.raises(ValueError, match=message):
        resolved(stage3(), world=world, batch_size=batch, gradient_accumulation_steps=accumulate)


@pytest.mark.parametrize(
    "content",
    [
        stage3(bf16=True),
        stage3(fp16=None),
        {"zero_optimization": {"stage": 3, "offload_optimizer": None}},
        {"zero_optimization": {"stage": 3, "offload_param": True}},
        stage3(steps_per_print="auto"),
        stage3(bf16={"enabled": "yes"}),
    ],
    ids=json.dumps,
)
def test_blocks_of_the_wrong_type_are_refused(tmp_path, content):
    file = written(tmp_path, content)
    with pytest.raises(ValueError, match=r"ds\.json"):
        resolve_ds_config(read_ds_config(file), RunConfig(ds_config=file), set(), 1, 32)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"flops_profiler": {"enabled": "maybe"}}, r"^--ds_config ds\.json: DeepSpeed can't read it \(.*\)\.$"),
        ({"communication_data_type": "fp99"}, r"DeepSpeed can't read it \(Invalid communication_data_type"),
        ({"wandb": {"bogus": 1}}, r"^--ds_config ds\.json: wandb\.bogus is 1: Extra inputs are not permitted\.$"),
    ],
)
def test_what_deepspeed_itself_refuses_is_said_before_a_rank_starts(extra, message):
    raw = {"zero_optimization": {"stage": 3}, **extra}
    with pytest.raises(UserError, match=message):
        resolve_ds_config(raw, RunConfig(ds_config="ds.json"), set(), 2, 32)
