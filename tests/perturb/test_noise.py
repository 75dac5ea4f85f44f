"""Noise: its size, what may move, and that it depends on (seed, step, example) alone; projections and steps."""

from dataclasses import replace

import pytest
import torch

from ptp_ds.choices import NORMS
from ptp_ds.config.run_config import RunConfig
from ptp_ds.kernels.perturb_step import project, steepest
from ptp_ds.packing.row import pack
from ptp_ds.perturb import PERTURBATIONS, Noise
from ptp_ds.perturb.ascent import start_delta
from ptp_ds.perturb.ball import example_norm, radius_of
from ptp_ds.perturb.mask import mask_token_id
from ptp_ds.tasks.example import Example
from ptp_ds.training.step import settings_of
from tests.support.reference import make_examples


def long_row(movable):
    return pack([Example(context_ids=[1] * 400, movable=movable, candidate_ids=[[1], [2]], gold=0, index=0)])


@pytest.mark.parametrize("name", ["gaussian", "uniform"])
def test_noise_has_its_size_and_keeps_off_template_tokens(name):
    row = long_row([place % 2 == 0 for place in range(400)])
    settings = settings_of(RunConfig(sigma=0.3), 5.0)
    delta = PERTURBATIONS[name].find(None, row, torch.zeros(400, 64), settings, Noise(0, 0))
    moved = delta[row.movable]
    assert moved.square().sum(-1).mean().sqrt().item() == pytest.approx(0.3 * 5.0, rel=0.03)
    assert abs(moved.mean().item()) < 0.01
    assert float(delta[~row.movable].abs().max()) == 0.0


def test_noise_belongs_to_the_example_not_to_its_place():
    rows = make_examples("multi")
    whole = Noise(1, 2).normal(pack(rows), 8)
    alone = [Noise(1, 2).normal(pack([row]), 8) for row in rows]
    assert torch.equal(whole, torch.cat(alone))
    backwards = Noise(1, 2).normal(pack(rows[::-1]), 8)
    assert torch.equal(backwards, torch.cat(alone[::-1]))
    for other in (Noise(1, 3), Noise(2, 2)):
        assert not torch.equal(other.normal(pack(rows), 8), whole)
    assert not torch.equal(Noise(1, 2).normal(pack(rows), 8, "start"), whole)


def sizes(delta, row, norm):
    return {"frobenius": example_norm(delta, row), "token_l2": delta.norm(dim=-1), "linf": delta.abs().amax(-1)}[norm]


@pytest.mark.parametrize("norm", NORMS)
def test_projection_and_steps(norm):
    row = pack(make_examples("multi"))
    delta = torch.randn(row.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    bound = radius_of(norm, 0.5, 16)
    inside = project(delta, row.places, norm, bound)
    assert float(sizes(inside, row, norm).max()) <= bound
    assert float(sizes(inside, row, norm).min()) > 0.9 * bound
    torch.testing.assert_close(project(inside * 0.5, row.places, norm, bound), inside * 0.5)
    step = steepest(delta, row.places, norm, bound)
    torch.testing.assert_close(sizes(step, row, norm), torch.full_like(sizes(step, row, norm), bound))
    rival = project(torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)) * 9, row.places, norm, bound)
    assert float((step * delta).sum()) > float((rival * delta).sum())
    assert torch.equal(steepest(torch.zeros_like(delta), row.places, norm, bound), torch.zeros_like(delta))
    settings = settings_of(RunConfig(epsilon=0.5, norm=norm), 1.0)
    start = start_delta(row, 16, settings, Noise(0, 0))
    assert 0 < float(sizes(start, row, norm).max()) <= bound


def test_example_norm_is_per_example():
    row = pack(make_examples("single"))
    delta = torch.arange(row.num_tokens * 2, dtype=torch.float32).view(-1, 2)
    expected = [part.norm() for part in delta.split(row.lengths)]
    torch.testing.assert_close(example_norm(delta, row), torch.stack(expected))


def test_settings_default_step_length():
    run = RunConfig(perturbation="pgd", epsilon=0.4, ascent_steps=3)
    assert settings_of(run, 1.0).alpha == pytest.approx(0.2)
    assert settings_of(replace(run, alpha=0.7), 1.0).alpha == 0.7


def worded(index=0, words=40):
    """Two tokens a word, every fifth word of the template."""
    ids = list(range(10, 10 + 2 * words))
    movable = [place // 2 % 5 != 0 for place in range(2 * words)]
    return Example(context_ids=ids, movable=movable, candidate_ids=[[1], [2]], gold=0, index=index,
                   words=[place // 2 for place in range(2 * words)])  # fmt: skip


def masked_words(example, twin):
    changed = [a != b for a, b in zip(example.context_ids, twin.context_ids, strict=True)]
    return {word for word, differs in zip(example.words, changed, strict=True) if differs}


def test_masking_hides_whole_words_of_the_row_alone():
    settings, rows = settings_of(RunConfig(mask_share=0.3), 1.0, 9), [worded(index) for index in range(60)]
    twins = PERTURBATIONS["mask"].twins(rows, settings, Noise(1, 2))
    for row, twin in zip(rows, twins, strict=True):
        hidden = masked_words(row, twin)
        assert hidden
        for place, (word, moves) in enumerate(zip(row.words, row.movable, strict=True)):
            assert twin.context_ids[place] == (9 if word in hidden else row.context_ids[place])
            assert moves or word not in hidden
            assert twin.movable[place] == (moves and word not in hidden)
    share = sum(len(masked_words(row, twin)) for row, twin in zip(rows, twins, strict=True)) / (60 * 32)
    assert share == pytest.approx(0.3, abs=0.03)


def test_masking_belongs_to_the_example_and_the_step():
    settings, rows = settings_of(RunConfig(mask_share=0.3), 1.0, 9), [worded(index) for index in range(4)]
    twins = PERTURBATIONS["mask"].twins(rows, settings, Noise(1, 2))
    assert PERTURBATIONS["mask"].twins(rows[2:], settings, Noise(1, 2)) == twins[2:]
    for other in (Noise(1, 3), Noise(2, 2)):
        assert PERTURBATIONS["mask"].twins(rows, settings, other) != twins
    assert len({tuple(twin.context_ids) for twin in twins}) == 4


def test_masking_hides_at_least_one_word_where_one_may_move():
    settings = settings_of(RunConfig(mask_share=1e-9), 1.0, 9)
    twin = PERTURBATIONS["mask"].twins([worded()], settings, Noise(0, 0))[0]
    assert len(masked_words(worded(), twin)) == 1
    still = replace(worded(), movable=[False] * 80)
    assert list(PERTURBATIONS["mask"].twins([still], settings, Noise(0, 0))[0].context_ids) == list(still.context_ids)


def test_masking_a_share_of_0_hides_nothing():
    """mask+gaussian then adds noise to every word that may move, and that is all."""
    settings, rows = settings_of(RunConfig(mask_share=0.0, sigma=0.5), 1.0, 9), [worded(index) for index in range(3)]
    twins = PERTURBATIONS["mask+gaussian"].twins(rows, settings, Noise(0, 0))
    assert [list(twin.context_ids) for twin in twins] == [list(row.context_ids) for row in rows]
    assert [list(twin.movable) for twin in twins] == [list(row.movable) for row in rows]


def test_the_token_that_masks(tokenizer):
    assert tokenizer.mask_token_id is None
    assert tokenizer.decode([mask_token_id(tokenizer, None)]) == "_"
    assert mask_token_id(tokenizer, "a") == tokenizer.convert_tokens_to_ids("a")
    with pytest.raises(ValueError, match=r"--mask_token 'a b c' is [2-9] tokens"):
        mask_token_id(tokenizer, "a b c")
