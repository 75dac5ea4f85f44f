"""Checkpoints: round trip, damage, pruning, interrupted writing, checkpoints of another run."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptp_ds.files import sha256_of, write_folder, write_json
from ptp_ds.training import checkpoint as module
from ptp_ds.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    prompt_shape,
    prune,
    require_same_run,
    save_checkpoint,
    set_aside,
)
from ptp_ds.training.progress import progress_from

IDENTITY = {"task": {"name": "CB", "text": "{premise}"}, "seed": 3, "lr": 0.1, "max_length": None}


def state(prompt: torch.Tensor, **changes) -> dict[str, torch.Tensor]:
    """Tensors as Engine.state gives them, and the best prompt."""
    moments = {"exp_avg": prompt / 2, "exp_avg_sq": prompt**2, "adam_step": torch.tensor([3.0])}
    return {"prompt": prompt, **moments, "best_prompt": prompt.clone(), **changes}


def checkpoint(step: int = 5, **changes) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = state(torch.randn(4, 8, generator=generator))
    scores = {"metrics": {"accuracy": 0.5}, "score": 0.5, "cross_entropy": 0.7, "majority": 0.4, "examples": 6}
    best = {"step": 2, "evaluation": scores}
    return Checkpoint(**{"step": step, "tensors": tensors, "best": best, "identity": IDENTITY, **changes})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved_steps(root: Path) -> list[int]:
    return [load_checkpoint(folder).step for folder in list_checkpoints(root)]


def test_round_trip(tmp_path):
    written = checkpoint()
    folder = save_checkpoint(tmp_path, written, keep=2)
    assert folder == tmp_path / "step-000005"
    assert names_in(folder) == ["state.json", "state.safetensors"]
    read = load_checkpoint(folder)
    assert (read.step, read.best, read.identity) == (written.step, written.best, written.identity)
    assert read.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in written.tensors.items())
    assert prompt_shape(read) == (4, 8)


def test_a_run_that_a_callback_has_ended(tmp_path):
    """Older checkpoints don't say whether one has."""
    ended = checkpoint(ended=True)
    assert load_checkpoint(save_checkpoint(tmp_path, ended, keep=1)).ended
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    assert not load_checkpoint(folder).ended
    changed_meta(folder, ended=...)
    assert not load_checkpoint(folder).ended
    for name in ("ended", "scored"):
        changed_meta(folder, **{"ended": False, "scored": False, name: "no"})
        with pytest.raises(ValueError, match="it has no valid step, identity and best; resume from another checkpoint"):
            load_checkpoint(folder)


def test_whether_the_step_was_scored(tmp_path):
    """Older checkpoints say it by their identity, where they are a run's end, and otherwise not."""
    for told, scored in ((True, 5), (False, 0), (None, None)):
        folder = save_checkpoint(tmp_path, checkpoint(scored=told), keep=1)
        assert progress_from(load_checkpoint(folder)).scored == scored
    changed_meta(folder, scored=...)
    assert progress_from(load_checkpoint(folder)).scored is None
    changed_meta(folder, identity={**IDENTITY, "max_steps": 5})
    assert progress_from(load_checkpoint(folder)).scored == 5


def test_nothing_is_pruned_before_it_is_asked_for(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(step), keep=None)
    assert saved_steps(tmp_path) == [1, 2, 3]
    prune(tmp_path, 2, keep=1)
    assert saved_steps(tmp_path) == [2, 3]


def test_tensors_need_not_be_contiguous(tmp_path):
    turned = torch.arange(12.0).view(3, 4).T
    folder = save_checkpoint(tmp_path, checkpoint(tensors=state(turned), best=None), keep=1)
    assert torch.equal(load_checkpoint(folder).tensors["prompt"], turned)
    assert load_checkpoint(folder).best is None


def test_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 20):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert saved_steps(tmp_path) == [10, 20]
    assert names_in(tmp_path) == ["step-000010", "step-000020"]


def test_a_step_saved_again_is_replaced(tmp_path):
    save_checkpoint(tmp_path, checkpoint(5), keep=2)
    again = checkpoint(5, tensors=state(torch.ones(2, 2)))
    folder = save_checkpoint(tmp_path, again, keep=2)
    assert torch.equal(load_checkpoint(folder).tensors["prompt"], torch.ones(2, 2))
    assert names_in(tmp_path) == ["step-000005"]


def test_a_million_steps(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step), keep=1)
    assert saved_steps(tmp_path) == [1_000_000]


def test_a_run_resumed_from_an_older_checkpoint_keeps_what_it_writes(tmp_path):
    for step in (20, 40, 60):
        save_checkpoint(tmp_path, checkpoint(step), keep=3)
    assert save_checkpoint(tmp_path, checkpoint(30), keep=2).is_dir()
    assert 30 in saved_steps(tmp_path)


def test_other_folders_are_no_checkpoints(tmp_path):
    save_checkpoint(tmp_path / "checkpoints", checkpoint(5), keep=1)
    (tmp_path / "checkpoints" / "step-old").mkdir()
    found = newest_whole(tmp_path)[0]
    assert found == tmp_path / "checkpoints" / "step-000005"


# damage


def test_altered_tensors(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    file = folder / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"state\.safetensors is missing or altered \(its sha256 differs\); resume from"
    ):
        load_checkpoint(folder)


def test_missing_tensors(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    (folder / "state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"state\.safetensors is missing or altered"):
        load_checkpoint(folder)


def test_tensors_that_are_no_safetensors_file(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    file, meta = folder / "state.safetensors", folder / "state.json"
    file.write_bytes(b"not tensors")
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "sha256": sha256_of(file)}))
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged \(.*; resume from another checkpoint"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '"text"', "{}", '{"step": "x"}', '{"step": 1, "sha256": "", "identity": 3, "best": null}', None],
)
def test_state_json_that_cannot_be_read(tmp_path, content):
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    (folder / "state.json").unlink()
    if content is not None:
        (folder / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json can't be read: "):
        load_checkpoint(folder)


def changed_meta(folder: Path, **changes) -> None:
    meta = {**json.loads((folder / "state.json").read_text()), **changes}
    kept = {key: value for key, value in meta.items() if value is not ...}
    (folder / "state.json").write_text(json.dumps(kept))


def test_an_evaluation_of_no_example(tmp_path):
    """Its standard error is none."""
    best = checkpoint().best
    assert best is not None
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    changed_meta(folder, best={**best, "evaluation": {**best["evaluation"], "examples": 0}})
    with pytest.raises(ValueError, match="it has no valid step, identity and best"):
        load_checkpoint(folder)


@pytest.mark.parametrize("number", [0, 3, None, True])
def test_wrong_format(tmp_path, number):
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    changed_meta(folder, format=number)
    with pytest.raises(ValueError, match=f"step-000005 has checkpoint format {number}; this version reads 1 and 2"):
        load_checkpoint(folder)


def test_another_format_with_other_fields(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    changed_meta(folder, format=3, sha256=...)
    with pytest.raises(ValueError, match="has checkpoint format 3; this version reads 1 and 2"):
        load_checkpoint(folder)


# --resume


def test_find_checkpoint(tmp_path):
    assert newest_whole(tmp_path) == (None, None, [])
    first = save_checkpoint(tmp_path / "checkpoints", checkpoint(1), keep=5)
    newest = save_checkpoint(tmp_path / "checkpoints", checkpoint(2), keep=5)
    folder, read, told = newest_whole(tmp_path)
    assert (folder, read and read.step, told) == (newest, 2, [])
    assert find_checkpoint(str(first)) == first
    with pytest.raises(ValueError, match=r"--resume nowhere: there is no such folder; give a checkpoints/step-\.\.\."):
        find_checkpoint("nowhere")
    with pytest.raises(ValueError, match=r"not a checkpoint \(no state\.json\); give a checkpoints/step-"):
        find_checkpoint(str(tmp_path))


def cut_short(folder: Path) -> None:
    os.truncate(folder / "state.safetensors", 100)


def altered(folder: Path) -> None:
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def without_description(folder: Path) -> None:
    (folder / "state.json").unlink()


@pytest.mark.parametrize("damage", [cut_short, altered, without_description])
def test_a_damaged_newest_checkpoint_is_passed_over_and_set_aside(tmp_path, damage):
    root = tmp_path / "checkpoints"
    good, bad = (save_checkpoint(root, checkpoint(step), keep=5) for step in (1, 2))
    damage(bad)
    folder, read, told = newest_whole(tmp_path)
    assert (folder, read and read.step) == (good, 1)
    assert len(told) == 1
    assert told[0].startswith(str(bad))
    assert set_aside(root, good, damaged=True) == ["step-000002.damaged"]
    assert names_in(root) == ["step-000001", "step-000002.damaged"]
    damage(save_checkpoint(root, checkpoint(2), keep=5))
    set_aside(root, good, damaged=True)  # a second time
    assert names_in(root) == ["step-000001", "step-000002.damaged"]
    assert list_checkpoints(root) == [good]


def test_checkpoints_behind_the_one_that_is_named_are_set_aside(tmp_path):
    """Each time, and none is lost."""
    root = tmp_path / "checkpoints"
    five = save_checkpoint(root, checkpoint(5), keep=5)
    for step in (8, 10):
        save_checkpoint(root, checkpoint(step), keep=5)
    (tmp_path / "link").symlink_to(root)
    assert set_aside(root, tmp_path / "link" / five.name, damaged=False) == ["step-000008.left", "step-000010.left"]
    assert set_aside(root, five, damaged=False) == []
    save_checkpoint(root, checkpoint(10), keep=5)
    assert set_aside(root, five, damaged=False) == ["step-000010.left1"]
    assert names_in(root) == ["step-000005", "step-000008.left", "step-000010.left", "step-000010.left1"]
    assert newest_whole(tmp_path)[0] == five


def test_beside_a_checkpoint_from_elsewhere_all_are_set_aside(tmp_path):
    """Also beside one that was set aside before."""
    root = tmp_path / "checkpoints"
    three = save_checkpoint(root, checkpoint(3), keep=5)
    elsewhere = save_checkpoint(tmp_path / "other", checkpoint(5), keep=5)
    assert set_aside(root, elsewhere, damaged=False) == ["step-000003.left"]
    save_checkpoint(root, checkpoint(2), keep=5)
    assert set_aside(root, three.with_name("step-000003.left"), damaged=False) == ["step-000002.left"]
    assert set_aside(tmp_path / "new", elsewhere, damaged=False) == []


def test_only_damaged_checkpoints_are_refused(tmp_path):
    for step in (1, 2):
        cut_short(save_checkpoint(tmp_path / "checkpoints", checkpoint(step), keep=5))
    with pytest.raises(ValueError, match=r"^No checkpoint in .*checkpoints is whole: .*step-000002.*; .*step-000001.*"):
        newest_whole(tmp_path)


def test_another_format_is_not_passed_over(tmp_path):
    save_checkpoint(tmp_path / "checkpoints", checkpoint(1), keep=5)
    changed_meta(save_checkpoint(tmp_path / "checkpoints", checkpoint(2), keep=5), format=3)
    with pytest.raises(ValueError, match="step-000002 has checkpoint format 3"):
        newest_whole(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "its seed is 3, this run's is 4"),
        ({"lr": 0.2}, r"its lr is 0\.1, this run's is 0\.2"),
        ({"max_length": 99}, "its max_length is None, this run's is 99"),
        ({"task": {"name": "RTE"}}, "its task name is 'CB', this run's is 'RTE'"),
        ({"new setting": 1}, "its new setting is None, this run's is 1"),
    ],
)
def test_another_run_is_named(change, named):
    message = rf"^there is a checkpoint of another run: {named}.* Resume with the same settings, or start a new run"
    with pytest.raises(ValueError, match=message):
        require_same_run(checkpoint(), {**IDENTITY, **change}, Path("there"))


def test_the_same_run_is_accepted(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint(), keep=1)
    require_same_run(load_checkpoint(folder), IDENTITY, folder)


# writing


def test_unfinished_folders_are_ignored_and_overwritten(tmp_path):
    root = tmp_path / "checkpoints"
    leftover = root / ".step-000007.writing"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("half")
    assert newest_whole(tmp_path) == (None, None, [])
    folder = save_checkpoint(root, checkpoint(7), keep=1)
    assert names_in(root) == ["step-000007"]
    assert names_in(folder) == ["state.json", "state.safetensors"]


def failing(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise OSError("disk full")


def test_a_failing_write_leaves_the_old_folder(tmp_path):
    target = tmp_path / "adapter"
    write_folder(target, lambda folder: (folder / "file").write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        write_folder(target, failing)
    assert names_in(tmp_path) == ["adapter"]
    assert (target / "file").read_text() == "old"
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "new", failing)
    assert names_in(tmp_path) == ["adapter"]


def test_a_failing_save_leaves_the_old_checkpoints(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1), keep=1)

    def half(tensors, file):
        save_file(tensors, file)
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    assert names_in(tmp_path) == ["step-000001"]
    assert saved_steps(tmp_path) == [1]


def test_a_failing_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    write_folder(target, lambda folder: (folder / "file").write_text("old"))
    rename = os.rename

    def refuse(source, name):
        if str(source).endswith(".writing"):
            raise OSError("disk full")
        rename(source, name)

    monkeypatch.setattr("ptp_ds.files.os.rename", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_folder(target, lambda folder: (folder / "file").write_text("new"))
    assert (target / "file").read_text() == "old"


def test_write_folder_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "deep" / "adapter"
    write_folder(target, lambda folder: (folder / "first").write_text("1"))
    write_folder(target, lambda folder: (folder / "second").write_text("2"))
    assert names_in(target) == ["second"]
    assert names_in(target.parent) == ["adapter"]


def test_write_json(tmp_path):
    file = tmp_path / "result.json"
    write_json(file, {"a": 1})
    write_json(file, {"a": [2.5, None]})
    assert json.loads(file.read_text()) == {"a": [2.5, None]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": [2.5, None]}
    assert names_in(tmp_path) == ["result.json"]
