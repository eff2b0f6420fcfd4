"""One module per architecture. A new one is added to this list, and is then read, written and exported."""

from litgpt.convert.architectures.gpt_neox import GPT_NEOX
from litgpt.convert.architectures.llama import LLAMA

ARCHITECTURES = {architecture.name: architecture for architecture in (LLAMA, GPT_NEOX)}
