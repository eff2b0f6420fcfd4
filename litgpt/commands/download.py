"""Get a checkpoint from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from litgpt.catalog import known_checkpoints
from litgpt.checkpoint import holds_tokenizer, is_peft_alone
from litgpt.cli.secret import Secret
from litgpt.sources.fetch import download


def setup(
    repo_id: str,
    access_token: Secret | None = None,
    tokenizer_only: bool = False,
    convert_checkpoint: bool = True,
    dtype: str | None = None,
    checkpoint_dir: Path = Path("checkpoints"),
    model_name: str | None = None,
    revision: str | None = None,
    keep_hf_files: bool = True,
) -> None:
    """Download a checkpoint's weights and tokenizer and convert the weights.

    Args:
        repo_id: `org/name` on the Hugging Face Hub, or the short name of a known checkpoint; `litgpt download list`
            shows them. Any other repository of a supported architecture works as well.
        access_token: Token of an account that may read the repository, for gated and private ones. HF_TOKEN works too.
        tokenizer_only: Leave out the weights: enough to pretrain from scratch with this tokenizer.
        convert_checkpoint: Write lit_model.pth next to the downloaded weights. Without it, every command loads the
            downloaded files as they are.
        dtype: Data type of the converted weights, such as bfloat16; by default that of the downloaded ones.
        checkpoint_dir: The checkpoint goes into CHECKPOINT_DIR/org/name.
        model_name: Name of the known model whose figures to use, where they cannot be told from config.json.
        revision: Branch, tag or commit; by default the newest commit of the main branch.
        keep_hf_files: False removes the downloaded weights after the converted ones have been compared with them, so
            that the disk holds them once.
    """
    check_options(tokenizer_only, convert_checkpoint, dtype, keep_hf_files)
    directory = download(
        repo_id,
        access_token=access_token,
        tokenizer_only=tokenizer_only,
        checkpoint_dir=checkpoint_dir,
        model_name=model_name,
        revision=revision,
        convert=convert_checkpoint,
        dtype=dtype,
    )
    if tokenizer_only and (holds_tokenizer(directory) or not is_peft_alone(directory)):
        print(f"Saved the tokenizer to {directory}")
        return
    if is_peft_alone(directory):
        if not keep_hf_files:
            raise ValueError(
                f"--keep_hf_files false has no effect on an adapter (PEFT), which is taken as it is: '{directory}' "
                "has all its files. Leave it out."
            )
        print(f"Saved the adapter to {directory}. Commands open it on its model, which they download if need be.")
    elif convert_checkpoint:
        from litgpt.devices.dtypes import dtype_from_name
        from litgpt.export import lit
        from litgpt.sources.checkpoint import open_checkpoint

        print("Converting checkpoint files to LitGPT format.")
        source = open_checkpoint(directory, model_name, converted=False)
        lit.save_lit(source, directory, dtype_from_name(dtype), in_place=True)
        print(f"Saving converted checkpoint to {directory}")
        if not keep_hf_files:
            remove_originals(directory, model_name, dtype)
    else:
        print(f"Saved the checkpoint to {directory}")


def check_options(tokenizer_only: bool, convert_checkpoint: bool, dtype: str | None, keep_hf_files: bool) -> None:
    """Refuses what is not supported, before anything is downloaded.

    Raises:
        ValueError: an option needs the conversion, which is left out; or there is no such data type.
    """
    left_out = "--tokenizer_only true" if tokenizer_only else "--convert_checkpoint false"
    if dtype is not None:
        from litgpt.devices.dtypes import dtype_from_name

        dtype_from_name(dtype)
    if convert_checkpoint and not tokenizer_only:
        return
    if dtype is not None:
        raise ValueError(
            f"--dtype {dtype} cannot be combined with {left_out}: nothing is converted. Leave one of them out."
        )
    if not keep_hf_files:
        raise ValueError(
            f"--keep_hf_files false cannot be combined with {left_out}: the downloaded files are all there will be. "
            "Leave one of them out."
        )


def remove_originals(directory: Path, model_name: str | None, dtype: str | None) -> None:
    """Removes the downloaded weights, once every converted tensor is found to be what they say.

    Raises:
        ValueError: one differs; then nothing is removed.
    """
    from litgpt.checkpoint import WEIGHTS, hf_weight_files, read_state_dict
    from litgpt.devices.dtypes import dtype_from_name
    from litgpt.sources.checkpoint import open_checkpoint
    from litgpt.sources.fit import same_values
    from litgpt.sources.weight_stream import WeightProgress

    source = open_checkpoint(directory, model_name, converted=False)
    converted = read_state_dict(directory / WEIGHTS, check=False)  # each value is compared below
    left = set(converted)
    for name, tensor in WeightProgress(source, dtype=dtype_from_name(dtype), title="Comparing")(source.weights()):
        if name not in converted or not same_values(tensor, converted[name], converted.release):
            left.add(name)
            break
        left.discard(name)
    if left:
        raise ValueError(
            f"'{directory / WEIGHTS}' differs from the downloaded weights ({sorted(left)[0]}), so that these are kept. "
            "Check the disk, and convert again with `litgpt convert_to_litgpt`."
        )
    files = [*directory.glob("*.index.json"), *hf_weight_files(directory)]
    freed = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    print(f"Removed the downloaded weights ({freed / 1e9:,.2f} GB): {WEIGHTS} holds the same.")


def print_known_checkpoints() -> None:
    """Print the repository ids of all known checkpoints, one a line, sorted."""
    print("\n".join(sorted(known_checkpoints())))


def print_known_models() -> None:
    """Print the known models, one a line, sorted: the short name, as `pretrain` takes it, and the repository id."""
    known = known_checkpoints().values()
    width = max(len(checkpoint.name) for checkpoint in known)
    print("\n".join(sorted(f"{checkpoint.name:<{width}}  {checkpoint.repo_id}" for checkpoint in known)))
