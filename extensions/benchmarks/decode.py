"""How many tokens a second one request gets on a CPU: ours in each precision and the peers, in turn.

    python extensions/benchmarks/decode.py --checkpoint_dir DIR --gguf FILE.gguf --peers FOLDER [--threads 2] [--runs 7]

FOLDER is what `make_peers.sh` made. Every contender is a process of its own that loads its model once, reads a prompt
and writes `--tokens` tokens greedily whenever it is its turn: A B C A B C. Counted is the time from the first new token
to the last, so neither loading nor the prompt. Ours run the engine's decode step, once as the model itself (eager) and
once in the kernels; building them is waited for, and not counted. Prints medians as a Markdown table.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The history of the printing press begins with"
OURS = ("bf16 eager", "bf16", "int8", "int4")


# --- contenders: each yields new tokens, one at a time, without an end -----------------------------------------------


def ours(kind: str, directory: str) -> Callable[[int], Iterator[int]]:
    import torch

    from litgpt.generation.step_program import StepProgram
    from litgpt.kernels import native
    from litgpt.sources.checkpoint import open_checkpoint
    from litgpt.sources.load import load_model
    from litgpt.tokenizer.tokenizer import Tokenizer

    precision, _, eager = kind.partition(" ")
    source = open_checkpoint(directory)
    model = load_model(source, dtype=torch.bfloat16, quantize=None if precision == "bf16" else precision)
    prompt = torch.as_tensor(Tokenizer(source.files).encode(PROMPT))[None]
    decoder = model if eager else StepProgram(model)

    @torch.inference_mode()
    def write(count: int) -> Iterator[int]:
        cache = model.new_cache(1, 1024)
        token = model(prompt, cache=cache)[:, -1:].argmax(-1)
        cache = cache.select(slice(0, 1))
        for position in range(prompt.size(1), prompt.size(1) + count):
            yield int(token)
            cache.read_only(-(-(position + 1) // 128) * 128)
            token = decoder(token, torch.tensor([[position]]), cache=cache).argmax(-1)

    list(write(2))
    if not eager and native.library() is None:
        sys.exit("there are no kernels")
    return write


def litgpt_peer(kind: str, directory: str) -> Callable[[int], Iterator[int]]:
    from litgpt import LLM

    llm = LLM.load(directory, distribute=None)
    llm.distribute(accelerator="cpu", precision="bf16-true", fixed_kv_cache_size=1024)

    def write(count: int) -> Iterator[int]:
        yield from llm.generate(PROMPT, max_new_tokens=count, top_k=1, stream=True)

    return write


def transformers_peer(kind: str, directory: str) -> Callable[[int], Iterator[int]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    inputs = tokenizer(PROMPT, return_tensors="pt")

    class Stamp:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def write(count: int) -> Iterator[float]:
        stamp = Stamp()
        model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, streamer=stamp)
        yield from stamp.times[1:]  # the first is the prompt

    write.gives_times = True
    return write


def llama_cpp(kind: str, file: str) -> Callable[[int], Iterator[int]]:
    import os

    from llama_cpp import Llama

    threads = int(os.environ["OMP_NUM_THREADS"])
    model = Llama(file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    prompt = model.tokenize(PROMPT.encode())

    def write(count: int) -> Iterator[int]:
        model.reset()
        for number, token in enumerate(model.generate(prompt, temp=0.0)):
            yield token
            if number + 1 == count:
                return

    return write


CONTENDERS = {"ours": ours, "litgpt 0.5.13": litgpt_peer, "transformers": transformers_peer, "llama.cpp": llama_cpp}


def serve(name: str, kind: str, path: str, tokens: int) -> None:
    """Answers every line on standard input with the tokens a second of one run."""
    write = CONTENDERS[name](kind, path)
    print("ready", flush=True)
    for _ in sys.stdin:
        if hasattr(write, "gives_times"):
            times = list(write(tokens))
        else:
            times = [time.perf_counter() for _ in write(tokens)]
        print((len(times) - 1) / (times[-1] - times[0]), flush=True)


# --- the run ---------------------------------------------------------------------------------------------------------


class Contender:
    """A process that waits for its turn."""

    def __init__(self, name: str, kind: str, python: str, path: Path, arguments: argparse.Namespace) -> None:
        import os

        self.name, self.rates = f"{name} {kind}", []
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        environment |= {"PYTHONPATH": str(ROOT)} if name == "ours" else {"PYTHONPATH": ""}
        words = [python, __file__, "--serve", name, kind, str(path), "--tokens", str(arguments.tokens)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(words, env=environment, text=True, cwd="/", **pipes)
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                sys.exit(f"{self.name} did not start: {' '.join(words)}")

    def run(self) -> float:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        rate = float(self.process.stdout.readline())
        print(f"{self.name}: {rate:.1f}", file=sys.stderr, flush=True)
        return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint_dir", type=Path, help="litgpt checkpoint, with Hugging Face weights next to it")
    parser.add_argument("--hf_dir", type=Path, help="the same for transformers; default: the checkpoint directory")
    parser.add_argument("--gguf", type=Path, help="the same for llama.cpp, in 4 bits")
    parser.add_argument("--peers", type=Path, help="the folder of make_peers.sh; without it, ours alone")
    parser.add_argument("--ours", nargs="*", default=OURS, choices=OURS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of one run")
    parser.add_argument("--runs", type=int, default=7, help="of each contender")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve, arguments.tokens)
        return
    directory = arguments.checkpoint_dir.resolve()
    wanted = [("ours", kind, sys.executable, directory) for kind in arguments.ours]
    if arguments.peers:
        folder = arguments.peers.resolve()
        wanted.append(("litgpt 0.5.13", "bf16", str(folder / "litgpt-0.5.13/bin/python"), directory))
        if arguments.hf_dir:
            wanted.append(("transformers", "bf16", sys.executable, arguments.hf_dir.resolve()))
        if arguments.gguf:
            wanted.append(("llama.cpp", "Q4", str(folder / "llama-cpp/bin/python"), arguments.gguf.resolve()))
    contenders = [Contender(name, kind, python, path, arguments) for name, kind, python, path in wanted]
    for contender in contenders:
        contender.run()  # the first run of each warms it up
    for _ in range(arguments.runs):
        for contender in contenders:
            contender.rates.append(contender.run())
    for contender in contenders:
        contender.process.kill()
    first = statistics.median(contenders[0].rates)
    print(f"{arguments.tokens} tokens, {arguments.threads} threads, {arguments.runs} runs each in turn, medians\n")
    print(f"| | tokens/s | spread | of {contenders[0].name} |\n|---|---|---|---|")
    for contender in contenders:
        rate = statistics.median(contender.rates)
        spread = f"{min(contender.rates):.1f} to {max(contender.rates):.1f}"
        print(f"| {contender.name} | {rate:.1f} | {spread} | {rate / first:.2f} |")


if __name__ == "__main__":
    main()
