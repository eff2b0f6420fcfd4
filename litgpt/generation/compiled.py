"""The decode step as machine code: compiled in the background, kept on disk, used from the moment it is there.

One token at a time, a small model spends half its time between its kernels, and a third where it reads prompts; so that
is compiled, too, once for all numbers of rows and tokens. `torch.export` writes the step down once,
with the cache's tensors as arguments that it changes, and AOTInductor makes a library of it. The library holds no
weights: it is given those of the model. So it is small (4 MB for 30 layers), serves every checkpoint of the shape, and
costs no memory. Another process compiles it, which takes a minute; until then, and where it cannot be, the model itself
makes the tokens. The next run finds the library on disk and loads it in a moment.

    key    the model's shape, types and quantisation; rows; threads; versions of torch and of this code; the CPU
    value  LITGPT_CACHE_DIR/compiled/<key>.pt2, whole or not there

The length of the cache and how much of it is read are arguments, so one library does for all lengths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import litgpt
from litgpt.checkpoint import atomic_file
from litgpt.config import Config
from litgpt.generation import few_rows
from litgpt.model import GPT, KVCache, LLaMAMoE, RotaryEmbedding, positions_or_default
from litgpt.quantize import QuantizedLinear, quantized_layers, replace_linears
from litgpt.resources import cache_directory
from litgpt.weight_only import GROUP, Int4Weight, WeightOnly

AFTER = 32  # steps of so many rows that are made before their compilation is begun: a short answer is not worth it
READING = 0  # in the place of a number of rows: the code that reads prompts, of any number of rows
PRIORITY = 10  # niceness of the process that compiles
OPTIONS = {"aot_inductor.package_constants_in_so": False}  # the weights stay with the model


def decoder(model: GPT, say: Callable[[str], None] | None = None) -> Callable[..., Tensor]:
    """A model's forward for decoding: `decoder(tokens (B, 1), positions (B, 1), cache=...) -> (B, 1, V)`.

    Args:
        model: In eval mode, on its device, with its weights. They may change in place, but not be put elsewhere.
        say: Is told what is being compiled, or why nothing is; default: prints to stderr.
    """
    device = model.transformer["wte"].weight.device
    if device.type == "cpu":
        return CompiledDecoder(model, say=say)
    # On a GPU launching the kernels one by one takes longest: as a graph they are launched together.
    compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")
    known: set[int] = set()

    def decode(tokens: Tensor, positions: Tensor, *, cache: KVCache) -> Tensor:
        if tokens.size(0) not in known:
            known.add(tokens.size(0))
            (say or _print)(f"Compiling {_purpose(tokens.size(0))} with torch.compile: its first tokens wait for that.")
        return compiled(tokens, positions, cache=cache)

    return decode


class CompiledDecoder:
    """Decodes on a CPU with compiled code where it is there already, and with the model where it is not.

    Args:
        model: As for `decoder`.
        after: How many steps of a number of rows are made before its compilation begins.
        say: As for `decoder`, in another thread.
    """

    def __init__(self, model: GPT, *, after: int = AFTER, say: Callable[[str], None] | None = None) -> None:
        self.model = model
        self.after = after
        self._say = say or _print
        self._calls: Counter[int] = Counter()
        self._paths: dict[tuple[int, torch.dtype], Path] = {}
        self._threads: dict[tuple[int, torch.dtype], threading.Thread] = {}
        self._programs: dict[tuple[int, torch.dtype], Program] = {}
        self._turn = threading.Lock()  # one compilation at a time
        self._failed = False
        # Weakly: a cache that the engine has let go of is not to stay in memory.
        self._states: WeakKeyDictionary[KVCache, list[Tensor]] = WeakKeyDictionary()
        self._fits = why_not(model)
        self._reads = self._fits is None and reads_compiled(model)
        if self._fits is not None:
            self._fail(self._fits)

    def __call__(self, tokens: Tensor, positions: Tensor, *, cache: KVCache) -> Tensor:
        """(B, 1) tokens at (B, 1) positions, -1 for idle rows -> (B, 1, V) logits."""
        state = self._tensors_of(cache)
        if state is None:
            return self.model(tokens, positions, cache=cache)
        program = self._program((tokens.size(0), state[-1].dtype))
        if program is None:
            return self.model(tokens, positions, cache=cache)
        return program(tokens, positions, state, read_length(cache))

    def hidden_states(self, tokens: Tensor, positions: Tensor | None, *, cache: KVCache) -> Tensor:
        """As `GPT.hidden_states`, for prompts: (B, T) tokens at (B, T) positions, -1 for padding -> (B, T, C)."""
        tensors, program = list(cache.tensors()), None
        if self._reads and not torch.is_autocast_enabled("cpu"):
            program = self._program((READING, tensors[-1].dtype))
        if program is None:
            return self.model.hidden_states(tokens, positions, cache=cache)
        rows = next(iter(cache.rings.values())).rows[:, 0]
        if cache.is_empty:
            for ring in cache.rings.values():
                ring.table[rows] = -1
            cache.is_empty = False
        positions = positions_or_default(tokens, positions).contiguous()
        return program(tokens, positions, [rows, cache.lengths, *tensors], read_length(cache))

    def load(self, numbers: Iterable[int]) -> None:
        """Loads in the background what is on disk already, for these numbers of rows and for reading, before the first
        step asks."""
        if self._fits is not None:
            return
        for rows in (*numbers, READING) if self._reads else numbers:
            kind = rows, self.model.transformer["wte"].weight.dtype
            if self._path(kind).exists():
                self._start(kind)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for what is being compiled or loaded; whether any compiled code is there."""
        for thread in list(self._threads.values()):
            thread.join(timeout)
        return bool(self._programs)

    def _tensors_of(self, cache: KVCache) -> list[Tensor] | None:
        """What the step changes, of the rows that the call is about; None where the step is not for such a call."""
        if self._fits is not None or cache.is_empty or torch.is_autocast_enabled("cpu"):
            return None
        if (state := self._states.get(cache)) is None:
            chosen = next(iter(cache.rings.values())).chosen
            if not isinstance(chosen, slice):
                return None
            state = self._states[cache] = [cache.lengths, *(tensor[chosen] for tensor in cache.tensors())]
        return state

    # -- in the background

    def _program(self, kind: tuple[int, torch.dtype]) -> Program | None:
        """The code if it is there. If not, has it loaded if it is on disk, or compiled once it is worth it."""
        if kind not in self._programs:
            self._calls[kind[0]] += 1
            self._begin(kind)
        return self._programs.get(kind)

    def _begin(self, kind: tuple[int, torch.dtype]) -> None:
        if kind in self._threads or self._failed:
            return
        if self._calls[kind[0]] >= self.after or self._path(kind).exists():
            self._start(kind)

    def _path(self, kind: tuple[int, torch.dtype]) -> Path:
        if kind not in self._paths:
            self._paths[kind] = path_of(specification(self.model, *kind))
        return self._paths[kind]

    def _start(self, kind: tuple[int, torch.dtype]) -> None:
        self._threads[kind] = threading.Thread(target=self._prepare, args=[kind], name="compile", daemon=True)
        self._threads[kind].start()

    def _prepare(self, kind: tuple[int, torch.dtype]) -> None:
        path = self._path(kind)
        with self._turn:
            if self._failed:
                return
            try:
                program = self._load(path)
                if program is None:  # not there, or damaged
                    path.unlink(missing_ok=True)
                    purpose, began = _purpose(kind[0]), time.monotonic()
                    self._say(
                        f"Compiling {purpose}: C++ for this CPU, in the background. It takes a minute or two, once; "
                        "later runs find the code."
                    )
                    compile_elsewhere(specification(self.model, *kind), path)
                    program = Program(path, self.model)
                    self._say(f"Compiled {purpose} ({time.monotonic() - began:.0f} s).")
                self._programs[kind] = program
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                self._fail(reason, reading=kind[0] == READING)

    def _load(self, path: Path) -> Program | None:
        try:
            return Program(path, self.model) if path.exists() else None
        except (OSError, RuntimeError, ValueError):
            return None

    def _fail(self, reason: str, reading: bool = False) -> None:
        self._reads = False
        self._failed = self._failed or not reading
        what = "Reading prompts" if reading else "Decoding"
        self._say(f"{what} is not compiled: {reason.rstrip('.')}. It goes on uncompiled, at a lower speed.")


def _purpose(rows: int) -> str:
    """What the code for so many rows is for."""
    if rows == READING:
        return "the reading of prompts"
    return f"the writing of {rows} answers at a time" if rows > 1 else "the writing of one answer at a time"


class Program:
    """Compiled code from a file, with the weights of a model.

    Raises:
        OSError, RuntimeError, ValueError: The file is damaged, or is of another model.
    """

    def __init__(self, path: str | Path, model: GPT) -> None:
        if (damaged := _damaged(path)) is not None:  # it would be loaded, and run
            raise ValueError(f"'{path}' is damaged: {damaged}")
        few_rows.has_tiles()  # the system lets a process use them that has asked
        self._run = torch._inductor.aoti_load_package(str(path))
        self._flat = getattr(self._run.loader, "boxed_run", self._run.loader.run)
        held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        held = {f"model.{name}": tensor.detach() for name, tensor in held.items()}
        names = self._run.get_constant_fqns()
        unknown = [name for name in names if name not in held]
        if len(unknown) == sum(isinstance(module, Int4Weight) for module in model.modules()):
            # inductor hands the kernel the size of the groups as a tensor, and counts each among the weights
            held |= dict.fromkeys(unknown, torch.tensor(GROUP))
        elif unknown:
            raise ValueError(f"the compiled code asks for {unknown[0]}, which the model does not have")
        self._weights = {name: held[name] for name in names}  # the library has their addresses only
        self._run.load_constants(self._weights, check_full_update=True, user_managed=True)

    def __call__(self, tokens: Tensor, positions: Tensor, state: list[Tensor], length: int) -> Tensor:
        # `self._run(...)` would read the description of its arguments anew at every call: 1.7 ms, a tenth of a step.
        return self._flat([tokens, positions, *state, torch.empty(length, dtype=torch.int8)])[0]


def _damaged(path: str | Path) -> str | None:
    """Which part of a package is not as it was written; None if all are."""
    try:
        with zipfile.ZipFile(path) as package:
            return package.testzip()
    except zipfile.BadZipFile as error:
        return str(error)


def read_length(cache: KVCache) -> int:
    """How many slots of the layers without a window are read."""
    ring = cache.rings.get(None)
    if ring is None:
        return 2  # nobody asks
    return ring.table.size(1) if ring.read_length is None else ring.read_length


# --- what is compiled ------------------------------------------------------------------------------------------------


def why_not(model: GPT) -> str | None:
    """Why the step of such a model cannot be compiled; None if it can."""
    layers = {type(layer.quantized) for _, layer in quantized_layers(model)}
    if any(not issubclass(layer, WeightOnly) for layer in layers):
        return "the weights are quantised by bitsandbytes, whose kernels inductor does not know"
    for module in model.transformer["h"].modules():
        if module._forward_hooks or module._forward_pre_hooks:  # the code would do without what they do
            return "the model is spread over several devices"
    for module in model.modules():
        if isinstance(module, LLaMAMoE):
            return "how many tokens an expert gets is known only while the model runs"
        known = type(module).__module__.startswith(("torch.nn.", "litgpt.model", "litgpt.weight_only"))
        if not known and not isinstance(module, QuantizedLinear):
            return f"the model holds {type(module).__name__} modules. Merge them into the weights first"
    return None


def reads_compiled(model: GPT) -> bool:
    """Whether the code that reads prompts can be compiled, and is worth it, where that of the step can.

    Attention that is written out takes the tokens in blocks, latents are better made to heads for many tokens, and
    quantised weights are multiplied in another way.
    """
    config = model.config
    written_out = config.attention_logit_softcapping is not None or config.attention_sinks
    return not written_out and config.latent_attention is None and not any(quantized_layers(model))


def specification(model: GPT, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """All that the compiled code of a step depends on, as JSON has it.

    Args:
        model: The model.
        rows: How many rows the step has, or READING.
        dtype: The type of keys and values.
    """
    weights = [layer.quantized for _, layer in quantized_layers(model)]
    kind = "int4" if any(isinstance(weight, Int4Weight) for weight in weights) else "int8"  # int4's head is in int8
    abilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "config": dataclasses.asdict(model.config),
        "quantize": kind if weights else None,
        "weights": {name: [list(t.shape), _name(t.dtype)] for name, t in model.state_dict().items()},
        "dtype": _name(model.transformer["wte"].weight.dtype),
        "cache_dtype": _name(dtype),
        "rows": rows,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": [torch.backends.cpu.get_cpu_capability(), {name: str(value) for name, value in abilities.items()}],
        "code": _code_version(),
    }


def path_of(specification: dict[str, Any]) -> Path:
    """Where the code of a step is kept."""
    digest = hashlib.sha256(json.dumps(specification, sort_keys=True, default=str).encode()).hexdigest()
    return cache_directory() / "compiled" / f"{digest[:32]}.pt2"


@cache
def _code_version() -> str:
    """A digest of the sources that the step is made from."""
    folder = Path(litgpt.__file__).parent
    sources = ("model.py", "quantize.py", "weight_only.py", "config.py")
    sources = (*sources, "generation/compiled.py", "generation/few_rows.py", "generation/few_rows.h")
    return hashlib.sha256(b"".join((folder / source).read_bytes() for source in sources)).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class DecodeStep(nn.Module):
    """One token for each of some rows, as a function of tensors alone.

    Args:
        model: The model.
        cache: One of the model's, of so many rows; its tensors are not used.
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
            reach: Of so many values as attention reads slots of the cache.
        """
        lengths, *tensors = state
        if isinstance(self.model.transformer["wte"], few_rows.FewRowsEmbedding):
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


# --- the process that compiles ---------------------------------------------------------------------------------------


def compile_elsewhere(specification: dict[str, Any], path: Path) -> None:
    """Has another process compile a step. It outlives this one, so that a short run leaves something to the next.

    Raises:
        ValueError: It could not be compiled; says why.
        OSError: There is no process to be had.
    """
    folder = str(Path(litgpt.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
    process = subprocess.Popen(
        [sys.executable, "-m", "litgpt.generation.compiled", str(path)],
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


def compile_step(specification: dict[str, Any], path: Path) -> None:
    """Compiles a step and puts it into a file, unless another process has done it meanwhile.

    Raises:
        ValueError: The model is another than the specification says.
    """
    if specification["code"] != _code_version():
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
            kernels = few_rows.use_to_read(step.model, dtype)
        else:
            kernels = few_rows.use(step.model, specification["rows"], dtype)
        state = [*state, *[of_cache] * (len(example[2]) - len(state))]
        with torch.no_grad():
            program = torch.export.export(step, example, dynamic_shapes=(tokens, tokens, state, {0: any_size}))
            with atomic_file(path) as temporary:
                options = OPTIONS | {"aot_inductor.custom_ops_to_c_shims": kernels}
                made = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(temporary.with_suffix(".pt2")), inductor_configs=options
                )
                Program(made, step.model)(*example[:3], example[3].size(0))  # what does not run is not kept
                os.replace(made, temporary)


def _step_and_example(specification: dict[str, Any]) -> tuple[DecodeStep, tuple[Any, ...]]:
    """The step of such a model, and arguments of it. Weights have addresses, but no memory is filled."""
    dtype = getattr(torch, specification["dtype"])
    with torch.device("meta"):
        model = GPT(Config(**specification["config"])).eval()
    if specification["quantize"]:
        replace_linears(model, specification["quantize"], dtype)
    model.to(dtype).to_empty(device="cpu")
    model.rope = RotaryEmbedding(model.config)
    model.tie_weights()
    weights = {name: [list(t.shape), _name(t.dtype)] for name, t in model.state_dict().items()}
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


_speaking = threading.Lock()
_waiting: list[str] | None = None  # notes, while an answer is printed


@contextmanager
def notes_wait() -> Iterator[None]:
    """Within `with` an answer is being printed: a note that goes to stderr would stand in the middle of it, so it waits
    until the end."""
    global _waiting
    with _speaking:
        _waiting = []
    try:
        yield
    finally:
        with _speaking:
            notes, _waiting = _waiting, None
        sys.stdout.flush()
        for note in notes:
            _print(note)


def _print(text: str) -> None:
    with _speaking:
        if _waiting is None:
            print(text, file=sys.stderr, flush=True)
        else:
            _waiting.append(text)


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
