"""LLM, the Python API: a model with its tokenizer and prompt format, to ask, to train and to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from litgpt.checkpoint import atomic_directory, copy_companion_files, save_model
from litgpt.cli.secret import Secret
from litgpt.devices.precision import inference_dtypes, inference_precision
from litgpt.formats.hf_config import save_config_json
from litgpt.formats.quantised_parts import saved_weights
from litgpt.generation.live import weights_version
from litgpt.llm.loading import Parts, load_parts, random_parts, settled_kind, shown
from litgpt.llm.placement import place
from litgpt.llm.text_generation import Answering
from litgpt.llm.training import Trainable
from litgpt.prompts import NamedTemplate, PromptStyle, save_prompt_style
from litgpt.quantization.layers import check_quantize, kind_of, quantized_layers, replace_linears
from litgpt.sources.door import open_model
from litgpt.sources.fit import compare_shapes
from litgpt.sources.meta import shapes_of


class LLM(Answering, Trainable):
    """A language model that answers prompts, and a module that is trained like any other.

    Made by `LLM.load`.

    Attributes:
        model: The GPT.
        config: Its shape.
        tokenizer: From text to token ids and back.
        prompt_style: How a prompt is put to the model; may be replaced.
        name: What the model is called.
    """

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
        prompt_style: str | PromptStyle | NamedTemplate | None = None,
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
            quantize: Keep the weights in 4 or 8 bits, see `distribute`; by default as the checkpoint has them.
            prompt_style: Name of a prompt format, a class package.module.Class, a chat template's .jinja file or a
                PromptStyle, in place of the checkpoint's own; or NamedTemplate(NAME) for one of several that it has.
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
            parts = random_parts(
                model, tokenizer_dir=tokenizer_dir, places=distribute is not None, compile=compile, **how
            )
        else:
            how |= {"quantize": quantize, "tokenizer_dir": tokenizer_dir}
            if distribute is None:
                how |= {"device": "cpu", "dtype": torch.get_default_dtype()}
            parts = load_parts(model, compile=compile, **how)
        llm = cls._of(parts)
        llm.train(distribute is None)
        return llm

    @classmethod
    def _of(cls, parts: Parts) -> LLM:
        return cls(
            parts.model,
            parts.tokenizer,
            parts.prompt_style,
            name=parts.name,
            checkpoint=parts.checkpoint,
            placement=parts.placement,
            **parts.engine,
        )

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
                bnb.int8, and what else `litgpt.quantization.layers.INFERENCE_KINDS` lists.
            generate_strategy: How several devices share the model: "sequential" puts some of its blocks on each, for a
                model that is larger than one; "tensor_parallel" a part of every layer, in a process for each, so that
                they work at once. These end with the model or this process. The model then answers, and nothing else.
            fixed_kv_cache_size: How many tokens prompt and answer may have together; memory for them is reserved at
                once. "max_model_supported" is the model's context. By default the memory grows with what is asked.

        Raises:
            ValueError: There is no such device, or an option cannot act.
            RanksLost: A process could not load its part of the model (a ChildProcessError).
        """
        placement = place(accelerator, devices, generate_strategy)
        device = placement.device
        untouched = self._checkpoint is not None and weights_version(self.model) == self._loaded
        if placement.strategy is not None and not untouched:
            raise ValueError(
                f"generate_strategy={generate_strategy!r} cannot act on a model that was trained since it was loaded. "
                "Save it, and load what was saved."
            )
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
            source = open_model(self._checkpoint)
            kind = settled_kind(source, quantize, precision, device)
            placement.check(source, kind, self._engine_options.get("compile", False))
            self._live = self.model = None  # their memory is free before the next are read
            self.placement.close()
            self.model = placement.load(self._checkpoint, source, dtype=dtype, quantize=quantize, watch=shown(source))
            self._loaded = weights_version(self.model)
        else:
            if next(quantized_layers(self.model), None):
                raise ValueError("The weights are quantised and no longer those of the checkpoint. Load it again.")
            self.model.to(device, dtype)
            if quantize is not None:
                replace_linears(self.model, quantize, dtype)
        self.placement = placement
        options = {"autocast": autocast, "fixed_length": length, "make": placement.make_engine}
        self._use(self.model, **self._engine_options | options)
        super().train(mode)

    def save(self, out_dir: str | Path, prompt_style: str | PromptStyle | None = None) -> None:
        """Writes a checkpoint directory that every command and `LLM.load` take; quantised weights as they are.

        Args:
            out_dir: A new directory, there whole or not at all.
            prompt_style: The format of prompts to record with it; by default the model's.

        Raises:
            ValueError: The directory exists, or the model has been changed into what no plain checkpoint holds.
            SaveError: The disk is full.
        """
        if self.placement.is_split:
            raise ValueError("The model is split over processes (tensor_parallel). Load it again, and save that.")
        wanted = shapes_of(self.config, kind_of(self.model))
        problems = compare_shapes(wanted, self.model.state_dict(), "a checkpoint", "this model")
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
            save_model(place, saved_weights(self.model), self.config)


def load_llm(checkpoint: Path | str, **how: Any) -> LLM:
    """As `LLM.load`, with more to say: takes the arguments of `litgpt.llm.loading.load_parts`."""
    return LLM._of(load_parts(checkpoint, **how))
