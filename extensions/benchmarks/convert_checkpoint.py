"""Converting a Hugging Face checkpoint and exporting it again: time and memory, ours and a peer's in turn.

    python extensions/benchmarks/convert_checkpoint.py --peer /path/to/other/bin/litgpt

makes a checkpoint of the shape of TinyLlama-1.1B (random bfloat16 weights, 2.2 GB in files of 0.5 GB), runs
`litgpt convert_to_litgpt` of each program on it A B A B, then `litgpt convert_from_litgpt` on the result, each run as a
process of its own, and prints the medians of the wall time and of the peak of the resident memory as a Markdown table.
Nothing but the programs is timed; the files are in the page cache for both. `--shard_size` makes more files, or fewer.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import HEADER, Program, alternate, ours_and, table

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes, in the order of the layers."""
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    named = {"model.embed_tokens.weight": (SHAPE["vocab_size"], width)}
    for i in range(SHAPE["num_hidden_layers"]):
        named |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return named | {"model.norm.weight": (width,), "lm_head.weight": (SHAPE["vocab_size"], width)}


def make_checkpoint(directory: Path, shard_size: int) -> None:
    """Writes the checkpoint."""
    # Imported here, in a process of its own: a process begins with the peak memory of the one that started it.
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SHAPE))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes().items():
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    torch.manual_seed(0)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shard.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def convert(program: Program, directory: Path) -> tuple[float, float]:
    """Seconds and peak resident megabytes of one conversion."""
    for name in ("lit_model.pth", "model_config.yaml"):
        (directory / name).unlink(missing_ok=True)
    return measure(program, ["convert_to_litgpt", str(directory)], directory / "lit_model.pth")


def export(program: Program, directory: Path) -> tuple[float, float]:
    """The same of one export of the converted checkpoint, as one file for torch.load: all that the peer can write."""
    destination = directory.with_name("exported")
    shutil.rmtree(destination, ignore_errors=True)
    only = ["--format", "pth"] if program.name == "ours" else []
    command = ["convert_from_litgpt", str(directory), str(destination), *only]
    return measure(program, command, destination / "model.pth")


def measure(program: Program, words: list[str], result: Path) -> tuple[float, float]:
    os.sync()  # what the run before has written must not be written on this one's time
    figures = program.run(words)
    if not result.exists():
        sys.exit(f"{program.name} has written no {result.name}.")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", required=True, help="the other program's `litgpt` command")
    parser.add_argument("--runs", type=int, default=3, help="runs of each program")
    parser.add_argument("--directory", type=Path, default=None, help="where to put 7 GB of files; default: TMPDIR")
    parser.add_argument("--shard_size", type=int, default=500_000_000, help="bytes of one file of the checkpoint")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_checkpoint(arguments.make, arguments.shard_size)
        return
    programs = ours_and(arguments.peer)
    scratch = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.directory))
    try:
        directory = scratch / "tiny-llama-1.1b"
        make = ["--peer", "none", "--make", str(directory), "--shard_size", str(arguments.shard_size)]
        subprocess.run([sys.executable, __file__, *make], check=True)
        files = len(list(directory.glob("*.safetensors")))
        about = [f"- {program.name}: {program.about(scratch)}" for program in programs]
        to_ours = alternate(programs, arguments.runs, lambda program: convert(program, directory))
        to_theirs = alternate(programs, arguments.runs, lambda program: export(program, directory))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(2 * math.prod(shape) for shape in shapes().values())
    print(f"{size / 1e9:.2f} GB of bfloat16 in {files} files, {arguments.runs} runs each, A B A B, medians\n")
    print(
        "\n".join(
            [*about, "", HEADER, table(to_ours, "convert_to_litgpt, "), table(to_theirs, "convert_from_litgpt, ")]
        )
    )


if __name__ == "__main__":
    main()
