"""What files of other programs mean: Hugging Face's `config.json` and weights, safetensors, GGUF, PEFT.

One table per architecture (`litgpt.formats.architectures`) serves both directions.
"""
