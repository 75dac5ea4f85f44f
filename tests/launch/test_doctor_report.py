"""Faults that the hosts' answers show, each in a sentence; none where they agree."""

import copy

import pytest

from ptp_ds.launch.doctor_report import Limits, Seen, connection_faults, find_faults, most_common, table

REPORT = {
    "folder": True, "python": "3.11.7", "project": "a" * 64, "model": {"config.json": "1", "model.safetensors": "2"},
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}, "gpus": [["H200", 140 << 30]] * 8,
    "memory": 100e9, "output": {"folder": "/runs", "free": 50e9, "error": None},
}  # fmt: skip
LIMITS = Limits({"node1": 8, "node2": 8, "node3": 8}, min_free_gb=1.0, min_memory_gb=4.0, max_skew=2.0)


@pytest.fixture
def seen() -> dict[str, Seen]:
    return {host: Seen({"report": copy.deepcopy(REPORT)}, 0.1, "eth0") for host in LIMITS.slots}


def test_hosts_that_agree_have_no_fault(seen):
    assert find_faults(seen, LIMITS) == []
    assert find_faults({}, LIMITS) == []
    for one in seen.values():
        one.report["gpus"], one.report["model"], one.report["output"] = [], None, None
    assert find_faults(seen, LIMITS) == []


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        ({"python": "3.12.1"}, "python", "node2 has python 3.12.1 where others have 3.11.7."),
        ({"packages": {"torch": "2.12.0"}}, "torch", "node2 has torch 2.12.0 where others have 2.13.0."),
        ({"packages": {"deepspeed": None}}, "deepspeed", "node2 lacks the package deepspeed."),
        ({"project": "b" * 64}, "ptp_ds", "node2 has another version of ptp_ds (bbbbbbbb, others aaaaaaaa)."),
        ({"project": None}, "ptp_ds", "node2 can't import ptp_ds."),
        ({"model": {"config.json": "1", "model.safetensors": "3"}}, "model",
         "node2 has other model files than the others: model.safetensors."),
        ({"model": None}, "model", "node2 doesn't hold the model's files, which others do."),
        ({"folder": False}, "folder", "node2 lacks the folder that the run starts in."),
        ({"gpus": [["H200", 1]] * 4}, "gpus", "node2 has 4 GPU(s) for 8 slots."),
        ({"memory": 1.5e9}, "memory", "node2 has 1.5 GB of free memory, less than 4."),
        ({"output": {"free": 2e6}}, "output", "node2 has 0.002 GB free in /runs, less than 1."),
        ({"output": {"error": "Read-only file system"}}, "output",
         "node2 can't write into /runs (Read-only file system)."),
    ],
)  # fmt: skip
def test_one_host_that_differs(seen, change, kind, sentence):
    for name, value in change.items():
        if name in ("packages", "output"):
            seen["node2"].report[name].update(value)
        else:
            seen["node2"].report[name] = value
    (fault,) = find_faults(seen, LIMITS)
    assert (fault.host, fault.kind, fault.sentence) == ("node2", kind, sentence)
    assert fault.remedy
    shown = table(list(LIMITS.slots), seen, [fault]).splitlines()
    assert len(shown) == 4
    assert sum("!" in line for line in shown) == (kind not in ("folder",))


@pytest.mark.parametrize(("skew", "words"), [(90.0, "90 s ahead"), (-3.0, "3 s behind")])
def test_a_clock_that_is_off(seen, skew, words):
    seen["node3"].skew = skew
    (fault,) = find_faults(seen, LIMITS)
    assert fault.sentence == f"node3 has a clock that is {words}."


def test_the_odd_one_is_named_even_when_it_is_the_first(seen):
    seen["node1"].report["python"] = "3.12.1"
    assert [fault.host for fault in find_faults(seen, LIMITS)] == ["node1"]
    assert most_common({"a": 2, "b": 1}) == 2  # a tie: the first


def test_hosts_without_an_answer_have_a_row(seen):
    del seen["node2"]
    row = table(list(LIMITS.slots), seen, []).splitlines()[2].split()
    assert row[:3] == ["node2", "!", "-"]


def test_connections_that_fail():
    assert connection_faults({"a": [], "b": []}) == []
    (fault,) = connection_faults({"a": ["b"], "b": []})
    assert fault.sentence == "a can't open a TCP connection to b, although ssh reaches both."
    assert "firewall" in fault.remedy
