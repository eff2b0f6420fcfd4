"""LLM, the Python API."""

from litgpt.llm.llm import LLM, load_llm

__all__ = ["LLM", "load_llm"]
