"""Tokenise a corpus for pretraining."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from litgpt.cli.secret import Secret


def setup(
    source_path: str,
    checkpoint_dir: Path,
    destination_path: Path = Path("data/pretrain"),
    split: str = "train,val",
    text_column: str | None = None,
    document_separator: str | None = None,
    val_split_fraction: float | None = None,
    eos_token: str | None = None,
    add_bos: bool = False,
    seed: int = 42,
    num_workers: int | None = None,
    shard: str | None = None,
    merge: bool = False,
    engine: Literal["processes", "ray"] = "processes",
    name: str | None = None,
    revision: str | None = None,
    access_token: Secret | None = None,
    download_dir: Path | None = None,
    overwrite: bool = False,
) -> None:
    r"""Tokenise a corpus into chunks for pretraining: `litgpt pretrain MODEL --data.data_dir DESTINATION_PATH`.

    The corpus is plain text (.txt), JSON (.jsonl, .json), both also compressed (.gz, .zst), or parquet. Every document
    ends with EOS. A document is a record, or of a text file what stands between EOS spelled out, else all of it.

    What is interrupted goes on where it stopped when the same command is run again. The result does not depend on how
    many processes or machines worked on it.

    Args:
        source_path: A file, a folder of them (one with the folders train and val gives both), or a data set on the
            Hugging Face Hub, org/name.
        checkpoint_dir: Checkpoint (a directory, a .gguf file, a known name or a Hub id) whose tokenizer to use; the
            weights are not needed.
        destination_path: Where the folders train and val go, the tokenizer, and dataset.yaml, the record of them.
        split: What to make: train,val or train. Where val has no files of its own, some of train is held out.
        text_column: Column of the text in records; by default text, content, ..., or the only one with texts.
        document_separator: What else stands between the documents of a text file; \n in it is a line break.
        val_split_fraction: Part of the text to hold out; by default 0.05, or about 100 MB of a large corpus. Documents
            are held out one by one; of text files it is the end of each, of 20 and more whole files.
        eos_token: The token that ends a document, where the tokenizer names none.
        add_bos: Also begin each document with BOS.
        seed: Decides which documents are held out.
        num_workers: Processes; by default one for each core. With Ray, the most tasks at a time.
        shard: I/N does only the I-th of N shares, for a cluster with a common file system; slurm takes both from the
            job array. When all are done, run the command with --merge true.
        merge: Finish what the shards have done.
        engine: Where the workers run: processes of this machine, or ray for a Ray cluster with a common file system.
        name: Configuration of a Hub data set.
        revision: Branch, tag or commit of a Hub data set.
        access_token: Token for a gated or private Hub data set, also taken from HF_TOKEN; it is not recorded.
        download_dir: Where a Hub data set's files go; by default data/ORG--NAME.
        overwrite: Replace what an earlier preparation left in destination_path.
    """
    from litgpt.data.corpus import find_corpus
    from litgpt.data.preparation import Shard, prepare
    from litgpt.data.preparation_plan import SPLITS
    from litgpt.sources.find import find_tokenizer

    splits = [part.strip() for part in split.split(",")]
    if not splits or any(part not in SPLITS for part in splits) or "train" not in splits:
        raise ValueError(f"--split {split} is not valid: give train,val or train.")
    share = Shard.parse(shard) if shard is not None else None
    if engine == "ray":
        from litgpt.data.ray_units import require_ray

        require_ray()
    tokenizer_dir = find_tokenizer(checkpoint_dir)
    sources, root = find_corpus(source_path, name, revision, access_token, download_dir)
    try:
        prepare(
            sources,
            root,
            tokenizer_dir,
            destination_path,
            splits=splits,
            text_column=text_column,
            document_separator=document_separator,
            val_split_fraction=val_split_fraction,
            eos_token=eos_token,
            add_bos=add_bos,
            seed=seed,
            num_workers=num_workers,
            shard=share,
            merge=merge,
            engine=engine,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        print("\nInterrupted. What is done is kept: the same command goes on from there.")
        raise SystemExit(130) from None
