"""Calls of the model: a chunk of several prompts (prefill), a token of each running sequence (decode); and what becomes
of its logits: the next tokens, and log-probabilities.

Shapes: S sequences, B rows of the KV cache, T tokens of a chunk, C the width of the model, V the padded vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt.cli.notes import say_note
from litgpt.generation.kv_cache_manager import limit_attention, power_of_two
from litgpt.generation.request import TokenLogprob
from litgpt.generation.sampling import Sampler
from litgpt.generation.sequence import Sequence
from litgpt.generation.step_program import StepProgram, why_not
from litgpt.kernels import native
from litgpt.kv_cache import KVCache
from litgpt.model import GPT

SCORE_CHUNK = 256  # tokens of prompts whose logits are there at a time


@dataclass
class DecodeBatch:
    """The rows that one decode step runs, and what it needs of them on the device. It serves until others run."""

    numbers: list[int]
    """Those of the sequences."""
    cache: KVCache
    tokens: Tensor
    """(B, 1) the last token of each row."""
    positions: Tensor
    """(B, 1) where it stands, -1 for idle rows between those of the sequences."""
    rows: Tensor
    """(S,) which of the rows are those of the sequences."""
    sampler: Sampler

    def __post_init__(self) -> None:
        self.is_full = self.rows.tolist() == list(range(self.tokens.size(0)))


class ModelRunner:
    """Runs one model for an engine, which says what.

    Args:
        model: In eval mode, on its device, with its weights.
        compile: Compile the decode step on an accelerator: the first tokens wait for it. On a CPU the kernels that
            come with litgpt do the step, whatever this says.
        autocast: A dtype to compute in where the weights are kept in another.
        max_slots: How many sequences decode at a time, at most.

    Attributes:
        decode_step: `(tokens (B, 1), positions (B, 1), cache=...) -> (B, 1, V)` logits.
        hidden_states: As `GPT.hidden_states`, for prompts.
        has_one_shape: Whether the decode step is compiled anew for each length that attention reads.
    """

    def __init__(self, model: GPT, *, compile: bool, autocast: torch.dtype | None, max_slots: int) -> None:
        self.model, self.autocast = model, autocast
        self.device = model.transformer.wte.weight.device  # the head may have been replaced
        self.decode_step: Callable[..., Tensor] = model
        self.hidden_states: Callable[..., Tensor] = model.hidden_states
        self.has_one_shape = False
        self._program: StepProgram | None = None
        if has_kernels(self.device):
            if (reason := why_not(model)) is None:
                self._program = self.decode_step = StepProgram(model)
                self.hidden_states = self._program.hidden_states
            elif compile:
                say_note(f"Decoding runs layer by layer: {reason}.")
        elif compile:
            from litgpt.generation.compiled import decoder

            self.decode_step = decoder(self.model)
            self.has_one_shape = True  # what torch.compile makes is for the shapes that it has seen
        self._batch: DecodeBatch | None = None  # that of the last step

    def prepare(self) -> None:
        """Wait for the kernels, where they have to be built first."""
        if self._program is not None:
            native.library()

    # -- prefill

    def prefill(self, cache: KVCache, sequences: list[Sequence], rows: list[int], chunks: list[list[int]]) -> Tensor:
        """Run the next chunk of each prompt, padded to the longest.

        Args:
            cache: All rows; keys and values are added to it.
            sequences: Whose prompts; where they stand is their `num_prefilled`.
            rows: (S) the rows of the cache that they have.
            chunks: (S lists) the tokens.

        Returns:
            (S, T, C) hidden states.
        """
        starts, width = [sequence.num_prefilled for sequence in sequences], max(map(len, chunks))
        idx = torch.tensor([[*chunk, *[0] * (width - len(chunk))] for chunk in chunks], device=self.device)
        # Where all prompts are whole and as long, the model needs no positions, and takes its fastest attention kernel.
        is_empty = not any(starts)
        positions = None
        if not is_empty or any(len(chunk) < width for chunk in chunks):
            places = ([*range(start, start + len(chunk))] for start, chunk in zip(starts, chunks, strict=True))
            positions = torch.tensor(
                [[*of_row, *[-1] * (width - len(of_row))] for of_row in places], device=self.device
            )
        chosen = slice(rows[0], rows[0] + 1) if len(rows) == 1 else torch.tensor(rows, device=self.device)
        selected = cache.select(chosen, is_empty)
        self._limit_attention(selected, max(starts) + width)
        with self._precision():
            return self.hidden_states(idx, positions, cache=selected)

    def score_prompts(self, hidden: Tensor, sequences: list[Sequence], chunks: list[list[int]]) -> None:
        """Note the log-probabilities that requests ask for of tokens which come after those of a chunk.

        Args:
            hidden: (S, T, C) hidden states that `prefill` gave.
            sequences: Whose prompts; their `num_prefilled` is still where the chunks begin.
            chunks: (S lists) the tokens.
        """
        rows, columns, scored = [], [], []  # of the tokens that predict, and those that are predicted
        for row, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True)):
            request, start = sequence.request, sequence.num_prefilled
            if request.score_from is None:
                continue
            first, end = max(start + 1, request.score_from), min(start + len(chunk) + 1, len(request.prompt))
            wanted = [(place, request.prompt[place]) for place in range(first, end)]
            if end == len(request.prompt):
                wanted += [(end - 1, token) for token in request.alternatives]
            for place, token in wanted:
                rows.append(row)
                columns.append(place - 1 - start)
                scored.append(token)
        count = max((sequences[row].request.logprobs or 0 for row in rows), default=0)
        for first in range(0, len(rows), SCORE_CHUNK):
            part = slice(first, first + SCORE_CHUNK)
            with self._precision():
                logits = self.model.logits(hidden[rows[part], columns[part]])  # (N, V)
            logprobs = token_logprobs(logits.float(), torch.tensor(scored[part], device=self.device), count)
            for row, logprob in zip(rows[part], logprobs, strict=True):
                sequences[row].prompt_logprobs.append(logprob)

    def first_tokens(
        self, ends: list[Tensor], sequences: list[Sequence]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """The first token of each answer, from the hidden states after the prompts' last tokens, (C,) each."""
        if not sequences:
            return [], []
        with self._precision():
            logits = self.model.logits(torch.stack(ends))  # (S, V)
        tokens, logprobs = self.sample(logits, sequences, self._sampler(sequences))
        return tokens.tolist(), logprobs

    # -- decode

    def decode(
        self, cache: KVCache, sequences: list[Sequence], rows: list[int]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """The next token of each sequence, and its log-probability where the request asks for it.

        Args:
            cache: All rows; the keys and values of the last tokens are added to it.
            sequences: All that are prefilled.
            rows: (S) the rows of the cache that they have.
        """
        numbers = [sequence.number for sequence in sequences]
        if self._batch is None or self._batch.numbers != numbers:
            self._batch = self._new_batch(cache, sequences, rows)
        batch = self._batch
        self._limit_attention(batch.cache, max(sequence.length for sequence in sequences))
        with self._precision():
            logits = self.decode_step(batch.tokens, batch.positions, cache=batch.cache)[:, -1]  # (B, V)
        tokens, logprobs = self.sample(logits if batch.is_full else logits[batch.rows], sequences, batch.sampler)
        batch.tokens[batch.rows, 0] = tokens
        batch.positions[batch.rows, 0] += 1
        return tokens.tolist(), logprobs

    def release_batch(self) -> None:
        """Let go of the rows of the cache that the last decode step ran."""
        self._batch = None

    def _new_batch(self, cache: KVCache, sequences: list[Sequence], rows: list[int]) -> DecodeBatch:
        """The rows from the first of these to the last, their number a power of two: few distinct shapes."""
        first, last = min(rows), max(rows)
        count = min(power_of_two(last - first + 1), cache.batch_size)
        first = min(first, cache.batch_size - count)
        tokens, positions = torch.zeros(count, 1, dtype=torch.int64), torch.full((count, 1), -1)
        for sequence, row in zip(sequences, rows, strict=True):
            tokens[row - first] = sequence.last_token
            positions[row - first] = sequence.length - 1
        return DecodeBatch(
            [sequence.number for sequence in sequences],
            cache.select(slice(first, first + count)),
            tokens.to(self.device),
            positions.to(self.device),
            torch.tensor([row - first for row in rows], device=self.device),
            self._sampler(sequences),
        )

    # -- sample

    def sample(
        self, logits: Tensor, sequences: list[Sequence], sampler: Sampler
    ) -> tuple[Tensor, list[TokenLogprob | None]]:
        """The next token of each sequence, (S,) int64 on the device, from (S, V) logits; and its log-probability where
        the request asks for it."""
        logits = logits.float()
        processed = logits
        if any(sequence.changes_logits for sequence in sequences):
            rows = zip(sequences, logits, strict=True)
            processed = torch.stack([sequence.process_logits(row) for sequence, row in rows])
        tokens = sampler(processed)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.count_token(token)
        counts = [sequence.request.logprobs for sequence in sequences]
        return tokens, [
            None if count is None else token_logprobs(row[None], token[None], count)[0]
            for count, row, token in zip(counts, logits, tokens, strict=True)
        ]

    def _sampler(self, sequences: list[Sequence]) -> Sampler:
        samplings = [sequence.request.sampling for sequence in sequences]
        return Sampler(samplings, [sequence.generator for sequence in sequences], self.device)

    # -- both calls

    def _limit_attention(self, cache: KVCache, length: int) -> None:
        if self.has_one_shape:
            cache.read_only(None)
        else:
            limit_attention(cache, length)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return precision(self.device, self.autocast)


def has_kernels(device: torch.device) -> bool:
    """Whether litgpt brings kernels for the decode step on a device of that type."""
    return device.type == "cpu"


def precision(device: torch.device, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Compute in `autocast` within, or as the weights are."""
    return contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> list[TokenLogprob]:
    """What to tell of (N,) tokens where the (N, V) logits stood, and of the `count` likeliest in their places."""
    # Not `logsumexp`, though that is nearer to the truth: on a CPU the sums of `log_softmax` are 1e-5 off for each
    # token, all to one side, and figures are compared with those of others, who use it.
    logprobs = logits.log_softmax(dim=-1)
    # A maximum takes a fraction of the time of a selection.
    values, ids = logprobs.max(dim=-1, keepdim=True) if count == 1 else logprobs.topk(count)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    top = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, list(zip(*pair, strict=True)))
        for token, logprob, pair in zip(tokens.tolist(), chosen.tolist(), top, strict=True)
    ]
