"""Language models from download to deployment, in code made to be read."""

import os
import sys


def _forget_working_directory() -> None:
    """Take the working directory off the path that `python -m litgpt` puts it on, as `litgpt` does without that: it
    may be a stranger's checkpoint, and a `yaml.py` in it would be imported in place of ours.

    A class of one's own is still found there once the command line names it.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    if sys.argv[:1] == ["-m"] and module.partition(".")[0] == __name__ and sys.path:
        here = sys.path[0]
        if here in ("", os.getcwd()) and not __file__.startswith(os.path.join(os.getcwd(), "")):
            del sys.path[0]


_forget_working_directory()

import importlib  # noqa: E402
from importlib.abc import Loader, MetaPathFinder  # noqa: E402
from importlib.machinery import ModuleSpec  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

if "torch" not in sys.modules:  # its threads are as they are from when it is imported
    importlib.import_module("litgpt.devices.threads").settle_threads()

__version__ = "0.1.0"

# Name -> module that defines it. Imported on first use, so that `import litgpt` costs no torch.
_EXPORTS = {
    "Config": "litgpt.config",
    "GPT": "litgpt.model",
    "LLM": "litgpt.llm",
    "PromptStyle": "litgpt.prompts",
    "Tokenizer": "litgpt.tokenizer",
}

# What LitGPT's users import from -> where it is.
_ALIASES = {"litgpt.api": "litgpt.llm", "litgpt.lora": "litgpt.adaptation.lora"}

__all__ = ["GPT", "LLM", "Config", "PromptStyle", "Tokenizer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'litgpt' has no attribute {name!r}")


class _Aliases(MetaPathFinder, Loader):
    """Import the modules of `_ALIASES` under their other names: one module, whatever it was imported as."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _ALIASES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(_ALIASES[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        pass  # it has been, under its own name


sys.meta_path.append(_Aliases())


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
