"""Which rows of a file's matrices a matrix of ours is made of.

What is done to a matrix on its way from a GGUF file to a model moves rows: the names change, queries, keys and values
are joined, heads are put in another order. Quantised rows cannot go through such functions as values. Numbers of rows
can: a matrix of one column, whose values say which rows they stand for.
"""

import bisect
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from litgpt.quantization.block_weight import BlockMatrix, BlockRows


class RowNumbers:
    """Numbers for the rows of several matrices.

    Args:
        rows: The name of each matrix and how many rows it has.
    """

    def __init__(self, rows: dict[str, int]) -> None:
        self.names = list(rows)
        self.starts: dict[str, int] = {}
        end = 0
        for name, count in rows.items():
            self.starts[name] = end
            end += count
        self._edges = [*self.starts.values(), end]

    def of(self, name: str) -> Tensor:
        """(rows, 1) the numbers of a matrix's rows."""
        place = self.names.index(name)
        return torch.arange(*self._edges[place : place + 2])[:, None]

    def places(self, numbers: Tensor) -> list[tuple[str, Tensor]]:
        """Where rows are: (N,) numbers -> the matrices that they are of, in turn, and the rows in each."""
        owners = torch.bucketize(numbers, torch.tensor(self._edges), right=True) - 1
        changes = (owners.diff() != 0).nonzero()[:, 0] + 1
        edges = [0, *changes.tolist(), len(numbers)]
        places = []
        for first, last in pairwise(edges):
            name = self.names[bisect.bisect_right(self._edges, int(numbers[first])) - 1]
            places.append((name, numbers[first:last] - self.starts[name]))
        return places


def composed(pieces: Sequence[tuple[BlockRows, Tensor]]) -> BlockMatrix:
    """A matrix of some rows of several, one piece below the other.

    Rows that are one behind the other in the file, in whatever order here, stay where they are.

    Args:
        pieces: The rows of a matrix of the file, and the numbers (N,) of those that are taken.
    """
    parts: list[BlockRows] = []
    orders: list[Tensor] = []
    end = 0
    for rows, numbers in pieces:
        first = int(numbers.min())
        if torch.equal(numbers.sort().values, torch.arange(first, first + len(numbers))):
            parts.append(BlockRows(rows.raw[first : first + len(numbers)], rows.form))
            orders.append(numbers - first + end)
        else:
            parts.append(rows.take(numbers))
            orders.append(torch.arange(end, end + len(numbers)))
        end += len(numbers)
    order = torch.cat(orders)
    return BlockMatrix(parts, None if torch.equal(order, torch.arange(end)) else order)
