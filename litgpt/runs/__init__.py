"""The assembly of a training run, under `pretrain` and every `finetune_*`."""
