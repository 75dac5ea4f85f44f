"""hpZ, int8 gathers and weights on NVMe: what is filled in, what is refused, before any process starts."""

import json

import pytest
import torch

from ptp_ds.backbone.shapes import config_of, shape_of
from ptp_ds.config import zero_options
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig


def written(folder, **zero) -> str:
    file = folder / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    return str(file)


def resolved(file: str, world: int = 4, host_ranks: int = 2, shape=None, **settings):
    run = RunConfig(ds_config=file, precision="fp32", batch_size=8 * world, **settings)
    return resolve_ds_config(read_ds_config(file), run, set(), world, 32, host_ranks=host_ranks, shape=shape)


def zero_of(result) -> dict:
    return result.config["zero_optimization"]


def test_hpz_takes_the_ranks_of_a_host():
    result = resolved("ds_configs/zero3_hpz.json", world=16, host_ranks=8)
    assert zero_of(result)["zero_hpz_partition_size"] == 8
    assert "zero_optimization.zero_hpz_partition_size = 8 (ranks of this host)" in result.notes


def test_hpz_of_one_rank_a_host_is_said():
    assert "zero_hpz_partition_size = 1" in "\n".join(resolved("ds_configs/zero3_hpz.json", 4, 1).notes)


@pytest.mark.parametrize(("world", "host_ranks", "size"), [(6, 3, 2), (4, 2, 4), (6, 4, 4)])
def test_hpz_must_divide_hosts_and_run(tmp_path, world, host_ranks, size):
    file = written(tmp_path, zero_hpz_partition_size=size)
    with pytest.raises(
        ValueError, match=f"zero_hpz_partition_size {size} must divide the {host_ranks} ranks of a host"
    ):
        resolved(file, world, host_ranks)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"zero_quantized_nontrainable_weights": True}, "remove zero_quantized_nontrainable_weights: .*whole numbers"),
        ({"zero_quantized_gradients": True}, "remove zero_quantized_gradients"),
        ({"zero_hpz_partition_size": "all"}, "zero_hpz_partition_size is 'all'; expected \"auto\""),
        ({"zero_hpz_partition_size": 0}, "zero_hpz_partition_size is 0; expected"),
        ({"zero_hpz_partition_size": True}, "zero_hpz_partition_size is True; expected"),
        ({"stage": 2, "zero_hpz_partition_size": "auto"}, "zero_hpz_partition_size needs stage 3"),
        ({"stage": 2, "zero_quantized_weights": True}, "zero_quantized_weights needs stage 3"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3"),
        ({"zero_hpz_partition_size": 2, "offload_param": {"device": "nvme"}}, "and weights on NVMe don't go together"),
    ],
)
def test_refused_files(tmp_path, zero, message):
    with pytest.raises(ValueError, match=message):
        read_ds_config(written(tmp_path, **zero))


def test_int8_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"zero_quantized_weights needs a CUDA GPU.*use ds_configs/zero3_hpz\.json"):
        resolved("ds_configs/zero3_quantized.json")


def test_int8_is_kept_where_its_kernels_run(monkeypatch):
    monkeypatch.setattr(zero_options, "require_quantiser", lambda file: None)
    assert zero_of(resolved("ds_configs/zero3_quantized.json"))["zero_quantized_weights"] is True


def test_nvme_asks_for_its_folder(monkeypatch, tmp_path):
    file = "ds_configs/zero3_nvme.json"
    with pytest.raises(ValueError, match=r"keeps weights on NVMe: give --nvme_path, a folder"):
        resolved(file)
    with pytest.raises(ValueError, match=r"--nvme_path .*absent is no folder that can be written"):
        resolved(file, nvme_path=str(tmp_path / "absent"))
    monkeypatch.setattr(zero_options, "require_async_io", lambda file: None)
    result = resolved(file, nvme_path=str(tmp_path), shape=shape_of(config_of("smollm2-135m")))
    offload = zero_of(result)["offload_param"]
    assert offload["nvme_path"] == str(tmp_path)
    assert offload["buffer_count"] == 2 * 9 + 2  # a Llama layer's nine tensors; tied embeddings and the last norm
    assert offload["buffer_size"] == 49152 * 576 // 4
    assert any("buffer_count = 20" in note for note in result.notes)


def test_nvme_path_that_contradicts_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"--nvme_path is for weights on NVMe; ds_configs/zero3\.json has none there"):
        resolved("ds_configs/zero3.json", nvme_path=str(tmp_path))
    file = written(tmp_path, offload_param={"device": "nvme", "nvme_path": "/elsewhere"})
    with pytest.raises(ValueError, match=r"has nvme_path /elsewhere, --nvme_path says .*; make them agree"):
        resolved(file, nvme_path=str(tmp_path))


def test_nvme_without_libaio_is_refused(monkeypatch, tmp_path):
    import deepspeed.ops.op_builder

    class Absent:
        def is_compatible(self, verbose: bool = False) -> bool:
            return False

    monkeypatch.setattr(deepspeed.ops.op_builder, "AsyncIOBuilder", Absent)
    with pytest.raises(ValueError, match=r"weights on NVMe need DeepSpeed's async_io, .*libaio-dev"):
        resolved("ds_configs/zero3_nvme.json", nvme_path=str(tmp_path))
