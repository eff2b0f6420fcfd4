"""Files from the Hugging Face Hub: which ones a checkpoint needs, and fetching them.

The hub's address comes from `HF_ENDPOINT`, a token from `--access_token`, `HF_TOKEN` or the client's own login. What
the client's cache holds (`HF_HOME`, `HF_HUB_CACHE`) is taken from there, and with `HF_HUB_OFFLINE` from nowhere else.
"""

from litgpt.hub.hub_error import HubError
from litgpt.hub.repository import Repository, open_repository
from litgpt.hub.selection import ADAPTER_CONFIG, adapter_files, tokenizer_files, weight_files

__all__ = [
    "ADAPTER_CONFIG",
    "HubError",
    "Repository",
    "adapter_files",
    "open_repository",
    "tokenizer_files",
    "weight_files",
]
