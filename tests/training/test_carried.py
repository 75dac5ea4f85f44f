"""Carried deltas: a file for each rank, found again by any number of ranks, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptp_ds.files import sha256_of
from ptp_ds.training import carried
from ptp_ds.training.carried import Carried, gather, part_name
from ptp_ds.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ptp_ds.training.progress import progress_from

CPU = torch.device("cpu")
LENGTHS = [3, 1, 4, 2, 5, 2]
WHOLE = torch.randn(sum(LENGTHS), 6, generator=torch.Generator().manual_seed(0))
BY_PLACE = WHOLE.split(LENGTHS)
HANDS = [[4, 0], [2], [1, 5, 3]]


def deltas(places):
    return torch.cat([BY_PLACE[place] for place in places])


def saved(folder):
    """A checkpoint of three ranks."""
    tensors = {**{name: torch.ones(2, 6) for name in ("prompt", "exp_avg", "exp_avg_sq")}, "adam_step": torch.ones(1)}
    parts = ((places, deltas(places)) for places in HANDS)
    return save_checkpoint(folder, Checkpoint(5, tensors, None, {"seed": 1}), 1, parts)


@pytest.mark.parametrize("hands", [HANDS, [[0, 1, 2, 3, 4, 5]], [[5, 0, 2], [4, 1, 3]]])
def test_any_number_of_ranks_finds_its_own(tmp_path, hands):
    progress = progress_from(load_checkpoint(saved(tmp_path)))
    files = progress.carried.files
    assert [file.name for file in files] == [part_name(rank) for rank in range(3)]
    for places in hands:
        found = Carried(files=files)
        assert torch.equal(found.of(LENGTHS, places, CPU), deltas(places))
        assert found.files == (), "read once"
        assert torch.equal(found.of(LENGTHS, places, CPU), deltas(places))


def test_a_rank_reads_its_own_rows_alone(tmp_path, monkeypatch):
    """A batch of all ranks may be larger than a host's memory."""
    folder, read = saved(tmp_path), []
    real = carried.open_tensors

    class Noting:
        def __init__(self, handle):
            self.handle = handle

        def get_tensor(self, name):
            read.append(self.handle.get_tensor(name).numel() if name == "deltas" else 0)
            return self.handle.get_tensor(name)

        def get_slice(self, name):
            return Rows(self.handle.get_slice(name))

    class Rows:
        def __init__(self, rows):
            self.rows, self.get_shape = rows, rows.get_shape

        def __getitem__(self, part):
            read.append((part.stop - part.start) * 6)
            return self.rows[part]

    class Opened:
        def __init__(self, *given):
            self.given = real(*given)

        def __enter__(self):
            return Noting(self.given.__enter__())

        def __exit__(self, *given):
            return self.given.__exit__(*given)

    files = tuple(load_checkpoint(folder).carried)
    monkeypatch.setattr(carried, "open_tensors", Opened)
    Carried(files=files).of(LENGTHS, [2, 3], CPU)
    assert sum(read) == 6 * (LENGTHS[2] + LENGTHS[3])


def test_checkpoints_of_before_hold_all_in_one():
    tensors = {"prompt": torch.ones(2, 6), "carried_delta": WHOLE}
    progress = progress_from(Checkpoint(5, tensors, None, {}))
    assert torch.equal(progress.carried.of(LENGTHS, [4, 0], CPU), deltas([4, 0]))


def test_rank_0_takes_one_part_at_a_time():
    sent, asked = [deltas(places) for places in HANDS], []

    def received(rank, out):
        asked.append(rank)
        return out.copy_(sent[rank])

    main = SimpleNamespace(is_main=True, world=3, received=received)
    parts = gather(main, sent[0], HANDS, LENGTHS)
    for rank, places in enumerate(HANDS):
        assert asked == list(range(1, rank)), "the next one waits with its rank"
        found, part = next(parts)
        assert found == places
        assert torch.equal(part, sent[rank])
    assert list(parts) == []
    other, handed = SimpleNamespace(is_main=False, send_main=lambda tensor: handed.append(tensor)), []
    assert list(gather(other, sent[1], HANDS, LENGTHS)) == []
    assert torch.equal(handed[0], sent[1])


@pytest.mark.parametrize("lengths", [LENGTHS[:-1], [*LENGTHS, 1], [3, 1, 4, 2, 5, 3]])
def test_deltas_of_another_batch(tmp_path, lengths):
    files = tuple(load_checkpoint(saved(tmp_path)).carried)
    with pytest.raises(ValueError, match="holds deltas of another batch than the run's next one; resume from another"):
        Carried(files=files).of(lengths, [0], CPU)


def resigned(folder, rank, tensors):
    """A part with other tensors, and their sha256 in state.json."""
    save_file(tensors, folder / part_name(rank))
    meta = json.loads((folder / "state.json").read_text())
    meta["carried"][rank] = sha256_of(folder / part_name(rank))
    (folder / "state.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"deltas": torch.full((8, 6), float("nan"))}, "deltas that are not finite"),
     ({"deltas": torch.ones(8)}, "no list of places, or deltas of shape"),
     ({"places": torch.ones(2)}, "no list of places"),
     ({"more": torch.ones(2)}, "other tensors than deltas and places")],
)  # fmt: skip
def test_parts_that_were_never_written(tmp_path, changes, reason):
    folder = saved(tmp_path)
    resigned(folder, 0, {**load_file(folder / part_name(0)), **changes})
    with pytest.raises(ValueError, match=rf"{part_name(0)} holds .*{reason}.*; resume from another checkpoint"):
        load_checkpoint(folder)


def test_altered_and_missing_parts(tmp_path):
    folder = saved(tmp_path)
    content = bytearray((folder / part_name(1)).read_bytes())
    content[-1] ^= 1
    (folder / part_name(1)).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{part_name(1)} is missing or altered \(its sha256 differs\)"):
        load_checkpoint(folder)
    (folder / part_name(1)).unlink()
    with pytest.raises(ValueError, match=rf"{part_name(1)} is missing or altered"):
        load_checkpoint(folder)
    meta = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**meta, "carried": {}}))
    with pytest.raises(ValueError, match="its carried deltas are no list of files"):
        load_checkpoint(folder)
