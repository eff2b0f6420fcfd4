"""Compiling the decode step, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import litgpt
from litgpt.checkpoint import atomic_file
from litgpt.config import Config
from litgpt.generation import skinny_gemm
from litgpt.generation.compiled_program import Program, Specification, code_version, described_weights
from litgpt.kv_cache import KVCache, layer_cache_of
from litgpt.model import GPT, RotaryEmbedding
from litgpt.quantization.layers import replace_linears

PRIORITY = 10  # niceness of the process that compiles
OPTIONS = {"aot_inductor.package_constants_in_so": False}  # the weights stay with the model


class DecodeStep(nn.Module):
    """One token for each of some rows, as a function of tensors alone.

    Args:
        model: The model.
        cache: One of the model's, of this many rows; its tensors are not used.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        super().__init__()
        self.model = model
        self._like = cache

    def forward(self, tokens: Tensor, positions: Tensor, state: list[Tensor], reach: Tensor) -> Tensor:
        """(B, 1) tokens and positions -> (B, 1, V) logits.

        Args:
            tokens: The tokens.
            positions: Where they stand.
            state: The cache's `lengths` and `tensors()`; the latter are changed.
            reach: Of this many values as attention reads slots of the cache.
        """
        lengths, *tensors = state
        if isinstance(self.model.transformer.wte, skinny_gemm.PaddedEmbedding):
            tokens = tokens.masked_fill(positions < 0, -1)
        return self.model(tokens, positions, cache=self.cache_of(tensors, lengths, slice(None), reach))

    def cache_of(self, tensors: list[Tensor], lengths: Tensor, rows: slice | Tensor, reach: Tensor) -> KVCache:
        """The cache of these tensors, of some of its rows."""
        cache, rest = self._like.select(slice(None)), iter(tensors)
        for ring in cache.rings.values():
            ring.table = next(rest)
        for layer in cache.layers:
            layer.tensors = [next(rest) for _ in layer.tensors]
        cache = cache.select(rows)
        cache.lengths = lengths
        cache.read_only(reach.size(0))
        return cache


class ReadStep(DecodeStep):
    """The tokens of some prompts, as a function of tensors alone."""

    def forward(self, tokens: Tensor, positions: Tensor, state: list[Tensor], reach: Tensor) -> Tensor:
        """(B, T) tokens and positions -> (B, T, C) hidden states. `state` begins with the rows (B,) of the cache that
        the prompts are in; the rest as for `DecodeStep`, of these rows the lengths, of all rows the tensors."""
        rows, lengths, *tensors = state
        return self.model.hidden_states(tokens, positions, cache=self.cache_of(tensors, lengths, rows, reach))


def compile_elsewhere(specification: Specification, path: Path) -> None:
    """Has another process compile a step. It outlives this one, so that a short run leaves something to the next.

    Raises:
        ValueError: It could not be compiled; says why.
        OSError: There is no process to be had.
    """
    folder = str(Path(litgpt.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
    process = subprocess.Popen(
        [sys.executable, "-m", "litgpt.generation.compile_step", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        text=True,
    )
    answer, _ = process.communicate(json.dumps(specification, default=str))
    if process.returncode:
        raise ValueError(answer.strip() or f"the compiling process ended with status {process.returncode}")


def compile_step(specification: Specification, path: Path) -> None:
    """Compiles a step and puts it into a file, unless another process has done it meanwhile.

    Raises:
        ValueError: The model is another than the specification says.
    """
    if specification["code"] != code_version():
        raise ValueError("litgpt's sources have changed while it runs")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if path.exists():
            return
        torch.set_num_threads(specification["threads"])
        step, example = _step_and_example(specification)
        dtype = getattr(torch, specification["dtype"])
        tokens, state = {}, [{}]  # lengths, then tables, keys and values
        any_size = torch.export.Dim.DYNAMIC
        of_cache = {1: any_size}
        if isinstance(step, ReadStep):
            tokens, state, of_cache = {0: any_size, 1: any_size}, [{0: any_size}] * 2, {0: any_size, 1: any_size}
            kernels = skinny_gemm.use_for_prefill(step.model, dtype)
        else:
            kernels = skinny_gemm.use(step.model, specification["rows"], dtype)
        state = [*state, *[of_cache] * (len(example[2]) - len(state))]
        with torch.no_grad():
            program = torch.export.export(step, example, dynamic_shapes=(tokens, tokens, state, {0: any_size}))
            with atomic_file(path) as temporary:
                options = OPTIONS | {"aot_inductor.custom_ops_to_c_shims": kernels}
                made = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(temporary.with_suffix(".pt2")), inductor_configs=options
                )
                tokens, positions, state, reach = example
                Program(made, step.model)(tokens, positions, state, reach.size(0))  # what does not run is not kept
                os.replace(made, temporary)


def _step_and_example(
    specification: Specification,
) -> tuple[DecodeStep, tuple[Tensor, Tensor, list[Tensor], Tensor]]:
    """The step of such a model, and arguments of its `forward`. Weights have addresses, but no memory is filled."""
    dtype = getattr(torch, specification["dtype"])
    with torch.device("meta"):
        model = GPT(Config(**specification["config"])).eval()
    if specification["quantize"]:
        replace_linears(model, specification["quantize"], dtype)
    model.to(dtype).to_empty(device="cpu")
    model.rope = RotaryEmbedding(model.config)
    model.tie_weights()
    model.layer_cache = layer_cache_of(specification["kv_cache"])
    weights = described_weights(model)
    if weights != specification["weights"]:
        different = sorted(set(map(str, weights.items())) ^ set(map(str, specification["weights"].items())))
        raise ValueError(f"the model is not as its configuration says: {different[0]}")
    rows, tokens = specification["rows"] or 3, 1 if specification["rows"] else 16
    held = rows if specification["rows"] else 5
    cache = model.new_cache(
        held, min(model.config.block_size, 1000), dtype=getattr(torch, specification["cache_dtype"])
    )
    cache.is_empty = False
    cache.max_length = model.config.block_size  # its tensors may be of any length
    ones = torch.ones(rows, tokens, dtype=torch.int64)
    reach = torch.empty(max(2, next(iter(cache.rings.values())).length // 2), dtype=torch.int8)
    if specification["rows"]:
        return DecodeStep(model, cache), (ones, ones.clone(), [cache.lengths, *cache.tensors()], reach)
    state = [torch.arange(rows), cache.lengths[:rows], *cache.tensors()]
    return ReadStep(model, cache), (ones, torch.arange(tokens).repeat(rows, 1), state, reach)


@contextmanager
def _locked(path: Path):
    """Lets one process at a time in, where the system can do it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Compiles what is specified on standard input, for `compile_elsewhere`."""
    specification = json.loads(sys.stdin.read())
    if hasattr(os, "nice"):
        os.nice(PRIORITY)
    with tempfile.TemporaryDirectory(prefix="litgpt-compile-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        except Exception:
            print("there is no C++ compiler. Install g++ or clang++, or set CXX")
            return 1
        try:
            compile_step(specification, Path(sys.argv[1]))
        except Exception as error:  # whatever it is, it is the other process's user who is to be told
            print(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
