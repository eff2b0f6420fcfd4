"""Where documents begin in a block of tokens, so that attention can be kept inside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentMarks:
    """The tokens that tell documents apart.

    Attributes:
        end: Id of the last token of each document, such as EOS.
        start: Id of the first token of each, such as BOS.
    """

    end: int | None = None
    start: int | None = None

    def isolate(self, block: Tensor) -> dict[str, Tensor]:
        """A block as a sample whose documents do not see each other; its first document may have begun before it.

        Every token but the block's first stays to be predicted, the first of a document from the end of the one before:
        that is how a model learns what may stand after an end.

        Args:
            block: Token ids, (T + 1,) int64.

        Returns:
            `input_ids`, `labels`, `document_ids` and `positions`, which begin anew in each document, (T + 1,) int64.
        """
        places = torch.arange(len(block))
        begins = places == 0
        if self.end is not None:
            begins[1:] |= block[:-1] == self.end
        if self.start is not None:
            begins |= block == self.start
        starts = torch.where(begins, places, 0).cummax(0).values
        return {
            "input_ids": block,
            "labels": block.clone(),
            "document_ids": begins.cumsum(0) - 1,
            "positions": places - starts,
        }
