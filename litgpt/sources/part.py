"""A part of every weight of a checkpoint, for one of several devices."""

from collections.abc import Callable, Iterator

from torch import Tensor

from litgpt.formats.rules import Named
from litgpt.sources.source import Source


class PartSource(Source):
    """A part of each weight of another checkpoint.

    Args:
        whole: That checkpoint.
        take: Takes the part of a weight, by its name.
    """

    def __init__(self, whole: Source, take: Callable[[str, Tensor], Tensor]) -> None:
        self.whole, self.take = whole, take
        self.config, self.files, self.dtype, self.note = whole.config, whole.files, whole.dtype, whole.note

    def layout(self) -> dict[str, Tensor]:
        return {name: self.take(name, tensor) for name, tensor in self.whole.layout().items()}

    def weights(self) -> Iterator[Named]:
        return ((name, self.take(name, tensor)) for name, tensor in self.whole.weights())

    def release(self, tensor: Tensor) -> None:
        self.whole.release(tensor)


def check_whole(source: Source) -> None:
    """Refuses weights that are to be split over devices, but are quantised already.

    Raises:
        ValueError: They are.
    """
    if source.quantized is not None:
        raise ValueError(
            f"'{source.files}' holds {source.quantized} weights, which cannot be split over processes "
            "(tensor_parallel). Give the checkpoint that they were made from, with `quantize`, or take sequential."
        )
