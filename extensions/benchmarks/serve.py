"""Many clients at once on `litgpt serve`, ours and a peer's in turn, through HTTP and the `openai` client.

    python extensions/benchmarks/serve.py --checkpoint DIR --peer /path/to/other/bin/litgpt
    python extensions/benchmarks/serve.py --checkpoint DIR --peer FOLDER/llama-cpp/bin/python --gguf FILE.gguf

The second is against llama.cpp's server (`make_peers.sh` builds both) with the same file: DIR may be FILE.gguf, too, of
which `--ours --quantize gguf` takes the weights as they lie. All have as many threads (--threads).

It starts each program's server A B A B, has it answer the same requests by 32 clients (prompts and answers of mixed
lengths, drawn by the request's number, streamed), and prints, as a Markdown table, the medians over the runs of: tokens
per second over all, seconds to the first piece of text (median and 95th percentile over the requests), and how many
requests failed. Loading and one request to warm up come before the clock starts. Tokens are counted by encoding the
answers' texts with the checkpoint's tokenizer, for both programs alike: the peer reports no usage.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from side_by_side import ROOT, Program, ours_and

sys.path.insert(0, str(ROOT))
from litgpt.sources.door import open_model
from litgpt.tokenizer.tokenizer import Tokenizer

TEXT = ROOT / "config_hub/pretrain/data/shakespeare.txt"
PATIENCE = 3600  # seconds that a server may take for anything


@dataclass
class Job:
    """A request."""

    prompt: str
    max_tokens: int


@dataclass
class Answer:
    """What came of it."""

    text: str
    first: float
    """Seconds to the first piece of text."""
    failed: str = ""


@dataclass
class Result:
    """What came of a run."""

    speed: float
    """Tokens per second."""
    first: float
    late: float
    """Seconds to the first piece, the median and the 95th percentile."""
    failed: int


def jobs(count: int, longest: int) -> list[Job]:
    """Prompts of 5 to 300 words of Shakespeare, and how long their answers may be."""
    words, draws = TEXT.read_text().split(), random.Random(0)
    made = []
    for _ in range(count):
        size, start = round(5 * 60 ** draws.random()), draws.randrange(len(words) - 400)
        passage = " ".join(words[start : start + size])
        made.append(Job(f"Continue this text:\n{passage}", draws.randrange(16, longest + 1)))
    return made


def command_of(program: Program, arguments: argparse.Namespace, port: int) -> list[str]:
    """What starts a program's server."""
    if program.name == "peer" and arguments.gguf:
        threads = ["--n_threads", str(arguments.threads), "--n_threads_batch", str(arguments.threads)]
        model = ["--model", arguments.gguf, "--n_ctx", "2048", *threads]
        return [str(program.python), "-m", "llama_cpp.server", *model, "--host", "127.0.0.1", "--port", str(port)]
    options = ["--port", str(port), "--openai_spec", "true", "--timeout", str(PATIENCE)]
    options += ["--max_new_tokens", str(arguments.max_tokens)]  # the peer does not mind the request's max_tokens
    options += ["--precision", arguments.precision, *(arguments.ours if program.name == "ours" else [])]
    return [*program.command, "serve", arguments.checkpoint, *options]


def run(program: Program, arguments: argparse.Namespace, work: list[Job], tokenizer: Tokenizer) -> Result:
    """One server from start to end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = command_of(program, arguments, port)
    environment = program.environment | {"OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryFile() as log:
        # A group of its own: the peer's server is several processes.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            asyncio.run(answer(port, [Job("Hello", 8)], 1, ready=lambda: process.poll() is None))
            start = time.perf_counter()
            answers = asyncio.run(answer(port, work, arguments.clients))
            seconds = time.perf_counter() - start
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.seek(0)
            if arguments.verbose:
                sys.stderr.buffer.write(log.read()[-4000:])
    good = [answer for answer in answers if not answer.failed]
    if not good:
        sys.exit(f"{program.name} has answered nothing: {answers[0].failed}")
    tokens = sum(len(tokenizer.encode_ids(answer.text, bos=False)) for answer in good)
    firsts = sorted(answer.first for answer in good)
    late = firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]
    return Result(tokens / seconds, statistics.median(firsts), late, len(answers) - len(good))


async def answer(port: int, work: list[Job], clients: int, ready=None) -> list[Answer]:
    """The answers to all jobs, by this many clients at a time; `ready` waits for the server as long as it is true."""
    base = f"http://127.0.0.1:{port}"
    if ready is not None:
        async with httpx.AsyncClient() as client:
            deadline = time.monotonic() + PATIENCE
            while True:
                if not ready() or time.monotonic() > deadline:
                    sys.exit("The server has ended before it was ready. --verbose shows what it said.")
                try:
                    # llama.cpp's server has no /health, and lists its models once they are there.
                    codes = [(await client.get(f"{base}/{page}")).status_code for page in ("health", "v1/models")]
                    if codes[0] == 200 or codes == [404, 200]:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.5)
    limits = httpx.Limits(max_connections=clients)
    client = openai.AsyncOpenAI(
        base_url=f"{base}/v1",
        api_key="none",
        max_retries=0,
        timeout=PATIENCE,
        http_client=httpx.AsyncClient(limits=limits, timeout=PATIENCE),
    )
    try:
        model = (await client.models.list()).data[0].id
    except openai.NotFoundError:  # the peer has no such list, and takes any name
        model = "model"
    left, answers = list(enumerate(work)), [Answer("", 0.0, "not asked")] * len(work)

    async def one_client() -> None:
        while left:
            index, job = left.pop(0)
            answers[index] = await ask(client, model, job)

    await asyncio.gather(*(one_client() for _ in range(min(clients, len(work)))))
    return answers


async def ask(client: openai.AsyncOpenAI, model: str, job: Job) -> Answer:
    start, first, text = time.perf_counter(), 0.0, ""
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": job.prompt}],
            max_tokens=job.max_tokens,
            temperature=1.0,
            stream=True,
        )
        async for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                first = first or time.perf_counter() - start
                text += piece
    except openai.OpenAIError as error:
        return Answer(text, first, str(error) or type(error).__name__)
    return Answer(text, first, "" if text else "no text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a litgpt checkpoint that both programs can read")
    parser.add_argument("--peer", required=True, help="the other program's `litgpt` command, or llama.cpp's python")
    parser.add_argument("--gguf", help="the same weights for llama.cpp's server")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=3, help="runs of each program")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=128, help="of the longest answer")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="last: further options of our server")
    parser.add_argument("--verbose", action="store_true", help="show what the servers print")
    arguments = parser.parse_args()
    programs = ours_and(arguments.peer)
    work, tokenizer = jobs(arguments.requests, arguments.max_tokens), Tokenizer(open_model(arguments.checkpoint).files)
    with tempfile.TemporaryDirectory() as scratch:
        about = [f"- {name_of(program, arguments)}: {versions(program, arguments, scratch)}" for program in programs]
    results: dict[str, list[Result]] = {program.name: [] for program in programs}
    for _ in range(arguments.runs):
        for program in programs:
            result = run(program, arguments, work, tokenizer)
            results[program.name].append(result)
            print(f"{program.name}: {result}", file=sys.stderr)
    name = Path(arguments.checkpoint).name
    print(
        f"{name}, {arguments.precision}, {os.cpu_count()} CPU cores; {arguments.clients} clients, {len(work)} requests"
    )
    print(f"of up to {arguments.max_tokens} tokens; {arguments.runs} runs each, A B A B, medians\n")
    print("\n".join(about))
    print("\n| | tokens/s | first text, median s | 95th percentile, s | failed |\n|---|---|---|---|---|")
    rows = {name: [statistics.median(column) for column in columns(runs)] for name, runs in results.items()}
    for name, row in rows.items():
        print(f"| {name} | {row[0]:.1f} | {row[1]:.2f} | {row[2]:.2f} | {row[3]:.0f} |")
    ours, peer = rows["ours"], rows["peer"]
    print(f"| ours / peer | {ours[0] / peer[0]:.1f} | {ours[1] / peer[1]:.3f} | {ours[2] / peer[2]:.3f} | |")


def name_of(program: Program, arguments: argparse.Namespace) -> str:
    return "llama.cpp" if program.name == "peer" and arguments.gguf else program.name


def versions(program: Program, arguments: argparse.Namespace, scratch: str) -> str:
    if name_of(program, arguments) != "llama.cpp":
        return program.about(Path(scratch))
    script = "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__)"
    done = subprocess.run([str(program.python), "-c", script], capture_output=True, text=True, check=True)
    return f"{done.stdout.strip()}, {Path(arguments.gguf).name}"


def columns(runs: list[Result]) -> list[list[float]]:
    return [[getattr(result, name) for result in runs] for name in ("speed", "first", "late", "failed")]


if __name__ == "__main__":
    main()
