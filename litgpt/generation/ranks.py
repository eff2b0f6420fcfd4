"""An engine on every rank of a model that is split over several processes: rank 0 leads, the others do as it does."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.generation.engine import Engine
from litgpt.generation.request import Output, Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT

FOREVER = timedelta(days=365)  # how long the others wait for the next request


class Ranks:
    """What rank 0 tells the others, on a channel of its own. Making one is collective."""

    def __init__(self) -> None:
        self.leads = dist.get_rank() == 0
        self._group = dist.new_group(backend="gloo", timeout=FOREVER)

    def tell(self, news: Any) -> Any:
        """On rank 0, what the others get to know; there, what rank 0 tells. Plain values."""
        box = [news]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


class RankEngine(Engine):
    """The engine of one rank. All of them hold the same requests and make the same steps at the same time.

    Rank 0's is used like any engine. The others' `follow` until it tells them None. Only rank 0 draws tokens, so that
    no difference in rounding can lead the ranks apart.

    Args:
        model: This rank's part of the model (`litgpt.tensor_parallel`).
        ranks: The channel between them.
        options: As for `Engine`, the same on all ranks.
    """

    def __init__(self, model: GPT, ranks: Ranks, **options: Any) -> None:
        super().__init__(model, **options)
        self.ranks = ranks
        self._news: list[tuple[str, Any]] = []  # that the others get to know with the next step

    def submit(self, request: Request) -> int:
        number = super().submit(request)
        stops = [list(stop) for stop in request.stops]
        self._news.append(("submit", (list(request.prompt), request.max_new_tokens, stops)))
        return number

    def cancel(self, number: int) -> None:
        super().cancel(number)
        self._news.append(("cancel", number))

    def forget(self) -> None:
        super().forget()
        self._news.append(("forget", None))

    def step(self) -> list[Output]:
        if self.ranks.leads:
            news, self._news = self._news, []
            self.ranks.tell(news)
        return super().step()

    def follow(self) -> None:
        """Does as rank 0 does, until that tells None."""
        while (news := self.ranks.tell(None)) is not None:
            for what, about in news:
                if what == "submit":
                    prompt, count, stops = about
                    super().submit(Request(prompt, count, Sampling(0), stops, seed=0))
                elif what == "cancel":
                    super().cancel(about)
                else:
                    super().forget()
            self.step()

    def _draw(self, logits: Tensor, slots: list, sampler: Any) -> tuple[Tensor, list]:
        if self.ranks.leads:
            tokens, logprobs = super()._draw(logits, slots, sampler)
        else:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
            logprobs = [None] * len(slots)
        dist.broadcast(tokens, src=0)
        return tokens, logprobs
