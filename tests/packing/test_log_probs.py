"""Log-probabilities of picked tokens: torch's log_softmax, value and gradient, in less memory."""

import pytest
import torch

from ptp_ds.packing import log_probs
from ptp_ds.packing.log_probs import picked_log_probs
from tests.support.memory import peak_of

ROWS = torch.tensor([0, 3, 3, 6, 0, 2])
TOKENS = torch.tensor([5, 1, 4, 10, 5, 0])  # the first is picked twice


def logits(rows=7, vocabulary=11, dtype=torch.float32):
    return (4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()


@pytest.mark.parametrize("numbers", [1, 11, 25, 1 << 24])  # one row a part, one, two, all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_log_softmax(numbers, dtype, monkeypatch):
    monkeypatch.setattr(log_probs, "_NUMBERS", numbers)
    x = logits(dtype=dtype)
    weight = torch.linspace(-1, 2, 6)
    found = picked_log_probs(x, ROWS, TOKENS)
    exact = x.detach().double().requires_grad_()
    wanted = exact.log_softmax(-1)[ROWS, TOKENS]
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)
    (got,) = torch.autograd.grad(found, x, weight.to(found.dtype))
    (right,) = torch.autograd.grad(wanted, exact, weight.double())
    assert got.dtype == dtype
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), right, atol=1e-6, rtol=rounding)
    assert not right[1].any()
    assert not got[1].any(), "a row that nobody reads gets no gradient"


def test_many_picks_of_a_place_have_the_same_gradient_in_every_run(two_threads):
    """Answers of many candidates begin at one place; from 32768 picks on torch's index_put_ adds in any order."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens = torch.randint(3, (40_000,), generator=generator), torch.randint(4, (40_000,), generator=generator)
    weight, x = torch.randn(40_000, generator=generator), logits(3, 4)
    found = [torch.autograd.grad(picked_log_probs(x, rows, tokens), x, weight)[0] for _ in range(30)]
    assert all(torch.equal(one, found[0]) for one in found)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(log_probs, "_NUMBERS", 25)
    x = logits(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: picked_log_probs(x, ROWS, TOKENS), [x])


def test_no_row_and_no_pick():
    none = torch.empty(0, dtype=torch.int64)
    x = logits()
    found = picked_log_probs(x, none, none)
    assert found.shape == (0,)
    assert not torch.autograd.grad(found.sum(), x)[0].any()
    assert picked_log_probs(x[:0], none, none).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_the_gradient_and_a_part(dtype, monkeypatch):
    """One matrix of the logits' size and dtype, and a few parts; a plain log_softmax takes three in fp32."""
    part = 4 * 4096
    monkeypatch.setattr(log_probs, "_NUMBERS", part)
    x = logits(64, 4096, dtype)
    rows, tokens = torch.arange(64), torch.arange(64)

    def plain():
        return torch.autograd.grad(x.float().log_softmax(-1)[rows, tokens].sum(), x)

    def ours():
        return torch.autograd.grad(picked_log_probs(x, rows, tokens).sum(), x)

    known = (x, rows, tokens)
    assert peak_of(ours, known) <= x.numel() * x.element_size() + 3 * 4 * part
    assert peak_of(plain, known) >= 3 * 4 * x.numel()
