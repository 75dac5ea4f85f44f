"""What ranks must see alike, and the sentence where they don't."""

import pytest
import torch

from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.checkpoint import Checkpoint
from ptp_ds.training.fingerprints import _checkpoint, _model_files, fingerprints, require_agreement


@pytest.fixture
def gathered(monkeypatch):
    """gathered(change): ranks 0 to 9; rank 2 on sees `change` applied to this rank's row."""

    def use(change) -> Ranks:
        def all_gather(rows, own, group=None):
            for rank, row in enumerate(rows):
                row.copy_(own if rank < 2 else change(own.clone()))

        monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
        return Ranks(0, 10, 0, torch.device("cpu"))

    return use


def change_second(row: torch.Tensor) -> torch.Tensor:
    row[1] += 1
    return row


def test_ranks_that_agree(gathered):
    require_agreement(gathered(lambda row: row), {"the data": "a", "the checkpoint": "b"})


def test_what_differs_and_where_is_named(gathered):
    with pytest.raises(ValueError, match="Rank 2, 3, 4, 5, 6, 7, 8, 9 of 10 sees another version of the checkpoint"):
        require_agreement(gathered(change_second), {"the data": "a", "the checkpoint": "b"})


def test_processors_that_differ_are_told_to_choose(gathered, tmp_path):
    """--precision auto takes bf16 where a host's processor has it; gathers of two dtypes would hang."""
    dtypes = (torch.float32, torch.bfloat16)
    seen = [fingerprints({}, tmp_path, None, {"precision": str(dtype)}, dtype) for dtype in dtypes]
    name = next(name for name in seen[0] if seen[0][name] != seen[1][name])
    with pytest.raises(ValueError, match=r"precision that auto chooses than rank 0 does; the hosts' proc.*--precision"):
        require_agreement(gathered(change_second), {"the data": "a", name: seen[0][name]})


def test_the_order_of_answers_is_among_what_ranks_must_see_alike(tmp_path):
    """A classifier's gradients are added by its outputs' numbers."""
    answers = {"up": " good", "down": " bad"}
    identities = ({"task": {"answers": one}} for one in (answers, dict(answers), dict(reversed(answers.items()))))
    one, same, other = (fingerprints({}, tmp_path, None, identity, torch.float32) for identity in identities)
    assert one == same
    assert one["the run's settings"] != other["the run's settings"]


def test_weights_of_one_size_are_told_by_their_sample(gathered, tmp_path):
    """A host's disk may hold a model that was trained further."""
    seen = [fingerprints({}, tmp_path, None, {"model's weights": name * 64}, torch.float32) for name in "ab"]
    assert next(name for name in seen[0] if seen[0][name] != seen[1][name]) == "the model's files"


def test_one_rank_agrees_with_itself():
    require_agreement(Ranks(0, 1, 0, torch.device("cpu")), {"the data": "a"})


def test_a_checkpoint_by_step_and_values():
    one = Checkpoint(3, {"prompt": torch.ones(2, 2), "adam_step": torch.tensor(3.0)}, None, {})
    same = Checkpoint(3, {"adam_step": torch.tensor(3.0), "prompt": torch.ones(2, 2)}, None, {})
    assert _checkpoint(one) == _checkpoint(same) != _checkpoint(None)
    assert _checkpoint(one) != _checkpoint(Checkpoint(4, one.tensors, None, {}))
    assert _checkpoint(one) != _checkpoint(Checkpoint(3, {**one.tensors, "prompt": torch.zeros(2, 2)}, None, {}))


def test_a_models_files_by_content_and_size(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("ab")
    before = _model_files(tmp_path)
    (tmp_path / "notes.md").write_text("not read")
    assert _model_files(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("abc")
    assert _model_files(tmp_path) != before
    (tmp_path / "model.safetensors").write_text("ab")
    (tmp_path / "config.json").write_text("[]")
    assert _model_files(tmp_path) != before
