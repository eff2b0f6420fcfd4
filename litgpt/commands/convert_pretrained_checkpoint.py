"""Make a checkpoint that training can start from anew out of one that training saved."""

from pathlib import Path

from litgpt.export.lit import save_lit
from litgpt.sources.door import open_merged


def setup(checkpoint_dir: Path, output_dir: Path) -> None:
    """Copy a checkpoint of pretraining without its training state.

    What is copied are the weights, the model's configuration and the tokenizer; the state of the optimizer, the
    position in the data and the record of the run stay behind. Checkpoints that `litgpt pretrain` writes also serve as
    they are, as `--initial_checkpoint_dir` for example; those of LitGPT hold the weights among the training state.

    Args:
        checkpoint_dir: The checkpoint directory, such as out/pretrain/final, or what else names a model.
        output_dir: The directory to create.
    """
    save_lit(open_merged(checkpoint_dir), output_dir)
    print(f"Saved the weights without training state to {output_dir}")
