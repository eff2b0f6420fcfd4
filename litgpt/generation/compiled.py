"""The decode step as machine code: compiled in the background, kept on disk, used from the moment it is there."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from litgpt.generation.compile_notes import say_note
from litgpt.generation.compile_step import compile_elsewhere
from litgpt.generation.compiled_program import Program, path_of, read_length, reads_compiled, specification, why_not
from litgpt.kv_cache import KVCache
from litgpt.model import GPT, positions_or_default

AFTER = 32  # steps of this many rows that are made before their compilation is begun: a short answer is not worth it
READING = 0  # in the place of a number of rows: the code that reads prompts, of any number of rows


def decoder(model: GPT, say: Callable[[str], None] | None = None) -> Callable[..., Tensor]:
    """A model's forward for decoding: `decoder(tokens (B, 1), positions (B, 1), cache=...) -> (B, 1, V)`.

    Args:
        model: In eval mode, on its device, with its weights. They may change in place, but not be put elsewhere.
        say: Is told what is being compiled, or why nothing is; default: prints to stderr.
    """
    device = model.transformer.wte.weight.device
    if device.type == "cpu":
        return CompiledDecoder(model, say=say)
    # On a GPU launching the kernels one by one takes longest: as a graph they are launched together.
    compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")
    known: set[int] = set()

    def decode(tokens: Tensor, positions: Tensor, *, cache: KVCache) -> Tensor:
        if tokens.size(0) not in known:
            known.add(tokens.size(0))
            (say or say_note)(
                f"Compiling {_purpose(tokens.size(0))} with torch.compile: its first tokens wait for that."
            )
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
        self._say = say or say_note
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
        program = self._program((tokens.size(0), cache.dtype))
        if program is None:
            return self.model(tokens, positions, cache=cache)
        return program(tokens, positions, state, read_length(cache))

    def hidden_states(self, tokens: Tensor, positions: Tensor | None, *, cache: KVCache) -> Tensor:
        """As `GPT.hidden_states`, for prompts: (B, T) tokens at (B, T) positions, -1 for padding -> (B, T, C)."""
        tensors, program = list(cache.tensors()), None
        if self._reads and not torch.is_autocast_enabled("cpu"):
            program = self._program((READING, cache.dtype))
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
            kind = rows, self.model.transformer.wte.weight.dtype
            if self._path(kind).exists():
                self._start(kind)

    def prepare(self, numbers: Iterable[int]) -> bool:
        """Has the code for these numbers of rows and for reading made, or loaded, and waits for it; as `wait`."""
        for rows in (*numbers, READING) if self._reads else numbers:
            kind = rows, self.model.transformer.wte.weight.dtype
            if kind not in self._threads and not self._failed:
                self._start(kind)
        return self.wait()

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
    """What the code for this many rows is for."""
    if rows == READING:
        return "the reading of prompts"
    return f"the writing of {rows} answers at a time" if rows > 1 else "the writing of one answer at a time"
