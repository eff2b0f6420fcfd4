"""LLM, the Python API: a model with its tokenizer and prompt format, to ask, to train and to save."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from litgpt.checkpoint import (
    CONFIG,
    atomic_directory,
    copy_companion_files,
    read_state_dict,
    resolve_checkpoint_dir,
    save_model,
)
from litgpt.config import Config
from litgpt.convert import Source, config_from_hf, load_model
from litgpt.convert.hf_config import save_config_json
from litgpt.convert.source import compare_shapes, give_memory, meta_model, shapes_of
from litgpt.distributed import accelerator as best_accelerator
from litgpt.distributed import chosen_devices, inference_dtypes, inference_precision, memory_used
from litgpt.generation.engine import Engine, Request
from litgpt.generation.live import LiveEngine, weights_version
from litgpt.generation.request import Output
from litgpt.generation.sampling import Sampling
from litgpt.generation.text import TextStream
from litgpt.generation.worker import Worker
from litgpt.loading import find_checkpoint, open_model
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, choose_prompt_style, save_prompt_style
from litgpt.prompts.styles import Message, with_input
from litgpt.quantize import check_quantize, quantized_layers, replace_linears
from litgpt.sequential import connect_blocks, place_blocks, placed_weights
from litgpt.tokenizer import Tokenizer
from litgpt.training.loss import IGNORE_INDEX, rows_per_chunk, summed_cross_entropy

Answer: TypeAlias = str | Tensor
LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class LLM(nn.Module):
    """A language model that answers prompts, and a module that is trained like any other.

    Made by `LLM.load`. Letters of shapes: B rows, T tokens, V the padded vocabulary.

    Attributes:
        model: The GPT.
        config: Its shape.
        tokenizer: From text to token ids and back.
        prompt_style: How a prompt is put to the model; may be replaced.
        name: What the model is called.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompt_style: PromptStyle,
        *,
        checkpoint: Path | str | None = None,
        **engine: Any,
    ) -> None:
        """
        Args:
            model: The model, on its device.
            tokenizer: The model's.
            prompt_style: The format of its prompts.
            checkpoint: Where its weights are from, if `distribute` may read them again.
            engine: Options of the engine that answers (`litgpt.generation.engine.Engine`).
        """
        super().__init__()
        self.model, self.tokenizer, self.prompt_style = model, tokenizer, prompt_style
        self.training = model.training
        self.name = model.config.name or Path(tokenizer.dir).name
        self._checkpoint = checkpoint
        self._use(model, **engine)
        self._loaded: tuple[Any, ...] | None = weights_version(model)  # until something else is done to the weights
        # A state dict has the names of lit_model.pth, without "model." before them.
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    @classmethod
    def load(
        cls,
        model: str | Path,
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer_dir: str | Path | None = None,
        access_token: str | None = None,
        distribute: Literal["auto"] | None = "auto",
        *,
        precision: str | None = None,
        quantize: str | None = None,
        prompt_style: str | PromptStyle | None = None,
        compile: bool = False,
    ) -> LLM:
        """Loads a model; one that is not on this machine is downloaded first.

        Args:
            model: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
                weights, a known name or a Hub id; with random weights also a known name without a checkpoint.
            init: Take the checkpoint's weights, or random ones for a model of this shape.
            tokenizer_dir: A checkpoint whose tokenizer to use in place of the model's own.
            access_token: For a gated model that has to be downloaded.
            distribute: "auto" puts the model where it answers quickest, in bfloat16 if the device computes that in
                hardware. None keeps it on the CPU in torch's default type (float32) and in training mode, to be trained
                there or moved by `distribute` or a Trainer.
            precision: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed, in place of the device's own.
            quantize: Keep the weights in 4 or 8 bits, see `distribute`.
            prompt_style: Name of a prompt format, a class package.module.Class, a chat template's .jinja file or a
                PromptStyle, in place of the checkpoint's own.
            compile: Compile the decoding: on a CPU in the background, for later runs too; a GPU's first answer waits.

        Raises:
            FileNotFoundError: There is no such checkpoint, or it lacks something.
            ValueError: A file is damaged, the model is not supported, or an option cannot act.
        """
        if init not in ("pretrained", "random"):
            raise ValueError(f"init={init!r} is not possible: give 'pretrained' or 'random'.")
        if distribute not in ("auto", None):
            raise ValueError(f"distribute={distribute!r} is not possible: give 'auto' or None.")
        if distribute is None and (precision or quantize):
            option = f"precision={precision!r}" if precision else f"quantize={quantize!r}"
            raise ValueError(
                f"{option} cannot act with distribute=None. Give it to `distribute` then, or leave None out."
            )
        how: dict[str, Any] = {"precision": precision, "prompt_style": prompt_style, "access_token": access_token}
        if init == "random":
            if quantize is not None:
                raise ValueError(f"quantize={quantize!r} cannot act with init='random': train the model first.")
            return cls._random(model, tokenizer_dir, distribute is not None, compile, **how)
        how |= {"quantize": quantize, "tokenizer_dir": tokenizer_dir}
        if distribute is None:
            how |= {"device": "cpu", "dtype": torch.get_default_dtype()}
        return load_llm(model, compile=compile, **how).train(distribute is None)

    @classmethod
    def _random(
        cls,
        model: str | Path,
        tokenizer_dir: str | Path | None,
        places: bool,
        compile: bool,
        precision: str | None,
        prompt_style: str | PromptStyle | None,
        access_token: str | None,
    ) -> LLM:
        config = _shape_of(model)
        if tokenizer_dir is None and not Path(model).is_dir():
            raise ValueError(
                f"init='random' makes the weights of {model}, but not its tokenizer. Give tokenizer_dir, a checkpoint "
                f"(`litgpt download {model} --tokenizer_only true`)."
            )
        tokenizer = Tokenizer(find_checkpoint(tokenizer_dir or model, access_token, tokenizer_only=True))
        style = choose_prompt_style(Path(tokenizer.dir), explicit=prompt_style, config=config, tokenizer=tokenizer)
        device = torch.device(best_accelerator() if places else "cpu")
        dtype, autocast = torch.get_default_dtype(), None
        if places:
            dtype, autocast = inference_dtypes(precision or inference_precision(device), device)
        gpt = meta_model(config)
        give_memory(gpt, dtype, device)
        gpt.init_weights()
        return cls(gpt, tokenizer, style, autocast=autocast, compile=compile).train(not places)

    # -- answers

    def generate(
        self,
        prompt: str | Sequence[str],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Answer | list[Answer] | Iterator[str] | Iterator[int]:
        """Answers a prompt, or several at a time. May be called from many threads: the calls share one batch.

        Args:
            prompt: What to answer, without the model's prompt format: that is put around it. A list of prompts gives a
                list of answers.
            sys_prompt: Replaces the system message of the prompt format.
            max_new_tokens: An answer ends after so many tokens, if the model does not end it before.
            temperature: Below 1 the answer gets more certain, above 1 more varied; 0 always takes the likeliest token.
            top_k: Draw from the so many most likely tokens only; 1 always takes the most likely one.
            top_p: Draw from the most likely tokens that together reach this probability.
            return_as_token_ids: Give the answer's token ids, (T,) int64, and not its text.
            stream: Give an iterator over the pieces of the text (or the token ids) as they come. Closing it, or
                dropping it, ends the answer. Not for a list of prompts.
            min_p: Draw from tokens at least this fraction as likely as the most likely one.
            stop: A text, or several, that end the answer and are not part of it. Of token ids, the last are those that
                complete it.
            seed: Decides what is drawn; of a list of prompts, for the first, and the others count on from it. By
                default torch's global generator does (`torch.manual_seed`).

        Raises:
            ValueError: A setting is not possible, or a prompt is longer than the model's context; from an iterator,
                that comes with its first piece.
        """
        if stream and not isinstance(prompt, str):
            raise ValueError("stream=True takes one prompt, not a list. Stream them one by one, or leave it out.")
        replies = self._asked(prompt, sys_prompt, max_new_tokens, temperature, top_k, top_p, min_p, stop, seed)
        if stream:
            return self._stream(replies[0], return_as_token_ids)
        self._complete(replies)
        answers = [reply.answer(return_as_token_ids) for reply in replies]
        return answers[0] if isinstance(prompt, str) else answers

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Answer | Iterator[str] | Iterator[int]:
        """The next reply of a conversation. What earlier calls have read of it is not read again.

        Args:
            messages: The conversation, as [{"role": "user", "content": "..."}, ...]: an optional "system" message, then
                "user" and "assistant" in turn.
            max_new_tokens, temperature, top_k, top_p, min_p, stop, seed: As for `generate`.
            return_as_token_ids, stream: As for `generate`.

        Raises:
            ValueError: The prompt format refuses the conversation; and as for `generate`.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        reply = self._reply(messages, max_new_tokens, sampling, stop, seed)
        if stream:
            return self._stream(reply, return_as_token_ids)
        self._complete([reply])
        return reply.answer(return_as_token_ids)

    def benchmark(
        self,
        num_iterations: int = 1,
        prompt: str | Sequence[str] = "What do llamas eat?",
        *,
        stream: bool = False,
        return_as_token_ids: bool = False,
        **kwargs: Any,
    ) -> tuple[Answer | list[Answer], dict[str, list[float]]]:
        """Answers several times, and measures it.

        Args:
            num_iterations: How many times. Each reads the whole prompt.
            prompt: What to answer.
            stream: Makes no difference: an answer is always measured as it comes.
            return_as_token_ids: As for `generate`.
            kwargs: Other arguments of `generate`.

        Returns:
            The last answer, and for each time: "Seconds total", "Seconds to first token", "Tokens generated",
            "Inference speed in tokens/sec" (all tokens over all seconds), and the most memory used so far, of the GPU
            ("Total GPU memory allocated in GB") or of the process ("Peak memory in GB").

        Raises:
            ValueError: num_iterations is not possible; and as for `generate`.
        """
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations} is not possible: give 1 or more.")
        memory = "Total GPU memory allocated in GB" if self.device.type == "cuda" else "Peak memory in GB"
        figures: dict[str, list[float]] = {}
        for _ in range(num_iterations):
            self.worker.forget()
            started = time.perf_counter()
            replies = self._asked(prompt, **kwargs)
            self._complete(replies)
            seconds, tokens = time.perf_counter() - started, sum(len(reply.ids) for reply in replies)
            measured = {
                "Seconds total": seconds,
                "Seconds to first token": min(reply.began for reply in replies) - started,
                "Tokens generated": tokens,
                "Inference speed in tokens/sec": tokens / seconds,
                memory: memory_used(self.device) / 1e9,
            }
            for name, value in measured.items():
                figures.setdefault(name, []).append(value)
        answers = [reply.answer(return_as_token_ids) for reply in replies]
        return answers[0] if isinstance(prompt, str) else answers, figures

    def _asked(
        self,
        prompt: str | Sequence[str],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> list[_Reply]:
        """The replies to one prompt or to several, to be completed; arguments as for `generate`."""
        sampling = Sampling(temperature, top_k, top_p, min_p)
        system: list[Message] = [] if sys_prompt is None else [{"role": "system", "content": sys_prompt}]
        return [
            self._reply(
                [*system, {"role": "user", "content": text}],
                max_new_tokens,
                sampling,
                stop,
                None if seed is None else seed + index,
            )
            for index, text in enumerate([prompt] if isinstance(prompt, str) else prompt)
        ]

    def _reply(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        seed: int | None,
    ) -> _Reply:
        ids = self.encode(messages)
        stops = [stop] if isinstance(stop, str) else list(stop)
        after = ids if self.prompt_style.continues_text else ()
        return _Reply(self.request(ids, max_new_tokens, sampling, seed), TextStream(self.tokenizer, stops, after))

    def _run(self, replies: Sequence[_Reply]) -> Iterator[tuple[list[int], str]]:
        def take(index: int, output: Output) -> tuple[tuple[list[int], str], bool]:
            return replies[index].take(output), replies[index].written.stopped

        return self._live.run([reply.request for reply in replies], take)

    def _complete(self, replies: Sequence[_Reply]) -> None:
        for _ in self._run(replies):
            pass

    def _stream(self, reply: _Reply, as_token_ids: bool) -> Iterator[str] | Iterator[int]:
        with contextlib.closing(self._run([reply])) as pieces:
            for ids, text in pieces:
                if as_token_ids:
                    yield from ids
                elif text:
                    yield text

    # -- training

    def forward(
        self, input_ids: Tensor, target_ids: Tensor | None = None, loss_fn: LossFunction | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits, and with targets the loss.

        Args:
            input_ids: (B, T) int64.
            target_ids: (B, T) int64, the same ids as `input_ids` where they are to be learned, -100 elsewhere: each
                place's logits are compared with the next place's target.
            loss_fn: Called with logits (B, T - 1, V) and targets (B, T - 1), in place of the cross-entropy.

        Returns:
            Logits (B, T, V); with targets also the loss: by default the mean over the targets, a float32 scalar, 0
            where there are none.

        Raises:
            ValueError: T is larger than the model's context, or the shapes of ids and targets differ.
        """
        if self.training and torch.is_grad_enabled():  # the weights are about to change, perhaps without a trace
            self._loaded = None
            self._live.weights_changed()
        if target_ids is not None and target_ids.shape != input_ids.shape:
            raise ValueError(
                f"target_ids {list(target_ids.shape)} must be of the shape of input_ids {list(input_ids.shape)}."
            )
        mixed = self._engine_options.get("autocast")
        with torch.autocast(self.device.type, mixed) if mixed else contextlib.nullcontext():
            logits = self.model(input_ids)
        if target_ids is None:
            return logits
        predicted, targets = logits[..., :-1, :], target_ids[..., 1:]
        if loss_fn is not None:
            return logits, loss_fn(predicted, targets)
        chunk = rows_per_chunk(logits.device.type, logits.size(-1))
        total = summed_cross_entropy(lambda rows: rows, predicted, targets, (), chunk)
        return logits, total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def trainer_setup(self, trainer_ckpt: str | Path | None = None) -> None:
        """For a Lightning Trainer's `setup` hook: takes the weights of a checkpoint that a Trainer saved.

        Args:
            trainer_ckpt: The Trainer's .ckpt file; without one nothing happens, as the weights are there already.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds another model's weights.
        """
        if trainer_ckpt is None:
            return
        weights = {}
        for name, tensor in read_state_dict(trainer_ckpt).items():
            if match := re.search(r"(transformer|lm_head)\..*", name):  # after "llm." or what the module was called
                weights[match[0]] = tensor
        problems = compare_shapes(self.state_dict(), weights, "this model", "the checkpoint")
        if problems:
            raise ValueError(f"trainer_ckpt={str(trainer_ckpt)!r} does not fit the model:\n" + "\n".join(problems))
        self.load_state_dict(weights)

    def train(self, mode: bool = True) -> LLM:
        """As of any module; and what the engine holds of earlier prompts is forgotten."""
        self._live.weights_changed()
        return super().train(mode)

    # -- where it is

    @property
    def config(self) -> Config:
        """The model's shape."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.transformer["wte"].weight.device

    def distribute(
        self,
        accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto",
        devices: int | Literal["auto"] = "auto",
        precision: str | None = None,
        quantize: str | None = None,
        generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Moves the model to where it is to answer, and says how.

        A model whose weights are still those of its checkpoint is loaded anew, so that the result is the same as if it
        had been loaded so; its parameters are then other objects than before. Otherwise the weights that there are get
        converted.

        Args:
            accelerator: Kind of device; "auto" takes the best there is.
            devices: How many; more than one takes a strategy.
            precision: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; by default bf16-true where the device
                computes it in hardware, else 32-true.
            quantize: Keep the weights of the linear layers in 4 or 8 bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or
                bnb.int8, and what else `litgpt.quantize.INFERENCE_KINDS` lists.
            generate_strategy: How several devices share the model: "sequential" puts some of its blocks on each.
            fixed_kv_cache_size: How many tokens prompt and answer may have together; memory for them is reserved at
                once. "max_model_supported" is the model's context. By default the memory grows with what is asked.

        Raises:
            ValueError: There is no such device, or an option cannot act.
        """
        device = _device(accelerator)
        untouched = self._checkpoint is not None and weights_version(self.model) == self._loaded
        load = load_model
        if generate_strategy == "tensor_parallel":
            raise ValueError(
                "generate_strategy='tensor_parallel' takes a process for each device, and LLM runs in one. Use "
                "`litgpt generate_tp`, or 'sequential'."
            )
        if generate_strategy == "sequential":
            targets = chosen_devices(devices)
            if targets[0].type != device.type or not untouched or self._engine_options.get("compile"):
                raise ValueError(
                    "generate_strategy='sequential' cannot act on another accelerator than the best one here, on a "
                    "model that was trained since it was loaded (save it first), or with compile."
                )
            device, load = targets[0], load_over(targets)
        elif generate_strategy is not None:
            raise ValueError(f"generate_strategy={generate_strategy!r} is unknown. Give 'sequential' or leave it out.")
        elif devices not in ("auto", 1):
            raise ValueError(f"devices={devices!r} cannot act without a generate_strategy. Leave it out, or give 1.")
        length = self.config.block_size if fixed_kv_cache_size == "max_model_supported" else fixed_kv_cache_size
        if length is not None and not 1 < length <= self.config.block_size:
            raise ValueError(
                f"fixed_kv_cache_size={fixed_kv_cache_size!r} is not possible: give 2 to {self.config.block_size}, the "
                "model's context."
            )
        precision = precision or inference_precision(device)
        dtype, autocast = inference_dtypes(precision, device)
        check_quantize(quantize, precision, training=False, device=device)
        mode = self.training
        if untouched:
            self._live = self.model = None  # their memory is free before the next are read
            self.model = load(open_model(self._checkpoint), dtype=dtype, device=device, quantize=quantize)
            self._loaded = weights_version(self.model)
        else:
            if next(quantized_layers(self.model), None):
                raise ValueError("The weights are quantised and no longer those of the checkpoint. Load it again.")
            self.model.to(device, dtype)
            if quantize is not None:
                replace_linears(self.model, quantize, dtype)
        self._use(self.model, **self._engine_options | {"autocast": autocast, "fixed_length": length})
        super().train(mode)

    def _use(self, model: GPT, **engine: Any) -> None:
        self._engine_options = engine
        self._live = LiveEngine(model, **engine)

    def save(self, out_dir: str | Path, prompt_style: str | PromptStyle | None = None) -> None:
        """Writes a checkpoint directory that every command and `LLM.load` take.

        Args:
            out_dir: A new directory, there whole or not at all.
            prompt_style: The format of prompts to record with it; by default the model's.

        Raises:
            ValueError: The directory exists, or the model has been changed into what no plain checkpoint holds.
            SaveError: The disk is full.
        """
        weights = self.model.state_dict()
        if next(quantized_layers(self.model), None):
            raise ValueError("Quantised weights are not saved. Load the model without quantize, and save that.")
        problems = compare_shapes(shapes_of(self.config), weights, "a checkpoint", "this model")
        if problems:
            raise ValueError(
                "This model is not a plain one any more; merge LoRA first (`litgpt.lora.merge_lora(llm.model)`):\n"
                + "\n".join(problems[:4])
            )
        with atomic_directory(out_dir) as place:
            copy_companion_files(self.tokenizer.dir, place)
            if self._checkpoint is None:  # the tokenizer's config.json is another model's
                save_config_json(self.config, place)
            save_prompt_style(prompt_style or self.prompt_style, place)
            save_model(place, weights, self.config)

    # -- what commands and the server build on

    @property
    def engine(self) -> Engine:
        """The engine, made for the weights as they are now. Not for several threads at a time: see `worker`."""
        return self._live.engine

    @property
    def worker(self) -> Worker:
        """The thread that runs the engine for all callers."""
        return self._live.worker

    @property
    def stops(self) -> list[list[int]]:
        """Token sequences that end an answer."""
        return self.prompt_style.stop_sequences(self.tokenizer)

    def encode(self, messages: Sequence[Message], input: str = "") -> list[int]:
        """The token ids of a conversation, ready for the reply; `input` is what the last question is about.

        Raises:
            ValueError: The prompt format refuses the conversation, or the tokenizer is not this model's.
        """
        messages, fields = with_input(self.prompt_style, messages, input)
        ids = self.prompt_style.encode(self.tokenizer, messages, **fields)
        largest = max(ids, default=0)
        if largest >= self.config.padded_vocab_size:
            raise ValueError(
                f"The tokenizer in {self.tokenizer.dir} gives the token id {largest}, but the model's vocabulary ends "
                f"at {self.config.padded_vocab_size - 1}. They do not belong together: copy the model's own tokenizer "
                "there."
            )
        return ids

    def request(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, seed: int | None) -> Request:
        """What to ask the engine for the answer to a prompt."""
        return Request(prompt, max_new_tokens, sampling, self.stops, seed)

    def stream(self, request: Request) -> Iterator[int]:
        """The token ids of an answer as they come; safe from any thread. Closing the iterator ends the answer."""
        for ids in self._live.run([request], lambda index, output: (output.token_ids, False)):
            yield from ids

    def text(self, ids: Iterable[int], prompt: Sequence[int], joins: bool = False) -> Iterator[str]:
        """The answer's text as it comes. Where it `joins` the prompt's text, as after a bare prompt, it keeps the space
        between the two."""
        return self.tokenizer.decode_stream(ids, after=prompt if joins or self.prompt_style.continues_text else ())


class _Reply:
    """What has come of an answer.

    Attributes:
        request: What the engine was asked.
        ids: The tokens so far.
        text: Their text so far.
        began: When the first token came, in seconds of `time.perf_counter`; infinity before.
        written: Makes the text.
    """

    def __init__(self, request: Request, written: TextStream) -> None:
        self.request, self.written = request, written
        self.ids: list[int] = []
        self.text = ""
        self.began = float("inf")

    def take(self, output: Output) -> tuple[list[int], str]:
        """Adds what one step gave, and returns the new tokens and text."""
        if output.token_ids and not self.ids:
            self.began = time.perf_counter()
        ids, text = [], ""
        for token_id in output.token_ids:
            ids.append(token_id)
            text += self.written.push([token_id])
            if self.written.stopped:
                break
        if output.finish_reason is not None:
            text += self.written.finish()
        self.ids += ids
        self.text += text
        return ids, text

    def answer(self, as_token_ids: bool) -> Answer:
        return torch.tensor(self.ids, dtype=torch.int64) if as_token_ids else self.text


def load_llm(
    checkpoint: Path | str,
    *,
    precision: str | None = None,
    compile: bool = False,
    prompt_style: str | PromptStyle | None = None,
    access_token: str | None = None,
    quantize: str | None = None,
    tokenizer_dir: Path | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    load: Callable[..., GPT] = load_model,
    finetuned: Path | None = None,
    make_engine: Callable[..., Engine] = Engine,
) -> LLM:
    """Finds, downloads if need be, and loads a checkpoint: as `LLM.load`, with more to say.

    Args:
        checkpoint, precision, compile, prompt_style, access_token, quantize, tokenizer_dir: As for `LLM.load`.
        device: Where to; by default the best device there is.
        dtype: Type of the weights, in place of a precision.
        load: Makes the model of the opened checkpoint; called as `load_model` is.
        finetuned: The directory of what was finetuned from the checkpoint; its prompt format comes first.
        make_engine: Makes the engine that answers, as `Engine` is made.

    Raises:
        FileNotFoundError, ValueError: As for `LLM.load`.
    """
    device = torch.device(device or best_accelerator())
    autocast = None
    if dtype is None:
        precision = precision or inference_precision(device)
        dtype, autocast = inference_dtypes(precision, device)
        check_quantize(quantize, precision, training=False, device=device)
    source = open_model(checkpoint, access_token)
    # The small files first: what is wrong with them is said before the weights are read.
    files = find_checkpoint(tokenizer_dir, access_token, tokenizer_only=True) if tokenizer_dir else source.files
    tokenizer = Tokenizer(files)
    style = choose_prompt_style(
        source.files, explicit=prompt_style, config=source.config, tokenizer=tokenizer, finetuned=finetuned
    )
    name = source.config.name or Path(checkpoint).stem
    how = (precision or str(dtype).removeprefix("torch."), quantize, device.type)
    _say(f"Loading {name} ({', '.join(filter(None, how))})")
    if source.note:
        _say(source.note)
    model = load(source, dtype=dtype, device=device, quantize=quantize)
    reloads = load is load_model
    engine = {"make": make_engine, "autocast": autocast, "compile": compile}
    llm = LLM(model, tokenizer, style, checkpoint=checkpoint if reloads else None, **engine)
    llm.name = name
    return llm


def load_over(devices: Sequence[torch.device]) -> Callable[..., GPT]:
    """What loads a model in place of `load_model`, some of its blocks on each of several devices."""

    def load(source: Source, device: Any, **how: Any) -> GPT:
        places = place_blocks(meta_model(source.config), len(devices))
        model = load_model(source, device=placed_weights(places, devices), **how)
        connect_blocks(model, places, devices)
        return model

    return load


def _say(text: str) -> None:
    """A line about the work, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _shape_of(model: str | Path) -> Config:
    """The configuration of a checkpoint that is here, or of a known name."""
    try:
        path = resolve_checkpoint_dir(model, incomplete=True)
    except FileNotFoundError:
        return Config.from_name(str(model).removeprefix("checkpoints/"))
    if (path / CONFIG).is_file():
        return Config.from_checkpoint(path)
    if (path / "config.json").is_file():
        return config_from_hf(json.loads((path / "config.json").read_text(encoding="utf-8")), str(model))
    return Config.from_name(path.name)


def _device(kind: str) -> torch.device:
    """The device of an accelerator's name.

    Raises:
        ValueError: There is none.
    """
    best = best_accelerator()
    kind = {"auto": best, "gpu": "cuda"}.get(kind, kind)
    if kind not in ("cpu", best):
        raise ValueError(f"accelerator={kind!r}: there is none here. Give 'cpu' or 'auto', which is {best!r}.")
    return torch.device(kind)


def _without_prefix(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Names of a state dict as in lit_model.pth."""
    for name in [name for name in weights if name.startswith(f"{prefix}model.")]:
        weights[prefix + name.removeprefix(f"{prefix}model.")] = weights.pop(name)


def _with_prefix(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """The same back."""
    for name in [name for name in weights if name.startswith((f"{prefix}transformer.", f"{prefix}lm_head."))]:
        weights[f"{prefix}model.{name.removeprefix(prefix)}"] = weights.pop(name)
