"""The files of a checkpoint directory."""

WEIGHTS = "lit_model.pth"
LORA_WEIGHTS = "lit_model.pth.lora"
ADAPTER_WEIGHTS = "lit_model.pth.adapter"
ADAPTER_V2_WEIGHTS = "lit_model.pth.adapter_v2"
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_V2_WEIGHTS)
ADAPTATIONS = (LORA_WEIGHTS, *ADAPTER_FILES)
TRAINING_STATE = "training_state.pth"
CONFIG = "model_config.yaml"
HYPERPARAMETERS = "hyperparameters.yaml"
PEFT_CONFIG = "adapter_config.json"

# What belongs to a checkpoint besides weights and model_config.yaml, and follows it when it is finetuned or exported.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "prompt_style.yaml",
)
# The same in folders: chat templates that have a name of their own.
COMPANION_PATTERNS = ("additional_chat_templates/*.jinja",)
