"""Checkpoints written in another format, whole or not at all, with progress: what the convert commands share.

One module per format: Hugging Face's, GGUF, PEFT's, and our own; and a model with its LoRA weights merged.
"""
