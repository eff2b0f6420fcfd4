"""Language models from download to deployment, in code made to be read."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> module that defines it. Imported on first use, so that `import litgpt` costs no torch.
_EXPORTS = {
    "Config": "litgpt.config",
    "GPT": "litgpt.model",
    "LLM": "litgpt.llm",
    "PromptStyle": "litgpt.prompts",
    "Tokenizer": "litgpt.tokenizer",
}

__all__ = ["GPT", "LLM", "Config", "PromptStyle", "Tokenizer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'litgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
