"""LLM, the Python API."""

from litgpt.llm.llm import LLM

__all__ = ["LLM"]
