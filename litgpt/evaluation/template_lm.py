"""A model as lm-evaluation-harness sees it: its `TemplateLM`, on our engine.

The harness's own backend for Hugging Face models (`--model hf`) is the measure: which tokens a text becomes, where BOS
stands, what is cut off, what ends an answer. Every figure is to be the same as its, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from litgpt.cli.untrusted import read_json_object
from litgpt.evaluation.bos import prefix_token
from litgpt.evaluation.progress import bar
from litgpt.evaluation.scoring import Scored, score
from litgpt.evaluation.work import Evaluated
from litgpt.generation.request import Output, Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.text import TextStream
from litgpt.prompts import ChatTemplate
from litgpt.prompts.styles import Message
from litgpt.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task says nothing
DEFAULT_TOP_K = 50  # transformers' own, where an answer is drawn
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation, that the engine has
# What changes nothing at these values, and other engines are told.
WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "early_stopping": False, "use_cache": True}

Answer: TypeAlias = tuple[float, bool] | float | str
"""What the harness takes of a request: (log-likelihood, is greedy), a log-likelihood, or a text."""


class EngineLM(TemplateLM):
    """The harness's view of a model.

    Args:
        model: The model.
        seed: Decides what is drawn where a task asks for that.
        tell: Called with the first prompt of each task: the task's name, the prompt, and the answer where one is given.

    Attributes:
        answered: The answers so far, by the identity of the harness's `Instance`.
    """

    def __init__(
        self, model: Evaluated, *, seed: int = 1234, tell: Callable[[str, str, str | None], None] = lambda *_: None
    ) -> None:
        super().__init__()
        self.model, self.seed, self.tell = model, seed, tell
        self.run, self.config, self.style = model.run, model.config, model.style
        self.answered: dict[int, list[Answer]] = defaultdict(list)
        self._told: set[str] = set()
        self._instances: Sequence[Instance] = ()
        self._encode = lru_cache(maxsize=64)(self._encode_once)  # a context comes with each of its choices
        self.generation = generation_defaults(self.model.tokenizer)

    # -- what the model is

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at a time."""
        return self.config.block_size

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return prefix_token(self.model.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """What the harness puts there where a model says nothing else."""
        return self.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.tokenizer.dir).replace("/", "__")

    # -- text and tokens

    @property
    def _prefix_text(self) -> str:
        return self.model.tokenizer.decode([self.prefix_token_id], skip_special=False)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return list(self._encode(string, add_special_tokens))

    def _encode_once(self, string: str, surrounded: bool) -> list[int]:
        around = None if surrounded else False  # None: as the checkpoint says
        return self.model.tokenizer.encode_ids(string, bos=around, eos=around, allow_special=True)

    def _encode_prompt(self, text: str) -> list[int]:
        """The tokens of what an answer is generated for."""
        bos = self.model.tokenizer.special_tokens.get("bos_token")
        ids = self.tok_encode(text, add_special_tokens=not (bos and text.startswith(bos)))
        return ids or [self.prefix_token_id]

    # -- conversations

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template, which results record."""
        return self.model.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return self._render(chat_history, add_generation_prompt)
        except ValueError:  # many templates know no system message
            messages = [message for message in chat_history if message["role"] != "system"]
            if len(messages) == len(chat_history):
                raise
            return self._render(messages, add_generation_prompt)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.style.render(messages)
        if isinstance(self.style, ChatTemplate):
            return self.style.render(messages, add_generation_prompt=False, continue_final_message=True)
        return self.style.render(messages[:-1]) + messages[-1]["content"]

    # -- requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._tell_first(requests)
        self._instances = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._instances = ()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        with bar(len(requests), "Scoring answers") as progress:
            for index, answer in self._scored([(context, continuation) for _, context, continuation in requests]):
                answers[index] = answer
                if self._instances:
                    self.answered[id(self._instances[index])].append(answer)
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                progress.update()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._tell_first(requests)
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            of_this = [make_disjoint_window(window) for window in rolling]
            windows += of_this
            owners += [index] * len(of_this)
        found: list[list[float]] = [[] for _ in requests]
        places = []
        for owner in owners:
            places.append(len(found[owner]))
            found[owner].append(0.0)
        missing = [len(of_this) for of_this in found]

        def finish(index: int) -> None:
            total = sum(found[index])  # in the windows' order: so adds the measure
            self.answered[id(requests[index])].append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, total)

        with bar(len(windows), "Scoring texts") as progress:
            for index, answer in self._scored(windows):
                owner = owners[index]
                found[owner][places[index]] = answer[0]
                missing[owner] -= 1
                if not missing[owner]:
                    finish(owner)
                progress.update()
        for index, of_this in enumerate(found):
            if not of_this:  # an empty text
                finish(index)
        return [sum(of_this) for of_this in found]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The log-likelihood of each continuation after its context, and whether each token is the likeliest."""
        import torch

        sequences = []
        for context, continuation in pairs:
            if not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"A continuation of {len(continuation)} tokens cannot be scored: the model's context holds 1 to "
                    f"{self.max_length}."
                )
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            sequences.append(Scored(tokens, len(tokens) - len(continuation)))
        for index, logprobs in score(self.run, sequences):
            is_greedy = all(one.top_logprobs[0][0] == one.token for one in logprobs)
            yield index, (float(torch.tensor([one.logprob for one in logprobs]).sum()), is_greedy)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._tell_first(requests)
        replies = [self._reply(request, self.seed + index) for index, request in enumerate(requests)]
        order = sorted(range(len(replies)), key=lambda index: -len(replies[index].request.prompt))
        answers: dict[int, str] = {}

        def take(place: int, output: Output) -> tuple[int | None, bool]:
            reply = replies[order[place]]
            is_enough = reply.take(output)
            return (place if is_enough or output.finish_reason is not None else None), is_enough

        with bar(len(requests), "Generating answers") as progress:
            for place in self.run([replies[index].request for index in order], take):
                if place is None:
                    continue
                index = order[place]
                answers[index] = replies[index].text(self.model.tokenizer)
                self.answered[id(requests[index])].append(answers[index])
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
                progress.update()
        return [answers[index] for index in range(len(requests))]

    def _reply(self, instance: Instance, seed: int) -> Continuation:
        text, settings = instance.args
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        eos_id = self.model.tokenizer.eos_id
        eos = None if eos_id is None else self.model.tokenizer.decode([eos_id], skip_special=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        count = kwargs.pop("max_gen_toks")
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"Task {instance.task_name} asks for answers of up to {count} tokens, and the model's context holds "
                f'{self.max_length}. Give fewer: `gen_kwargs` "max_gen_toks={self.max_length // 2}".'
            )
        prompt = self._encode_prompt(text)[-room:]
        if (whole := kwargs.pop("max_length", None)) is not None:  # transformers' name: the prompt counts
            count = max(1, int(whole) - len(prompt))
        sampling = self._sampling(kwargs, str(instance.task_name))
        ends = [[token_id] for token_id in sorted(self.generation.ends)]
        texts = []
        for stop in until:
            ids = self.model.tokenizer.encode_ids(stop, bos=False, allow_special=True) if stop else []
            if len(ids) == 1 and self.model.tokenizer.is_control(ids[0]):
                ends.append(ids)  # no text, so it never is in one
            else:
                texts.append(stop)
        request = Request(prompt, min(count, self.max_length - len(prompt)), replace(sampling, seed=seed), ends)
        return Continuation(request, TextStream(self.model.tokenizer, texts), texts)

    def _sampling(self, kwargs: dict[str, Any], task: str) -> Sampling:
        """How the answers to a task are drawn.

        Raises:
            ValueError: A setting of generation is unknown or is not supported.
        """
        draws = kwargs.pop("do_sample", False)
        for name, value in WITHOUT_EFFECT.items():
            if kwargs.get(name) == value:
                del kwargs[name]
        given = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        if kwargs:
            raise ValueError(
                f"Task {task} sets {', '.join(sorted(kwargs))} for generation, which this engine does not have. It has "
                f"{', '.join(SETTINGS)}, do_sample, until and max_gen_toks. Evaluate without the task, or change it "
                "with a file of your own (`include_path`)."
            )
        settings = {"top_k": DEFAULT_TOP_K, **self.generation.sampling, **given}

        def setting(name: str, default: float) -> float:
            value = settings.get(name)
            return default if value is None else float(value)

        if not draws:
            return Sampling(0, repetition_penalty=setting("repetition_penalty", 1))
        if not (temperature := float(given.get("temperature", 0))) > 0:
            raise ValueError(
                f"Task {task} is to draw its answers (do_sample) at temperature {temperature:g}. Give a higher one, "
                'such as `gen_kwargs` "temperature=1.0", or "do_sample=False".'
            )
        return Sampling(
            temperature,
            top_k=int(setting("top_k", 0)),
            top_p=setting("top_p", 1),
            min_p=setting("min_p", 0),
            repetition_penalty=setting("repetition_penalty", 1),
        )

    def _tell_first(self, requests: Sequence[Instance]) -> None:
        for request in requests:
            name = str(request.task_name)
            if name not in self._told:
                self._told.add(name)
                prompt, *rest = request.args
                self.tell(name, prompt, rest[0] if request.request_type == "loglikelihood" else None)


class Continuation:
    """A text on its way."""

    def __init__(self, request: Request, stream: TextStream, stops: Sequence[str]) -> None:
        self.request, self.stream, self.stops = request, stream, list(stops)
        self.ids: list[int] = []

    def take(self, output: Output) -> bool:
        """Adds what one step gave; whether a stop string has come."""
        self.ids += output.token_ids
        self.stream.push(output.token_ids)
        return self.stream.stopped

    def text(self, tokenizer: Tokenizer) -> str:
        """What comes before the first stop string."""
        return postprocess_generated_text(tokenizer.decode_at_once(self.ids), self.stops, None)


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint says about answers."""

    ends: set[int]
    """The tokens that end one."""
    sampling: dict[str, Any]
    """How they are drawn: those of SETTINGS that it sets."""


def generation_defaults(tokenizer: Tokenizer) -> GenerationDefaults:
    """What a checkpoint's generation_config.json says, or its config.json where there is none."""
    found: dict[str, Any] = {}
    for name in ("generation_config.json", "config.json"):
        file = tokenizer.dir / name
        if file.is_file():
            found = read_json_object(file)
            break
    found = found.get("text_config") or found
    ends = found.get("eos_token_id")
    eos = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if tokenizer.eos_id is not None:
        eos.add(tokenizer.eos_id)
    return GenerationDefaults(eos, {name: found[name] for name in SETTINGS if found.get(name) is not None})
