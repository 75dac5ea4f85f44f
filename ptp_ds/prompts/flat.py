"""Several tensors in one matrix: ptp_ds.training.engine trains one parameter, so whatever is trained lies in its rows.

Each tensor begins on a row of its own, flattened, with zeros behind it up to a whole row. A [P, W] tensor among rows of
width W is thus exactly P rows. Padding gets no gradient and stays zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Flat:
    """The layout. shapes: name -> shape, in the order of the rows. width: W, numbers of a row.

    Raises ValueError for a width or a tensor without any number.
    """

    shapes: Mapping[str, tuple[int, ...]]
    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"Rows of width {self.width} hold nothing; expected a width of 1 or more.")
        for name, shape in self.shapes.items():
            if math.prod(shape) < 1:
                raise ValueError(f"{name!r} has shape {tuple(shape)}; expected 1 or more in every dimension.")

    @property
    def rows(self) -> int:
        """R: rows of the matrix."""
        return sum(self._rows_of(shape) for shape in self.shapes.values())

    def _rows_of(self, shape: tuple[int, ...]) -> int:
        return -(-math.prod(shape) // self.width)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[R, W] from the tensors by name. Raises ValueError where a name or a shape isn't the layout's."""
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: tuple(shape) for name, shape in self.shapes.items()}
        if found != wanted:
            raise ValueError(f"Tensors of shapes {found} don't fit the layout; expected {wanted}.")
        parts = []
        for name, shape in wanted.items():
            padding = self._rows_of(shape) * self.width - math.prod(shape)
            parts.append(F.pad(tensors[name].reshape(-1), (0, padding)).view(-1, self.width))
        return torch.cat(parts)

    def split(self, matrix_RW: Tensor) -> dict[str, Tensor]:
        """The tensors by name, with their graph to the matrix. Raises ValueError for a matrix of another shape."""
        if tuple(matrix_RW.shape) != (self.rows, self.width):
            raise ValueError(
                f"A matrix of shape {tuple(matrix_RW.shape)} isn't [{self.rows}, {self.width}], the layout's."
            )
        parts = matrix_RW.split([self._rows_of(shape) for shape in self.shapes.values()])
        return {
            name: part.reshape(-1)[: math.prod(shape)].view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
