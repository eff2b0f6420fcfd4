"""A run of lm-evaluation-harness: tasks set up as the user says, evaluated, and what is left if it ends early."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.utils import simple_parse_args_string

from litgpt.evaluation.template_lm import EngineLM
from litgpt.evaluation.work import Evaluated

BOOTSTRAPS = 100_000  # of standard errors, the harness's own number


@dataclass
class HarnessOptions:
    """What a user says about tasks; the harness's names."""

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] | None = None
    predict_only: bool = False
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit={self.limit} is not valid: give a number of documents, or a part of them below 1.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot={self.num_fewshot} is not valid: give 0 or more.")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError(
                "`fewshot_as_multiturn` makes turns of a conversation: give apply_chat_template=true, too."
            )


def parse_gen_kwargs(text: str | None) -> dict[str, Any] | None:
    """`temperature=0.7,do_sample=True` or a JSON object as a dict, as the harness reads it.

    Raises:
        ValueError: It is neither.
    """
    if not text:
        return None
    try:
        return dict(simple_parse_args_string(text))
    except Exception:
        raise ValueError(
            f"gen_kwargs={text} is not valid: write name=value,name=value, such as max_gen_toks=64,temperature=0."
        ) from None


class Tasks:
    """Some tasks of the harness.

    Args:
        loaded: As `TaskList.load` gives them.
        options: What the user says about them.
    """

    def __init__(self, loaded: dict[str, Any], options: HarnessOptions) -> None:
        self.loaded, self.options = loaded, options
        self.lm: EngineLM | None = None
        for name, task in loaded["tasks"].items():
            self._configure(name, task)

    def results(self, model: Evaluated) -> dict[str, Any]:
        """The figures with their samples."""
        self.lm = EngineLM(model, seed=self.options.seed, tell=show_prompt)
        self._set_seeds()
        with _quiet_workers():
            return self._evaluate(self.lm, self.loaded, limit=self.options.limit)

    def part(self) -> dict[str, Any] | None:
        """The figures over the documents whose requests have all been answered so far."""
        if self.lm is None:
            return None
        tasks, documents = {}, {}
        for name, task in self.loaded["tasks"].items():
            of_document = defaultdict(list)
            for instance in getattr(task, "_instances", None) or ():
                of_document[instance.doc_id].append(instance)
            done = [
                number
                for number, instances in sorted(of_document.items())
                if all(len(self.lm.answered.get(id(one), ())) >= one.repeats for one in instances)
            ]
            if not done:
                continue
            kept = []
            for place, number in enumerate(done):
                for instance in of_document[number]:
                    # The harness counts chosen documents from 0 again.
                    instance.doc_id, instance.resps, instance.filtered_resps = place, [], {}
                    kept.append(instance)
            task._instances = kept
            task.build_all_requests = lambda **_: None  # they are there, and drawn examples must stay the same
            tasks[name], documents[name] = task, done
        if not tasks:
            return None
        with _quiet_workers():
            return self._evaluate(_Answered(self.lm), {"tasks": tasks}, documents=documents)

    def _evaluate(
        self,
        lm: LM,
        tasks: dict[str, Any],
        *,
        limit: float | None = None,
        documents: dict[str, list[int]] | None = None,
    ) -> dict[str, Any]:
        return evaluate(
            lm,
            tasks,
            limit=limit,
            samples=documents,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            system_instruction=self.options.system_instruction,
            apply_chat_template=self.options.apply_chat_template,
            fewshot_as_multiturn=self.options.fewshot_as_multiturn,
            confirm_run_unsafe_code=False,
        )

    def _set_seeds(self) -> None:
        import numpy as np
        import torch

        random.seed(self.options.seed)
        np.random.seed(self.options.seed)
        torch.manual_seed(self.options.seed)

    def _configure(self, name: str, task: Any) -> None:
        """What the options change about a task; as the harness's own command does."""
        options = self.options
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(
                f"Task {name} runs code that the model writes. That is not done here: evaluate it with the harness's "
                "own `lm_eval --confirm_run_unsafe_code`, in a container."
            )
        if options.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=options.gen_kwargs, update=True)
        if options.predict_only:
            task.override_metric(metric_name="bypass")
        default = task.get_config("num_fewshot")
        if options.num_fewshot is not None and default != 0:  # a task that says 0 stays at it
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)


def show_prompt(task: str, prompt: str, answer: str | None) -> None:
    """Prints the first prompt of a task as the model gets it, and the first answer that is scored after it."""
    line = "-" * 20
    end = "" if answer is None else f"\n{line} and the first answer that is scored {line}\n{answer}"
    text = f"{line} First prompt of {task} {line}\n{prompt}{end}\n{line * 3}"
    print(text.encode("utf-8", "replace").decode("utf-8"), file=sys.stderr, flush=True)


class _Answered(LM):
    """Gives the answers that there are."""

    def __init__(self, lm: EngineLM) -> None:
        super().__init__()
        self._left = {key: list(answers) for key, answers in lm.answered.items()}
        self.apply_chat_template, self._tokenizer_name = lm.apply_chat_template, lm.tokenizer_name

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer_name

    def _replay(self, requests: list[Any]) -> list[Any]:
        return [self._left[id(request)].pop(0) for request in requests]

    loglikelihood = loglikelihood_rolling = generate_until = _replay


@contextlib.contextmanager
def _quiet_workers() -> Generator[None, None, None]:
    """The harness resamples for standard errors in processes of its own, with as many threads each as there are cores;
    tokenizers in this process then warn about being forked."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
