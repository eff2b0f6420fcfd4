"""An engine on every rank of a model that is split over several processes: rank 0 leads, the others do as it does."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, Protocol

import torch
from torch import Tensor

from litgpt.generation.engine import Engine
from litgpt.generation.interface import MAX_SLOTS
from litgpt.generation.model_runner import ModelRunner
from litgpt.generation.request import Output, Request, TokenLogprob
from litgpt.generation.sampling import Sampler, Sampling
from litgpt.generation.sequence import Sequence
from litgpt.model import GPT
from litgpt.parallel.process_group import ProcessGroup

News = list[tuple[str, Any]]
"""What rank 0 has done since its last step, in order; plain values."""


class RanksLost(ChildProcessError):
    """A process that has a part of the model is gone, or has lost step with the others: it must be loaded anew."""


class Ranks(Protocol):
    """The processes that have a model's parts, seen from one of them."""

    group: ProcessGroup

    def tell(self, news: News) -> None:
        """On rank 0: lets the others know. Raises RanksLost where one of them is gone."""

    def hear(self) -> News | None:
        """On the others: what rank 0 tells next; None when it needs them no more."""

    def lost(self, error: BaseException) -> RanksLost:
        """On rank 0: ends the others after an error in the middle of what all do; says what has become of them."""

    def check(self) -> None:
        """On rank 0: raises RanksLost where one of the others is gone."""


class RankModelRunner(ModelRunner):
    """The model runner of one rank. Only rank 0 draws tokens, so that no difference in rounding can lead the ranks
    apart; the others are told.

    Args:
        model: This rank's part of the model.
        group: The ranks.
        autocast: As for `ModelRunner`.
        max_slots: As for `ModelRunner`.
    """

    def __init__(self, model: GPT, group: ProcessGroup, *, autocast: torch.dtype | None, max_slots: int) -> None:
        super().__init__(model, compile=False, autocast=autocast, max_slots=max_slots)
        self.group = group

    def sample(
        self, logits: Tensor, sequences: list[Sequence], sampler: Sampler
    ) -> tuple[Tensor, list[TokenLogprob | None]]:
        if self.group.rank == 0:
            tokens, logprobs = super().sample(logits, sequences, sampler)
        else:
            tokens = torch.empty(len(sequences), dtype=torch.int64, device=self.device)
            logprobs: list[TokenLogprob | None] = [None] * len(sequences)
        self.group.broadcast(tokens)
        return tokens, logprobs


class RankEngine(Engine):
    """The engine of one rank. All of them hold the same requests and make the same steps at the same time.

    Rank 0's is used like any engine, while the others `follow`.

    Args:
        model: This rank's part of the model (`litgpt.parallel.tensor_parallel`).
        ranks: The channel between them.
        max_slots, autocast, fixed_length: As for `Engine`; rank 0 lets the others know.
    """

    def __init__(
        self,
        model: GPT,
        ranks: Ranks,
        *,
        max_slots: int = MAX_SLOTS,
        autocast: torch.dtype | None = None,
        fixed_length: int | None = None,
    ) -> None:
        self.ranks, self.leads = ranks, ranks.group.rank == 0
        self._news: News = []
        if self.leads:
            name = autocast and str(autocast).removeprefix("torch.")
            ranks.tell([("engine", (max_slots, name, fixed_length))])
        super().__init__(model, max_slots=max_slots, autocast=autocast, fixed_length=fixed_length)
        in_one_memory = ranks.group.count if self.device.type == "cpu" else 1
        with self._together():  # all must admit the same requests
            self._max_bytes = ranks.group.all_reduce_min(self.cache_bytes / in_one_memory)

    def make_runner(self, max_slots: int) -> ModelRunner:
        return RankModelRunner(self.model, self.ranks.group, autocast=self.autocast, max_slots=max_slots)

    def check(self, request: Request) -> int:
        if self.leads:
            self.ranks.check()
        return super().check(request)

    def submit(self, request: Request) -> int:
        number = super().submit(request)
        stops = [list(stop) for stop in request.stops]
        scoring = request.score_from, list(request.alternatives)
        self._news.append(("submit", (list(request.prompt), request.max_new_tokens, stops, scoring)))
        return number

    def cancel(self, number: int) -> None:
        super().cancel(number)
        self._news.append(("cancel", number))

    def clear_prefix_cache(self) -> None:
        super().clear_prefix_cache()
        self._news.append(("clear_prefix_cache", None))

    def step(self) -> list[Output]:
        if not self.leads:
            return self._step()
        news, self._news = self._news, []
        self.cache_bytes = min(self.cache_bytes, self._max_bytes)
        self.ranks.tell([*news, ("step", (self.max_slots, self.cache_bytes))])
        outputs = self._step()
        self.ranks.check()  # what an aborted exchange has left is no output
        return outputs

    def _step(self) -> list[Output]:
        with self._together():
            return super().step()

    @contextlib.contextmanager
    def _together(self) -> Generator[None, None, None]:
        """What all ranks do at the same time."""
        try:
            with self.ranks.group.together():
                yield
        except BaseException as error:  # here or on another rank: some have stored keys and values that others have not
            if not self.leads:
                raise
            failure = self.ranks.lost(error)
            if isinstance(error, Exception):
                raise failure from error
            raise  # KeyboardInterrupt stays what it is

    def do(self, what: str, about: Any) -> None:
        """On another rank than 0: one of the things that rank 0 has done."""
        if what == "submit":
            prompt, count, stops, (score_from, alternatives) = about
            request = Request(prompt, count, Sampling(0, seed=0), stops)
            request.score_from, request.alternatives = score_from, alternatives
            Engine.submit(self, request)
        elif what == "cancel":
            Engine.cancel(self, about)
        elif what == "clear_prefix_cache":
            Engine.clear_prefix_cache(self)
        else:
            self.max_slots, self.cache_bytes = about
            self.step()


def follow(model: GPT, ranks: Ranks) -> None:
    """What every rank but 0 does: as rank 0 does, until that needs it no more."""
    engine: RankEngine | None = None
    while (news := ranks.hear()) is not None:
        for what, about in news:
            if what == "engine":
                engine = None  # its memory is free before the next one's
                max_slots, name, fixed_length = about
                autocast = name and getattr(torch, name)
                engine = RankEngine(model, ranks, max_slots=max_slots, autocast=autocast, fixed_length=fixed_length)
            else:
                assert engine is not None, "what rank 0 tells first is how to make an engine"
                engine.do(what, about)
