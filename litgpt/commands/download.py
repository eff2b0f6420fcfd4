"""Get a checkpoint from the Hugging Face Hub."""

from pathlib import Path

from litgpt.hub import download_files
from litgpt.models import find_known, known_checkpoints


def setup(
    repo_id: str,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    convert_checkpoint: bool = True,
    dtype: str | None = None,
    checkpoint_dir: Path = Path("checkpoints"),
    model_name: str | None = None,
) -> None:
    """Download a checkpoint's weights and tokenizer and convert the weights.

    Args:
        repo_id: `org/name` on the Hugging Face Hub, or the short name of a known checkpoint; `litgpt download list`
            shows them. Any other repository of a supported architecture works as well.
        access_token: Token of an account that may read the repository, for gated and private ones. HF_TOKEN works too.
        tokenizer_only: Leave out the weights: enough to pretrain from scratch with this tokenizer.
        convert_checkpoint: Write lit_model.pth beside the downloaded weights.
        dtype: Data type of the converted weights, such as bfloat16; by default that of the downloaded ones.
        checkpoint_dir: The checkpoint goes into CHECKPOINT_DIR/org/name.
        model_name: Name of the known model whose figures to use, where they cannot be told from config.json.
    """
    directory = download(
        repo_id, access_token=access_token, tokenizer_only=tokenizer_only, checkpoint_dir=checkpoint_dir
    )
    if tokenizer_only:
        print(f"Saved the tokenizer to {directory}")
        return
    if convert_checkpoint:
        from litgpt.commands import convert_to_litgpt  # imports torch

        print("Converting checkpoint files to LitGPT format.")
        convert_to_litgpt.setup(directory, model_name=model_name, dtype=dtype)
    else:
        print(f"Saved the checkpoint to {directory}")


def download(
    repo_id: str,
    *,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    checkpoint_dir: Path = Path("checkpoints"),
) -> Path:
    """Fetch a repository's files into `checkpoint_dir/org/name` and return that directory."""
    known = find_known(repo_id)
    repo_id = known.repo_id if known else repo_id
    return download_files(
        repo_id, Path(checkpoint_dir) / repo_id, tokenizer_only=tokenizer_only, access_token=access_token
    )


def print_known_checkpoints() -> None:
    """Print the repository ids of all known checkpoints, one a line, sorted."""
    print("\n".join(sorted(known_checkpoints())))


def print_known_models() -> None:
    """Print the known models, one a line, sorted: the short name, as `pretrain` takes it, and the repository id."""
    known = known_checkpoints().values()
    width = max(len(checkpoint.name) for checkpoint in known)
    print("\n".join(sorted(f"{checkpoint.name:<{width}}  {checkpoint.repo_id}" for checkpoint in known)))
