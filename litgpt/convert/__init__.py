"""Checkpoints of other programs: Hugging Face directories and GGUF files, read, converted and written.

One table per architecture (`litgpt.convert.architectures`) serves both directions.
"""

from litgpt.convert.export import export_hf
from litgpt.convert.hf_config import config_from_hf, config_to_hf
from litgpt.convert.source import Source, load_model, open_checkpoint

__all__ = ["Source", "config_from_hf", "config_to_hf", "export_hf", "load_model", "open_checkpoint"]
