"""In which order layers are gathered and work: collectives ahead of it, copies from elsewhere behind its launch."""

from types import SimpleNamespace

import deepspeed.accelerator
import pytest
import torch
from torch import nn

from ptp_ds.backbone.sharding import Shards

EVENTS: list[str] = []


class Handle:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait(self) -> None:
        EVENTS.append(f"wait {self.name}")


def shard(layer: nn.Linear, name: str, on_disk: bool) -> nn.Linear:
    """A layer whose weight looks as DeepSpeed leaves it, and notes what is asked of it."""
    weight = layer.weight
    weight.ds_tensor, weight.ds_numel = weight.detach().clone(), weight.numel()
    weight.ds_tensor.final_location = "nvme" if on_disk else None

    def gather(parameters, quantize):
        EVENTS.append(f"start {name}")
        return Handle(name)

    weight.all_gather_coalesced = gather
    weight.partition = lambda parameters: EVENTS.append(f"release {name}")
    return layer


def shards_of(on_disk: bool = False) -> Shards:
    EVENTS.clear()
    model = nn.Sequential(*(shard(nn.Linear(2, 2, bias=False), str(number), on_disk) for number in range(3)))
    return Shards(list(model), model)


def work(shards: Shards) -> list[str]:
    for number in range(3):
        with shards.layer(number, number + 1 if number < 2 else None):
            EVENTS.append(f"work {number}")
    return EVENTS


def test_a_collective_begins_before_the_work_beside_which_it_goes_on():
    shards = shards_of()
    assert not shards.offloaded
    assert work(shards) == [
        "start 0", "wait 0", "start 1", "work 0", "release 0", "wait 1", "start 2", "work 1", "release 1", "wait 2",
        "work 2", "release 2",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["disk", "host"])
def test_what_lies_elsewhere_is_fetched_behind_the_launch_of_the_work(monkeypatch, where):
    if where == "host":  # as on a GPU
        monkeypatch.setattr(
            deepspeed.accelerator, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda")
        )
    shards = shards_of(on_disk=where == "disk")
    assert shards.offloaded
    assert work(shards) == [
        "start 0", "wait 0", "work 0", "start 1", "release 0", "wait 1", "work 1", "start 2", "release 1", "wait 2",
        "work 2", "release 2",
    ]  # fmt: skip


@pytest.mark.parametrize("on_disk", [False, True])
def test_work_that_fails_leaves_its_layer_released_and_nothing_fetched_in_vain(on_disk):
    shards = shards_of(on_disk)
    with pytest.raises(RuntimeError, match="broken"), shards.layer(0, 1):
        raise RuntimeError("broken")
    assert EVENTS[-1] == "release 0"
    assert ("start 1" in EVENTS) is (not on_disk)


def test_copies_have_a_stream_of_their_own_that_the_work_waits_for(monkeypatch):
    """With a stand-in for torch.cuda: a gather starts and is waited for on the second stream, then the first waits."""
    seen: list[str] = []

    class Entered:
        def __init__(self, stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            EVENTS.append(f"on {self.stream}")

        def __exit__(self, *_: object) -> None:
            EVENTS.append(f"off {self.stream}")

    work_stream = SimpleNamespace(wait_stream=lambda other: EVENTS.append(f"work waits for {other}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "copies")
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: work_stream)
    shards = shards_of(on_disk=True)
    with shards.layer(2):
        seen += EVENTS
    assert seen == [
        "on copies", "start 2", "off copies", "on copies", "wait 2", "off copies", "work waits for copies",
    ]  # fmt: skip
