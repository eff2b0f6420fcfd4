"""What other programs call an option that has another name here."""

from litgpt.cli.signature import Signature

# Of transformers and TRL, torchtune, axolotl, vLLM, llama.cpp and their like: a name there, and what it may be here,
# of which a command has one or the other.
OTHER_NAMES = {
    "lr": ("train.learning_rate",),
    "epoch": ("train.epochs",),
    "num_epochs": ("train.epochs",),
    "num_train_epochs": ("train.epochs",),
    "steps": ("train.max_steps",),
    "max_train_steps": ("train.max_steps",),
    "batch_size": ("train.global_batch_size", "max_batch_size"),
    "per_device_train_batch_size": ("train.micro_batch_size",),
    "gradient_accumulation_steps": ("train.global_batch_size",),
    "grad_accum": ("train.global_batch_size",),
    "warmup": ("train.lr_warmup_steps",),
    "warmup_steps": ("train.lr_warmup_steps",),
    "warmup_ratio": ("train.lr_warmup_fraction",),
    "max_grad_norm": ("train.max_norm",),
    "grad_clip": ("train.max_norm",),
    "save_steps": ("train.save_interval",),
    "logging_steps": ("train.log_interval",),
    "eval_steps": ("eval.interval",),
    "seq_len": ("train.max_seq_length",),
    "seq_length": ("train.max_seq_length",),
    "max_length": ("train.max_seq_length", "max_new_tokens"),
    "max_seq_len": ("train.max_seq_length",),
    "block_size": ("train.max_seq_length",),
    "context_length": ("train.max_seq_length",),
    "gradient_checkpointing": ("train.activation_checkpointing",),
    "rank": ("lora_r",),
    "r": ("lora_r",),
    "alpha": ("lora_alpha",),
    "target_modules": ("lora_query",),
    "output_dir": ("out_dir",),
    "output": ("out_dir",),
    "o": ("out_dir",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "d": ("data",),
    "model": ("checkpoint_dir", "model_name", "target_model_checkpoint_dir"),
    "model_name_or_path": ("checkpoint_dir", "model_name", "target_model_checkpoint_dir"),
    "model_path": ("checkpoint_dir", "model_name", "target_model_checkpoint_dir"),
    "m": ("checkpoint_dir", "model_name", "target_model_checkpoint_dir"),
    "base_model": ("checkpoint_dir", "pretrained_checkpoint_dir"),
    "max_tokens": ("max_new_tokens",),
    "max_completion_tokens": ("max_new_tokens",),
    "n_predict": ("max_new_tokens",),
    "n": ("max_new_tokens",),
    "temp": ("temperature",),
    "t": ("temperature",),
    "p": ("prompt", "port"),
    "system": ("sys_prompt", "system_prompt"),
    "system_message": ("sys_prompt", "system_prompt"),
    "system_prompt": ("sys_prompt",),
    "sys_prompt": ("system_prompt",),
    "num_return_sequences": ("num_samples",),
    "chat_template": ("prompt_style",),
    "load_in_4bit": ("quantize",),
    "load_in_8bit": ("quantize",),
    "quantization": ("quantize",),
    "dtype": ("precision",),
    "torch_dtype": ("precision",),
    "tensor_parallel_size": ("devices",),
    "num_gpus": ("devices",),
    "ngpu": ("devices",),
    "gpus": ("devices",),
    "token": ("access_token",),
    "hf_token": ("access_token",),
    "resume_from_checkpoint": ("resume",),
    "c": ("config",),
    "f": ("config",),
}


def here_called(name: str, signature: Signature) -> str:
    """`" Here it is --train.learning_rate."` for `lr`, or `""` where it is not known what is meant."""
    for ours in OTHER_NAMES.get(name.replace("-", "_"), ()):
        if ours in signature.positionals[:1]:
            return f" Here the {ours} stands right after the command, without a name before it."
        if ours == "config" or ours in signature.names():
            return f" Here it is --{ours}."
    return ""
