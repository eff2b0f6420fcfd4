"""Where LitGPT 0.5.13 has the Python API."""

from litgpt.llm import LLM

__all__ = ["LLM"]
