"""Token chunks that are there already, in one data set or a mixture of several."""

from __future__ import annotations

from dataclasses import dataclass, fields

from litgpt.data.chunk_data import ChunkData, DataSource, splits_of

ALIASES = ("path", "data_dir")


@dataclass(repr=False)
class LitData(ChunkData[str | list[str]]):
    """Token chunks as `litgpt prepare_dataset` or litdata's `optimize(..., item_loader=TokensLoader())` writes them, in
    a folder or an object store; several data sets are mixed by weights.
    """

    data_path: str | list[str] = "data"
    """Folder or address (s3://, gs://, azure://, hf://) of the prepared data, or a list of them to mix"""
    split_names: tuple[str, str] | None = None
    """Folders below data_path with the training and the validation chunks; null takes train and val where they are
    there, else data_path itself, without validation"""
    weights: list[float] | None = None
    """Share of each data set of a mixture in the training samples, such as [0.7, 0.3]; null takes as much of each as it
    has tokens"""
    path: str | None = None
    """Another spelling of data_path"""
    data_dir: str | None = None
    """Another spelling of data_path"""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ALIASES if getattr(self, name) is not None}
        default = next(field.default for field in fields(self) if field.name == "data_path")
        if self.data_path != default:
            given = {"data_path": self.data_path, **given}
        if len(given) > 1:
            names = " and ".join(f"`{name}`" for name in given)
            raise ValueError(f"{names} say the same: give only one of them.")
        wanted = next(iter(given.values()), default)
        several = isinstance(wanted, list | tuple)
        super().__post_init__()
        self.data_path = [str(path) for path in wanted] if several else str(wanted)
        self.path = self.data_dir = None
        if self.split_names is not None:
            self.split_names = tuple(self.split_names)
            if len(self.split_names) != 2:
                raise ValueError(f"split_names={list(self.split_names)}: two names are needed, as [train, val].")
        self._check_weights()

    def roots(self) -> list[str]:
        return self.data_path if isinstance(self.data_path, list) else [self.data_path]

    def sources(self) -> list[DataSource]:
        weights = self.weights or [None] * len(self.roots())
        return [splits_of(path, self.split_names, w) for path, w in zip(self.roots(), weights, strict=True)]

    def _check_weights(self) -> None:
        roots = self.roots()
        if not roots or len(set(roots)) != len(roots):
            raise ValueError(f"data_path={self.data_path}: at least one data set is needed, and each only once.")
        if self.weights is None:
            return
        if len(self.weights) != len(roots):
            raise ValueError(
                f"weights={self.weights} has {len(self.weights)} number(s), and `data_path` names "
                f"{len(roots)} data set(s): give one for each."
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights={self.weights}: every weight must be greater than 0.")
