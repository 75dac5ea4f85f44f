"""Several tensors in one matrix: round trip, rows, gradients, and what doesn't fit."""

import pytest
import torch

from ptp_ds.prompts.flat import Flat

SHAPES = {"prompt": (3, 4), "bias": (5,), "head": (2, 3, 3), "scale": (1,)}
LAYOUT = Flat(SHAPES, width=4)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_round_trip():
    matrix = LAYOUT.pack(tensors())
    assert matrix.shape == (LAYOUT.rows, 4) == (3 + 2 + 5 + 1, 4)
    parts = LAYOUT.split(matrix)
    assert list(parts) == list(SHAPES)
    assert all(torch.equal(parts[name], tensor) for name, tensor in tensors().items())


def test_a_tensor_as_wide_as_the_rows_is_its_rows():
    assert torch.equal(LAYOUT.pack(tensors())[:3], tensors()["prompt"])


def test_the_order_of_the_layout_counts_not_that_of_the_tensors():
    backwards = dict(reversed(tensors().items()))
    assert torch.equal(LAYOUT.pack(backwards), LAYOUT.pack(tensors()))


def test_gradients_reach_the_tensors_numbers_and_no_padding():
    matrix = torch.ones(LAYOUT.rows, 4, requires_grad=True)
    sum(part.sum() for part in LAYOUT.split(matrix).values()).backward()
    assert torch.equal(matrix.grad, LAYOUT.pack({name: torch.ones(shape) for name, shape in SHAPES.items()}))
    assert int((matrix.grad == 0).sum()) == 3 + 2 + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    matrix = LAYOUT.pack({name: tensor.to(dtype) for name, tensor in tensors().items()})
    assert {matrix.dtype} == {part.dtype for part in LAYOUT.split(matrix).values()} == {dtype}


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"Tensors of shapes .* don't fit the layout; expected \{'prompt': \(3, 4\)"):
        LAYOUT.pack({**tensors(), "bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="don't fit the layout"):
        LAYOUT.pack({"prompt": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"A matrix of shape \(3, 4\) isn't \[11, 4\], the layout's\."):
        LAYOUT.split(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"Rows of width 0 hold nothing; expected a width of 1 or more\."):
        Flat(SHAPES, width=0)
    with pytest.raises(ValueError, match=r"'head' has shape \(0, 3\); expected 1 or more in every dimension\."):
        Flat({"head": (0, 3)}, width=4)
