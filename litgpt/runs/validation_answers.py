"""Answers of a model that is being finetuned to validation samples: one to read, and as many as wanted to be scored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from litgpt.data.sft import SFTData
from litgpt.devices.precision import PRECISIONS
from litgpt.generation.in_training import complete_in_training
from litgpt.generation.request import Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT
from litgpt.parallel.fabric import precision_of
from litgpt.parallel.ranks import gathered_objects
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.answer_metrics import AnswerMetrics
from litgpt.training.arguments import EvalArgs
from litgpt.training.console import Console
from litgpt.training.loop import Generated

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class ValidationAnswers:
    """Answers greedily, up to the end of the turn; the samples are shared out among the ranks.

    Args:
        fabric: The devices, launched.
        console: Where to say what could not be scored.
        data: Set up.
        tokenizer: The model's.
        evaluation: Which samples, how many tokens.
        metrics: What scores the answers; if there are none, no more than the sample to read is answered.
        context: The most tokens that the model takes at once.

    Raises:
        ValueError: There is no such sample, or nothing that the metrics could score.
    """

    def __init__(
        self,
        fabric: Fabric,
        console: Console,
        data: SFTData,
        tokenizer: Tokenizer,
        evaluation: EvalArgs,
        metrics: AnswerMetrics,
        context: int,
    ) -> None:
        self.fabric, self.console, self.data, self.tokenizer = fabric, console, data, tokenizer
        self.evaluation, self.metrics, self.context = evaluation, metrics, context
        shown, count = evaluation.evaluate_example, data.num_examples
        if isinstance(shown, int) and count and shown >= count:
            raise ValueError(f"eval.evaluate_example={shown}: there are {count} validation samples, from 0 on.")
        self.replies: dict[int, list[int]] = self._whole_replies() if metrics.metrics else {}
        """The samples that are scored, and what their answers should be"""
        self.references = [self._text(ids) for ids in self.replies.values()]

    @property
    def is_wanted(self) -> bool:
        """Whether anything is to be generated."""
        return bool(self.evaluation.max_new_tokens and self.data.num_examples)

    @property
    def _max_new_tokens(self) -> int:
        assert self.evaluation.max_new_tokens is not None, "nothing is generated where there is no limit"
        return self.evaluation.max_new_tokens

    def describe(self) -> str:
        """What is scored and how, in one line."""
        most, count = self._max_new_tokens, len(self.replies)
        line = (
            f"Metrics: after each validation {count:,} of {self.data.num_examples:,} validation samples are answered, "
            f"with at most {most} tokens, and scored: {', '.join(self.metrics.higher_is_better)}."
        )
        longer = sum(len(reply) > most for reply in self.replies.values())
        if longer:
            line += f" {longer:,} of the replies are longer than that; --eval.max_new_tokens gives answers more room."
        return line

    def generate(self, module: nn.Module, gpt: GPT) -> Generated:
        """Has the model answer. Every rank must call this.

        Args:
            module: What is trained, around the model.
            gpt: The model.
        """
        rank, world_size, wanted = self.fabric.global_rank, self.fabric.world_size, list(self.replies)
        shown = self._shown()
        mine = wanted[rank::world_size]
        if rank == 0 and shown not in mine:
            mine.append(shown)
        stops = self.data.style.stop_sequences(self.tokenizer)
        requests = [
            Request(self._prompt(index), self._max_new_tokens, Sampling(temperature=0, seed=0), stops) for index in mine
        ]
        _, autocast = PRECISIONS[precision_of(self.fabric)]
        progress = "Answering validation samples" if rank == 0 else None
        written = complete_in_training(gpt, requests, within=module, autocast=autocast, progress=progress)
        answers = {index: self.tokenizer.decode(ids) for index, ids in zip(mine, written, strict=True)}
        asked = self.data.example(shown)[-1:]  # nothing where the conversation begins with the reply
        text = f"{''.join(one['content'] for one in asked)}\n-> {answers[shown]}" if rank == 0 else ""
        if not wanted:
            return Generated(text)
        for others in gathered_objects(self.fabric, answers):
            answers |= others
        return Generated(text, self._score([answers[index] for index in wanted]))

    def _score(self, answers: Sequence[str]) -> dict[str, float | None]:
        """The figures, computed on rank 0, so that the ranks decide by the same."""
        figures: dict[str, float | None] = {}
        if self.fabric.global_rank == 0:
            figures, problems = self.metrics.score(answers, self.references)
            for problem in problems:
                self.console.print(problem)
        return self.fabric.broadcast(figures)

    def _whole_replies(self) -> dict[int, list[int]]:
        if not self.evaluation.max_new_tokens:
            raise ValueError(
                "`eval.metrics` scores answers, and eval.max_new_tokens=null generates none. Set it to the most "
                "tokens of an answer."
            )
        if not self.data.num_examples:
            raise ValueError("`eval.metrics`: there is no validation data. Add some, or leave it out.")
        replies: dict[int, list[int]] = {}
        for index in range(self.data.num_examples):
            reply = self.data.example_reply(index)
            if reply is not None and len(self.data.example_prompt(index)) < self.context:
                replies[index] = reply
            if len(replies) == self.evaluation.max_answers:
                break
        if not replies:
            raise ValueError(
                f"`eval.metrics`: of all {self.data.num_examples:,} validation samples the reply was cut off, so there "
                "is nothing to compare answers with. Set a larger `train.max_seq_length`."
            )
        return replies

    def _shown(self) -> int:
        """The sample whose answer is printed."""
        shown = self.evaluation.evaluate_example
        if shown == "random":  # drawn on every rank, whose numbers stay the same
            return random.randrange(self.data.num_examples)
        return 0 if shown == "first" else int(shown)

    def _prompt(self, index: int) -> list[int]:
        return self.data.example_prompt(index)[: self.context - 1]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)
