"""Run by tests/backbone/test_host_shards.py on two ranks: shards in one memory against DeepSpeed's gathers."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ptp_ds.backbone import host_shards
from ptp_ds.backbone.adjacent import joined
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.joint_products import join_products
from ptp_ds.backbone.loading import load_backbone
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack
from ptp_ds.ranks.distributed import Ranks, exit_process, start_processes, stop_processes
from ptp_ds.tasks.example import Example
from tests.support.paths import ROOT


def computed(backbone: Backbone) -> list[torch.Tensor]:
    """Scores of a few rows, and the prompt's gradient."""
    prompt = torch.randn(5, backbone.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    examples = [
        Example(context_ids=list(range(3, 3 + size)), movable=[True] * size, candidate_ids=[[1, 2], [3]], gold=1,
                index=size) for size in (5, 9, 17)
    ]  # fmt: skip
    row = pack(examples)
    with backbone.shards.outside_layers():  # the head's backward needs its weights, too
        scores = backbone.score(row, backbone.inputs(row, prompt), prompt)
        return [scores.detach(), torch.autograd.grad(scores[scores.isfinite()].sum(), prompt)[0]]


def opened(folder: Path, precision: str, ranks: Ranks, share: bool, joint: bool = False) -> Backbone:
    run = RunConfig(precision=precision)
    config = read_ds_config(str(ROOT / "ds_configs" / "zero3.json"))
    resolved = resolve_ds_config(config, run, set(), ranks.world, 32)
    return load_backbone(folder, resolved, ranks, share=share, joint=joint)


def joint_facts(folder: Path, precision: str, ranks: Ranks) -> dict[str, Any]:
    """What must hold of a shared backbone whose products are joined."""
    apart, joint = (opened(folder, precision, ranks, True, wanted) for wanted in (False, True))
    plain = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=joint.dtype).named_parameters())
    named: dict[str, Any] = dict(joint.model.named_parameters())
    before = sum(memories(joint).values())
    join_products(joint)
    attention = joint.model.model.layers[0].self_attn
    pairs = list(zip(computed(apart), computed(joint), strict=True))
    return {
        "joined": joint.joined, "more_memory": sum(memories(joint).values()) - before,
        "errors": [float((b - a)[a.isfinite()].float().norm() / a[a.isfinite()].float().norm()) for a, b in pairs],
        "as_one": joined([getattr(attention, f"{name}_proj").weight.ptp_whole for name in "qkv"]) is not None,
        "wholes": all(torch.equal(p.ptp_whole, plain[name]) for name, p in named.items()),
        "shards": all(p.ds_tensor.data_ptr() == p.ptp_whole.data_ptr() + ranks.rank * p.ds_tensor.nbytes
                      for p in named.values()),
        "nothing_left_whole": all(p.numel() == 0 and p.ds_status.name == "NOT_AVAILABLE" for p in named.values()),
    }  # fmt: skip


def memories(backbone: Backbone) -> dict[int, int]:
    """Bytes of each memory that a shard or a whole lies in."""
    tensors = [t for p in backbone.model.parameters() for t in (p.ds_tensor, p.ptp_whole)]  # type: ignore[attr-defined]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def memory_files() -> int:
    """Descriptors of this process that are ours."""
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum("ptp_ds_shards" in os.readlink(link) for link in links if os.path.islink(link))


def facts(folder: Path, precision: str, ranks: Ranks) -> dict[str, Any]:
    """What must hold of a shared backbone."""
    sent, shared = (opened(folder, precision, ranks, share) for share in (False, True))
    plain = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=sent.dtype).named_parameters())
    named: dict[str, Any] = dict(shared.model.named_parameters())
    shared.shards.traffic.reset()
    same = all(torch.equal(a, b) for a, b in zip(computed(sent), computed(shared), strict=True))
    traffic = shared.shards.traffic
    found = {
        "shared": [sent.shards.shared, shared.shards.shared], "same": same, "bytes": traffic.gathered_bytes,
        "gathers": sum(traffic.gathers.values()), "descriptors": memory_files(),
        "wholes": all(torch.equal(p.ptp_whole, plain[name]) for name, p in named.items()),
        "own_shards_lie_there": all(
            p.ds_tensor.untyped_storage().data_ptr() == p.ptp_whole.untyped_storage().data_ptr() for p in named.values()
        ),
        "nothing_left_whole": all(p.numel() == 0 and p.ds_status.name == "NOT_AVAILABLE" for p in named.values()),
    }  # fmt: skip
    ranks.barrier()
    if ranks.is_main:  # frozen weights aren't written to; here, to see that both ranks look at one memory
        named["model.norm.weight"].ptp_whole[0] = 7.0
    ranks.barrier()
    return {**found, "one_memory": float(named["model.norm.weight"].ptp_whole[0]) == 7.0}


def main(folder: Path, out: Path) -> None:
    ranks = start_processes()
    report: dict[str, Any] = {name: facts(folder, name, ranks) for name in ("fp32", "bf16")}
    report["joint"] = {name: joint_facts(folder, name, ranks) for name in ("fp32", "bf16")}
    before = computed(opened(folder, "fp32", ranks, False))
    map_file = torch.from_file

    def fails(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no such file")

    torch.from_file = fails if ranks.rank else map_file
    refused = opened(folder, "fp32", ranks, True)
    report["one rank can't map it"] = {
        "shared": refused.shards.shared,
        "same": all(torch.equal(a, b) for a, b in zip(before, computed(refused), strict=True)),
    }
    torch.from_file = map_file
    host_shards.socket.gethostname = lambda: f"host{ranks.rank}"  # type: ignore[assignment]
    report["two hosts"] = {"shared": opened(folder, "fp32", ranks, True).shards.shared}
    (out / f"report-{ranks.rank}.json").write_text(json.dumps(report))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    exit_process(0)  # see there: a rank now and then aborts in the interpreter's own teardown
