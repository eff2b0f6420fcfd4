"""Token chunks made on the spot."""

from pathlib import Path

import numpy as np

from litgpt.data.token_chunks import ChunkInfo, token_dtype, write_chunk, write_index

EOS = 0


def write_tokens(directory: Path, chunks: list[int], seed: int = 0, vocab_size: int = 300) -> list[np.ndarray]:
    """Writes random documents, each with EOS at its end, into chunks of this many tokens; the ids of each chunk."""
    rng, infos, ids = np.random.default_rng(seed), [], []
    directory.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)
    for number, left in enumerate(chunks):
        documents = []
        while left:
            document = rng.integers(1, vocab_size, min(left, int(rng.integers(5, 60))))
            document[-1] = EOS
            documents.append(document)
            left -= len(document)
        infos.append(write_chunk(directory / f"chunk-0-{number}.bin", documents, dtype))
        ids.append(np.concatenate(documents))
    write_index(directory, infos, dtype)
    return ids


def write_numbered(directory: Path, chunks: list[int], block: int, vocab_size: int = 1 << 20) -> list[ChunkInfo]:
    """Writes chunks of this many blocks each, the first token of every block a number of its own."""
    infos, number = [], 1
    directory.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)
    for chunk, blocks in enumerate(chunks):
        ids = np.zeros(blocks * block + 1, np.int64)
        ids[: blocks * block : block] = np.arange(number, number + blocks)
        number += blocks
        infos.append(write_chunk(directory / f"chunk-0-{chunk}.bin", [ids], dtype))
    write_index(directory, infos, dtype)
    return infos
