"""A checkpoint as a GGUF file."""

from contextlib import suppress
from pathlib import Path

from litgpt.checkpoint import atomic_file
from litgpt.devices.dtypes import dtype_from_name
from litgpt.export.calibration import importance
from litgpt.export.gguf_kinds import KINDS, QUANTISED
from litgpt.export.gguf_writer import export_gguf
from litgpt.prompts import carried_templates
from litgpt.sources.source import Source
from litgpt.sources.weight_stream import WeightProgress, tell_note

GGUF = ".gguf"


def save_gguf(
    source: Source,
    path: Path,
    dtype: str | None = None,
    name: str | None = None,
    verbose: bool = False,
    calibration: Path | None = None,
) -> None:
    """Write an opened checkpoint as a GGUF file, which must not exist, and say what was written.

    Args:
        source: The checkpoint.
        path: The file.
        dtype: A type of weights by any of its names, or of GGUF's quantised ones; None is that of the checkpoint.
        name: What the file calls the model.
        verbose: Print every tensor instead of a progress bar.
        calibration: A text that shows which columns of quantised weights matter.
    """
    if path.suffix != GGUF:
        raise ValueError(f"'{path}' is not a name of a GGUF file: let it end with {GGUF}, as in {path}{GGUF}.")
    if path.exists():
        raise ValueError(f"'{path}' exists already. Remove it, or choose another name.")
    kind = dtype.lower() if dtype else None
    if kind is not None and kind not in KINDS:
        with suppress(ValueError):  # another name of one, such as bf16-true
            kind = str(dtype_from_name(kind)).removeprefix("torch.")
    if calibration is not None and kind not in QUANTISED:
        raise ValueError(
            f"calibration={str(calibration)!r} cannot be combined with {kind or 'the type of the checkpoint'}: it is "
            f"for quantised weights ({', '.join(QUANTISED)})."
        )
    tell_note(source)
    matters = importance(source, calibration) if calibration is not None else None
    with atomic_file(path) as file:
        kind = export_gguf(source, file, kind, name, WeightProgress(source, verbose), matters)
    if note := carried_templates(source.files, False)[1]:
        print(note)
    print(f"Saved {path} ({path.stat().st_size / 1e6:,.1f} MB, {kind}). To talk with it, run:\nlitgpt chat {path}")
