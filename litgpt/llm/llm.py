"""LLM, the Python API: a model with its tokenizer and prompt format, to ask, to train and to save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from litgpt.cli.secret import Secret
from litgpt.cli.untrusted import shown
from litgpt.config import Config
from litgpt.devices.precision import inference_dtypes, inference_precision
from litgpt.generation.interface import GenerationEngine
from litgpt.generation.live import LiveEngine, weights_version
from litgpt.generation.sampling import Sampling
from litgpt.generation.worker import Worker
from litgpt.llm import reply
from litgpt.llm.codec import Codec
from litgpt.llm.loading import LoadOptions, Parts, check_load, load_parts, random_parts, settled_kind, with_progress
from litgpt.llm.placement import Placement, fixed_length, place
from litgpt.llm.reply import ChatSettings, GenerateSettings, Messages, No, Reply, SamplingSettings, Yes
from litgpt.llm.saving import save_plain_checkpoint
from litgpt.llm.timing import timed
from litgpt.llm.training import LossFunction, next_token_loss, read_trainer_checkpoint, use_checkpoint_names
from litgpt.model import GPT
from litgpt.prompts import NamedTemplate, PromptStyle
from litgpt.quantization.layers import check_quantize, quantized_layers, replace_linears
from litgpt.sources.door import open_model
from litgpt.tokenizer.tokenizer import Tokenizer


class LLM(nn.Module):
    """A language model that answers prompts, and a module that is trained like any other.

    `LLM.load` makes one; `LLM(load_parts(...))` has more to say about how it is loaded.

    Attributes:
        model: The GPT.
        codec: Its tokenizer and the format of its prompts.
        placement: The devices that it is on.
        live: The engine that answers with the weights as they are.
        name: What the model is called.
    """

    model: GPT

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.model, self.placement = parts.model, parts.placement
        self.codec = Codec(parts.tokenizer, parts.prompt_style, parts.model.config)
        self.live = LiveEngine(parts.model, parts.make_engine, parts.engine)
        self.name = parts.name or parts.model.config.name or Path(parts.tokenizer.dir).name
        self.training = parts.model.training
        self._checkpoint = parts.checkpoint
        self._loaded: tuple[Any, ...] | None = weights_version(parts.model)  # until something else is done to them
        use_checkpoint_names(self)

    @classmethod
    def load(
        cls,
        model: str | Path,
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer_dir: str | Path | None = None,
        access_token: Secret | str | None = None,
        distribute: Literal["auto"] | None = "auto",
        *,
        precision: str | None = None,
        quantize: str | None = None,
        kv_cache: str | None = None,
        prompt_style: str | PromptStyle | NamedTemplate | None = None,
        compile: bool = False,
    ) -> LLM:
        """Load a model; one that is not on this machine is downloaded first.

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
            quantize: Keep the weights in 4 or 8 bits, see `distribute`; by default as the checkpoint has them.
            kv_cache: "int8" keeps keys and values in 8 bits; by default they are in the type that is computed in.
            prompt_style: Name of a prompt format, a class package.module.Class, a chat template's .jinja file or a
                PromptStyle, in place of the checkpoint's own; or NamedTemplate(NAME) for one of several that it has.
            compile: Compile the decoding: on a CPU in the background, for later runs too; a GPU's first answer waits.

        Raises:
            FileNotFoundError: There is no such checkpoint, or it lacks something.
            ValueError: A file is damaged, the model is not supported, or an option is not supported.
        """
        check_load(init, distribute, precision, quantize)
        options = LoadOptions(precision, quantize, compile, prompt_style, access_token, kv_cache)
        stays = distribute is None
        dtype = torch.get_default_dtype() if stays else None
        if init == "random":
            parts = random_parts(model, options, tokenizer_dir=tokenizer_dir, dtype=dtype)
        else:
            placement = Placement([torch.device("cpu")]) if stays else None
            parts = load_parts(model, options, placement=placement, dtype=dtype, tokenizer_dir=tokenizer_dir)
        return cls(parts).train(stays)

    @property
    def config(self) -> Config:
        """The model's shape."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """From text to token ids and back."""
        return self.codec.tokenizer

    @property
    def prompt_style(self) -> PromptStyle:
        """How a prompt is put to the model; may be replaced."""
        return self.codec.style

    @prompt_style.setter
    def prompt_style(self, style: PromptStyle) -> None:
        self.codec.style = style

    @property
    def stops(self) -> list[list[int]]:
        """Token sequences that end an answer."""
        return self.codec.stops

    def encode(self, messages: Messages, input: str = "") -> list[int]:
        """The token ids of a conversation, ready for the reply; `input` is what the last question is about."""
        return self.codec.encode(messages, input)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.transformer.wte.weight.device

    @property
    def engine(self) -> GenerationEngine:
        """The engine, made for the weights as they are now. Not for several threads at a time: see `worker`."""
        return self.live.engine

    @property
    def worker(self) -> Worker:
        """The thread that runs the engine for all callers."""
        return self.live.worker

    # -- asking

    @overload
    def generate(
        self, prompt: str, *, return_as_token_ids: No = ..., stream: No = ..., **settings: Unpack[GenerateSettings]
    ) -> str: ...
    @overload
    def generate(
        self, prompt: str, *, return_as_token_ids: Yes, stream: No = ..., **settings: Unpack[GenerateSettings]
    ) -> Tensor: ...
    @overload
    def generate(
        self, prompt: str, *, return_as_token_ids: No = ..., stream: Yes, **settings: Unpack[GenerateSettings]
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self, prompt: str, *, return_as_token_ids: Yes, stream: Yes, **settings: Unpack[GenerateSettings]
    ) -> Iterator[int]: ...
    @overload
    def generate(
        self, prompt: list[str], *, return_as_token_ids: No = ..., **settings: Unpack[GenerateSettings]
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompt: list[str], *, return_as_token_ids: Yes, **settings: Unpack[GenerateSettings]
    ) -> list[Tensor]: ...
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
    ) -> str | Tensor | list[str] | list[Tensor] | Iterator[str] | Iterator[int]:
        """Answer a prompt, or several at a time. May be called from many threads: the calls share one batch.

        Args:
            prompt: What to answer, without the model's prompt format: that is put around it. A list of prompts gives a
                list of answers.
            sys_prompt: Replaces the system message of the prompt format.
            max_new_tokens: An answer ends after that many tokens, if the model does not end it before.
            temperature: Below 1 the answer gets more certain, above 1 more varied; 0 always takes the likeliest token.
            top_k: Sample only from the k most likely tokens; 1 always takes the most likely one.
            top_p: Sample from the most likely tokens that together reach this probability.
            return_as_token_ids: Give the answer's token ids, (T,) int64, and not its text.
            stream: Give an iterator over the pieces of the text (or the token ids) as they come. Closing it, or
                dropping it, ends the answer. Not for a list of prompts.
            min_p: Sample from tokens at least this fraction as likely as the most likely one.
            stop: A text, or several, that end the answer and are not part of it. Of token ids, the last are those that
                complete it.
            seed: Decides what is sampled; of a list of prompts, for the first, and the others count on from it. By
                default torch's global generator does (`torch.manual_seed`).

        Raises:
            ValueError: A setting is not valid, or a prompt is longer than the model's context; from an iterator,
                that comes with its first piece.
        """
        if stream and not isinstance(prompt, str):
            raise ValueError("stream=True takes one prompt, not a list. Stream them one by one, or leave it out.")
        sampling = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        replies = self._replies(prompt, sys_prompt, max_new_tokens, stop, **sampling)
        if stream:
            return (reply.stream_ids if return_as_token_ids else reply.stream_text)(self.live, replies[0])
        reply.complete(self.live, replies)
        answers = reply.answers(replies, return_as_token_ids)
        return answers[0] if isinstance(prompt, str) else answers

    @overload
    def chat(
        self, messages: Messages, *, return_as_token_ids: No = ..., stream: No = ..., **settings: Unpack[ChatSettings]
    ) -> str: ...
    @overload
    def chat(
        self, messages: Messages, *, return_as_token_ids: Yes, stream: No = ..., **settings: Unpack[ChatSettings]
    ) -> Tensor: ...
    @overload
    def chat(
        self, messages: Messages, *, return_as_token_ids: No = ..., stream: Yes, **settings: Unpack[ChatSettings]
    ) -> Iterator[str]: ...
    @overload
    def chat(
        self, messages: Messages, *, return_as_token_ids: Yes, stream: Yes, **settings: Unpack[ChatSettings]
    ) -> Iterator[int]: ...
    def chat(
        self,
        messages: Messages,
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
    ) -> str | Tensor | Iterator[str] | Iterator[int]:
        """The next reply of a conversation. What earlier calls have read of it is not read again.

        Args:
            messages: The conversation, as [{"role": "user", "content": "..."}, ...]: an optional "system" message, then
                "user" and "assistant" in turn.
            max_new_tokens, temperature, top_k, top_p, min_p, stop, seed: As for `generate`.
            return_as_token_ids, stream: As for `generate`.

        Raises:
            ValueError: The prompt format refuses the conversation; and as for `generate`.
        """
        if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError(
                f"messages is {shown(messages)}: "
                "give a list of messages, as [{'role': 'user', 'content': 'Hello'}]; a prompt alone is for generate."
            )
        answer = self._reply(messages, max_new_tokens, stop, Sampling(temperature, top_k, top_p, min_p, seed=seed))
        if stream:
            return (reply.stream_ids if return_as_token_ids else reply.stream_text)(self.live, answer)
        reply.complete(self.live, [answer])
        return answer.token_ids if return_as_token_ids else answer.text

    def benchmark(
        self,
        num_iterations: int = 1,
        prompt: str | Sequence[str] = "What do llamas eat?",
        *,
        stream: bool = False,
        return_as_token_ids: bool = False,
        **settings: Unpack[GenerateSettings],
    ) -> tuple[str | Tensor | list[str] | list[Tensor], dict[str, list[float]]]:
        """Answer several times, and measure it.

        Args:
            num_iterations: How many times. Each reads the whole prompt.
            prompt: What to answer.
            stream: Makes no difference: an answer is always measured as it comes.
            return_as_token_ids: As for `generate`.
            settings: Other arguments of `generate`.

        Returns:
            The last answer, and for each time: "Seconds total", "Seconds to first token", "Tokens generated",
            "Inference speed in tokens/sec" (all tokens over all seconds), and the most memory used so far, of the GPU
            ("Total GPU memory allocated in GB") or of the process ("Peak memory in GB").

        Raises:
            ValueError: num_iterations is not valid; and as for `generate`.
        """
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations} is not valid: give 1 or more.")
        figures: dict[str, list[float]] = {}
        replies: list[Reply] = []
        for _ in range(num_iterations):
            replies = self._replies(prompt, **settings)
            timing = timed(self.live, [each.request for each in replies], reply.taking(replies))
            for name, value in reply.figures_of(replies, timing, self.device).items():
                figures.setdefault(name, []).append(value)
        answers = reply.answers(replies, return_as_token_ids)
        return answers[0] if isinstance(prompt, str) else answers, figures

    def _replies(
        self,
        prompt: str | Sequence[str],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        stop: str | Sequence[str] = (),
        **sampling: Unpack[SamplingSettings],
    ) -> list[Reply]:
        """The replies to one prompt or to several, to be completed; arguments as for `generate`."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt is {shown(prompt)}: give a text, or a list of texts; chat takes messages.")
        system: Messages = [] if sys_prompt is None else [{"role": "system", "content": sys_prompt}]
        settings = Sampling(**sampling)
        return [
            self._reply([*system, {"role": "user", "content": text}], max_new_tokens, stop, settings.following(index))
            for index, text in enumerate(prompts)
        ]

    def _reply(self, messages: Messages, max_new_tokens: int, stop: str | Sequence[str], sampling: Sampling) -> Reply:
        ids = self.codec.encode(messages)
        return Reply(self.codec.request(ids, max_new_tokens, sampling), self.codec.text_stream(ids, stop))

    # -- training

    def forward(
        self, input_ids: Tensor, target_ids: Tensor | None = None, loss_fn: LossFunction | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits, and with targets the loss. Letters of shapes: B rows, T tokens, V the padded vocabulary.

        Args:
            input_ids: (B, T) int64.
            target_ids: (B, T) int64, the same ids as `input_ids` where they are to be learned, -100 elsewhere: each
                place's logits are compared with the next place's target.
            loss_fn: Called with logits (B, T - 1, V) and targets (B, T - 1), in place of the cross-entropy.

        Returns:
            Logits (B, T, V); with targets also the loss: by default the mean over the targets, a float32 scalar, 0
            where there are none.

        Raises:
            ValueError: T is larger than the model's context, the shapes of ids and targets differ, or this process has
                only a part of the model.
        """
        if self.placement.is_split:
            raise ValueError(
                "The model is split over processes (tensor_parallel): it answers, but gives no logits and is not "
                "trained. Load it again for that."
            )
        if self.training and torch.is_grad_enabled():  # the weights are about to change, perhaps without a trace
            self._loaded = None
            self.live.weights_changed()
        if target_ids is not None and target_ids.shape != input_ids.shape:
            raise ValueError(
                f"target_ids {list(target_ids.shape)} must be of the shape of input_ids {list(input_ids.shape)}."
            )
        mixed = self.live.options.autocast
        with torch.autocast(self.device.type, mixed) if mixed else contextlib.nullcontext():
            logits = self.model(input_ids)
        return logits if target_ids is None else (logits, next_token_loss(logits, target_ids, loss_fn))

    def trainer_setup(self, trainer_ckpt: str | Path | None = None) -> None:
        """For a Lightning Trainer's `setup` hook: take the weights of a checkpoint that a Trainer saved.

        Args:
            trainer_ckpt: The Trainer's .ckpt file; without one nothing happens, as the weights are there already.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds another model's weights.
        """
        if trainer_ckpt is not None:
            self.load_state_dict(read_trainer_checkpoint(trainer_ckpt, self.state_dict()))

    def train(self, mode: bool = True) -> LLM:
        """As of any module; and what the engine holds of earlier prompts is forgotten."""
        self.live.weights_changed()
        return super().train(mode)

    # -- moving and saving

    def distribute(
        self,
        accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto",
        devices: int | Literal["auto"] = "auto",
        precision: str | None = None,
        quantize: str | None = None,
        generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Move the model to where it is to answer, and say how.

        A model whose weights are still those of its checkpoint is loaded anew, so that the result is the same as if it
        had been loaded so; its parameters are then other objects than before. Otherwise the weights that there are get
        converted.

        Args:
            accelerator: Kind of device; "auto" takes the best there is.
            devices: How many; more than one takes a strategy.
            precision: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; by default bf16-true where the device
                computes it in hardware, else 32-true.
            quantize: Keep the weights of the linear layers in 4 or 8 bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or
                bnb.int8, and what else `litgpt.quantization.layers.INFERENCE_KINDS` lists.
            generate_strategy: How several devices share the model: "sequential" puts some of its blocks on each, for a
                model that is larger than one; "tensor_parallel" a part of every layer, in a process for each, so that
                they work at once. These end with the model or this process. The model then answers, and nothing else.
            fixed_kv_cache_size: How many tokens prompt and answer may have together; memory for them is reserved at
                once. "max_model_supported" is the model's context. By default the memory grows with what is asked.

        Raises:
            ValueError: There is no such device, or an option is not supported.
            RanksLost: A process could not load its part of the model (a ChildProcessError).
        """
        placement = place(accelerator, devices, generate_strategy)
        checkpoint = self._checkpoint if weights_version(self.model) == self._loaded else None
        if placement.strategy is not None and checkpoint is None:
            raise ValueError(
                f"generate_strategy={generate_strategy!r} is not supported on a model that was trained since it was "
                "loaded. Save it, and load what was saved."
            )
        length = fixed_length(fixed_kv_cache_size, self.config)
        precision = precision or inference_precision(placement.device)
        dtype, autocast = inference_dtypes(precision, placement.device)
        check_quantize(quantize, precision, training=False, device=placement.device)
        options, mode = self.live.options, self.training
        if checkpoint is not None:
            source = open_model(checkpoint)
            kind = settled_kind(source, quantize, precision, placement.device)
            placement.check(source, kind, options.compile)
            layer_cache = self.model.layer_cache
            del self.live, self.model  # their memory is free before the next are read
            self.placement.close()
            settings = {"dtype": dtype, "quantize": quantize, "kv_cache": layer_cache.kind}
            self.model = placement.load(checkpoint, source, **settings, watch=with_progress(source))
            self.model.layer_cache = layer_cache
            self._loaded = weights_version(self.model)
        else:
            if next(quantized_layers(self.model), None):
                raise ValueError("The weights are quantised and no longer those of the checkpoint. Load it again.")
            self.model.to(placement.device, dtype)
            if quantize is not None:
                replace_linears(self.model, quantize, dtype)
        self.placement = placement
        options = replace(options, autocast=autocast, fixed_length=length)
        self.live = LiveEngine(self.model, placement.make_engine, options)
        super().train(mode)

    def save(self, out_dir: str | Path, prompt_style: str | PromptStyle | None = None) -> None:
        """Write a checkpoint directory that every command and `LLM.load` take; quantised weights as they are.

        The blocks of a GGUF file are de-quantised.

        Args:
            out_dir: A new directory, there whole or not at all.
            prompt_style: The format of prompts to record with it; by default the model's.

        Raises:
            ValueError: The directory exists, or the model has been changed into what no plain checkpoint holds.
            SaveError: The disk is full.
        """
        if self.placement.is_split:
            raise ValueError("The model is split over processes (tensor_parallel). Load it again, and save that.")
        style = prompt_style or self.prompt_style
        # Without a checkpoint, the config.json beside the tokenizer is another model's.
        save_plain_checkpoint(out_dir, self.model, self.tokenizer.dir, style, writes_config=self._checkpoint is None)
