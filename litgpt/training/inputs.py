"""What a run works on and how, kept with its checkpoints and compared when it is resumed.

A resumed run goes on exactly where it was only on the same data, model, tokenizer and seed. A learning rate or a number
of devices may change, and is said.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.cli.record import plain, without_secrets
from litgpt.config import Config
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.optimizers import OptimizerSpec

# Settings by the options' names. Of those that are not here, a change is said.
_FIXED = ("seed", "data.seed", "quantize", "method", "lora_", "adapter_", "dpo_")  # those that end with _ begin so
_ELSEWHERE = {  # they change nothing in the numbers, or what they say is compared as such
    *("out_dir", "resume", "overwrite", "dry_run", "logger_name", "train.logger_name", "compile", "compiler", "log"),
    *("data", "devices", "num_nodes", "optimizer"),
    *("model_name", "model_config", "tokenizer_dir", "tokenizer_vocab_size"),
    *("checkpoint_dir", "initial_checkpoint_dir", "access_token"),
    *("train.max_seq_length", "train.tie_embeddings", "train.gradient_accumulation_iters"),
    *("train.learning_rate", "train.weight_decay", "train.beta1", "train.beta2"),  # they are the optimizer's
}
_IDLE = ("name", "hf_config", "padding_multiple")  # fields of Config that no number follows from
_SAMPLED = 64  # values of each weight


@dataclass(frozen=True)
class Inputs:
    """What decides a run.

    Attributes:
        fixed: Parts of the model and the data, and settings, which a resume must leave as they were.
        free: Those which it may change.
    """

    fixed: dict[str, Any]
    free: dict[str, Any]

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        data: Mapping[str, Any],
        config: Config,
        tokenizer: Tokenizer | None,
        optimizer: OptimizerSpec,
        num_devices: int,
        parts: Mapping[str, Any],
    ) -> Inputs:
        """Put it together.

        Args:
            settings: All settings of the command.
            data: Words for its parts `train` and `val` (see `DataModule.content`), and its `seed`.
            config: The model's shape.
            tokenizer: None where there is none.
            optimizer: As it is built.
            num_devices: On all nodes.
            parts: What else a resume must leave as it was, by its name in words.
        """
        given = {name: value for name, value in plain(dict(settings)).items() if name not in _ELSEWHERE}
        given |= {"optimizer": plain(optimizer.init_args), "data": {"seed": data.get("seed")}}
        options = {name: value for name, value in _options(without_secrets(given)) if name not in _ELSEWHERE}
        fixed = {f"--{name}": value for name, value in options.items() if _is_fixed(name)}
        free = {f"--{name}": value for name, value in options.items() if not _is_fixed(name)}
        fixed |= {f"model_config.{name}": value for name, value in plain(asdict(config)).items() if name not in _IDLE}
        fixed |= {"the tokenizer": tokenizer and tokenizer.fingerprint()[:16]}
        fixed |= {"the training data": data.get("train")}
        free |= {"the validation data": data.get("val"), "the number of devices": num_devices}
        fixed |= parts
        return cls(fixed, free)

    def saved(self) -> dict[str, Any]:
        """As it goes into a checkpoint."""
        return asdict(self)

    def compare(self, saved: dict[str, Any] | None, checkpoint: Path) -> str | None:
        """Look at what a checkpoint was saved with.

        Returns:
            What is to be said of it; None where all is the same, or nothing was kept, as before these were compared.

        Raises:
            ValueError: Something differs that must not.
        """
        if saved is None:
            return None
        wrong = _differences(saved["fixed"], self.fixed)
        if wrong:
            raise ValueError(
                f"`resume`: the run in {checkpoint} was started with something else:\n"
                + "\n".join("  " + re.sub(r"^--([\w.]+)", r"`\1`", line) for line in wrong)
                + "\nFrom here on it would be another run. Resume it with what it was started with, or start a new run "
                f"elsewhere (`out_dir`) from its weights: {checkpoint} is a checkpoint like any other."
            )
        changed = _differences(saved["free"], self.free)
        if not changed:
            return None
        return "Note: the run goes on with other settings than it was saved with:\n" + "\n".join(
            f"  {line}" for line in changed
        )


def sampled(weights: Iterator[tuple[str, Any]], digest: Any) -> Iterator[tuple[str, Any]]:
    """The same weights; some values of each go into a digest on the way, which those of another model would change.

    A weight is a tensor, or its parts by name where it is quantised.
    """
    for name, weight in weights:
        digest.update(name.encode())
        for tensor in [weight] if isinstance(weight, Tensor) else weight.values():
            digest.update(str(tuple(tensor.shape)).encode())
            values = tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLED)]
            digest.update(values.to("cpu", torch.float32).numpy().tobytes())
        yield name, weight


def new_digest() -> Any:
    """One for `sampled`."""
    return hashlib.blake2b(digest_size=8)


def _options(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_fixed(name: str) -> bool:
    return any(name.startswith(fixed) if fixed.endswith("_") else name == fixed for fixed in _FIXED)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each that differs; what only one of two versions knows, does not count."""
    lines = []
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if old == new:
            continue
        is_digest = old and new and name in ("the tokenizer", "the frozen weights")
        lines.append(f"{name}: another" if is_digest else f"{name}: {_shown(old)} then, {_shown(new)} now")
    return sorted(lines)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
