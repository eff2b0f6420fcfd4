"""Perplexity of quantised GGUF files: by us, with and without calibration, and by llama.cpp.

    python extensions/benchmarks/k_quants.py MODEL --llama_cpp peers/llama-cpp/bin/python

MODEL is anything that litgpt opens; it is written to a float32 file first, which both quantise. Every file is read back
by litgpt, de-quantised to float32, and given the same 2,048 tokens of Shakespeare, in one window. Calibration is on
another passage of the same text.

`llama_model_quantize` is what `llama-quantize` runs. With importances, llama.cpp's quantiser of single matrices
(`ggml_quantize_chunk`) is called from our writer, with the same importances: its own tool for them is not in the wheel.
"""

import argparse
import ctypes
import math
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import gguf
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from litgpt.export import gguf_writer
from litgpt.export.calibration import importance
from litgpt.export.gguf_kinds import KINDS
from litgpt.export.gguf_writer import export_gguf
from litgpt.quantization.block_search import quantised
from litgpt.quantization.blocks import FORMATS
from litgpt.sources.door import open_merged
from litgpt.sources.find import find_checkpoint
from litgpt.sources.load import load_model
from litgpt.sources.source import Source
from litgpt.tokenizer.tokenizer import Tokenizer

TEXT = Path(__file__).parents[2] / "config_hub/pretrain/data/shakespeare.txt"
CALIBRATION, MEASURED = slice(0, 60_000), slice(600_000, 640_000)  # characters
TOKENS = 2048
THEIRS = """
import ctypes, sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(sys.argv[3]), 2
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)) == 0
"""
WHERE = "import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parent / 'lib/libggml-base.so')"


def perplexity(file: Path, tokens: Tensor) -> float:
    model = load_model(file, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(tokens[None])[0]
    return math.exp(cross_entropy(logits[:-1], tokens[1:]))


def calibrated(
    source: Source, file: Path, kind: str, tokens: Tensor, matters: dict[str, Tensor], how: Callable[..., Tensor]
) -> float:
    """The perplexity of a file whose matrices are quantised in some way, by these importances."""
    with mock.patch.object(gguf_writer, "quantised", how):
        export_gguf(source, file, kind, importance=matters)
    return perplexity(file, tokens)


def their_blocks(python: str) -> Callable[[Tensor, str, Tensor | None], Tensor]:
    """llama.cpp's quantiser of a matrix, in the form of ours."""
    library = ctypes.CDLL(subprocess.check_output([python, "-c", WHERE], text=True).strip())
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *(ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        ctypes.c_void_p,
    ]

    def quantise(values: Tensor, form: str, importance: Tensor | None = None) -> Tensor:
        values, kind = values.float().contiguous(), gguf.GGMLQuantizationType[form.upper()]
        raw = torch.empty(len(values), FORMATS[form].row_bytes(values.size(1)), dtype=torch.uint8)
        weights = None if importance is None else importance.float().contiguous().data_ptr()
        library.ggml_quantize_chunk(kind, values.data_ptr(), raw.data_ptr(), 0, *values.shape, weights)
        return raw

    return quantise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama_cpp", help="a Python that has llama_cpp")
    parser.add_argument("--kinds", nargs="+", default=[kind for kind in KINDS if kind.startswith("q")])
    options = parser.parse_args()
    source = open_merged(find_checkpoint(options.model))
    text = TEXT.read_text(encoding="utf-8")
    tokens = Tokenizer(source.files).encode(text[MEASURED])[:TOKENS]
    with TemporaryDirectory() as folder:
        place = Path(folder)
        export_gguf(source, place / "float32.gguf", "float32")
        source = open_merged(place / "float32.gguf")
        (place / "text.txt").write_text(text[CALIBRATION], encoding="utf-8")
        matters = importance(source, place / "text.txt")
        theirs = their_blocks(options.llama_cpp) if options.llama_cpp else None
        print(f"float32: {perplexity(place / 'float32.gguf', tokens):.3f} on {len(tokens)} tokens", flush=True)
        titles = "kind | MB | ours | calibrated | llama.cpp | calibrated (same importances) | seconds, ours | llama.cpp"
        print(f"| {titles} |\n" + "|---" * 8 + "|")
        for kind in options.kinds:
            file = place / "file.gguf"
            again = partial(calibrated, source, file, kind, tokens)
            start = time.process_time()
            export_gguf(source, file, kind)
            ours = time.process_time() - start
            row = [
                f"{file.stat().st_size / 1e6:.1f}",
                f"{perplexity(file, tokens):.3f}",
                f"{again(matters, quantised):.3f}",
            ]
            if theirs is not None:
                number = str(int(KINDS[kind].file_type))
                start = time.perf_counter()
                command = [options.llama_cpp, "-c", THEIRS, str(place / "float32.gguf"), str(file), number]
                subprocess.run(command, check=True, capture_output=True)
                row += [f"{perplexity(file, tokens):.3f} ({file.stat().st_size / 1e6:.1f} MB)"]
                row += [f"{again(matters, theirs):.3f}", f"{ours:.0f}", f"{time.perf_counter() - start:.0f}"]
            print(f"| {kind} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
