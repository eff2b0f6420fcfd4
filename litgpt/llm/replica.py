"""A process that has a whole copy of a model and answers requests with it; `litgpt.llm.replicas` starts it.

Lines of JSON come on standard input: first the job, then requests and which of them are cancelled, null at the end. On
standard output come their outputs, or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TextIO

import torch

from litgpt.generation.request import Output, Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.worker import Ticket
from litgpt.llm.child_process import ReplicaJob
from litgpt.llm.llm import LLM
from litgpt.llm.loading import LoadOptions, load_parts
from litgpt.llm.placement import Placement


def main() -> None:
    """Loads the model and answers."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    code = 0
    try:
        _work(json.loads(sys.stdin.buffer.readline()), replies)
    except BaseException as error:
        code = 1
        _tell(replies, {"error": f"{type(error).__name__}: {error}"})
    os._exit(code)


def _work(job: ReplicaJob, replies: TextIO) -> None:
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or else it would take memory of the first one, too
    options = LoadOptions(job["precision"], job["quantize"], kv_cache=job["kv_cache"])
    llm = LLM(load_parts(job["checkpoint"], options, placement=Placement([device]), max_slots=job["max_slots"]))
    worker = llm.worker
    tickets: dict[int, Ticket] = {}
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if message is None:
            return
        if "cancel" in message:
            if (ticket := tickets.pop(message["cancel"], None)) is not None:
                ticket.cancel()
            continue
        number, fields = message["submit"], message["request"]
        request = Request(**fields | {"sampling": Sampling(**fields["sampling"])})
        tickets[number] = worker.submit(request, partial(_deliver, replies, tickets, number))


def _deliver(replies: TextIO, tickets: dict[int, Ticket], number: int, output: Output | Exception) -> None:
    if isinstance(output, Exception):
        _tell(replies, {"error": f"{type(output).__name__}: {output}"})
        os._exit(1)
    if output.finish_reason is not None:
        tickets.pop(number, None)
    values: dict[str, Any] = asdict(replace(output, request=number, logprobs=[], prompt_logprobs=[]))
    for name in ("logprobs", "prompt_logprobs"):
        values[name] = [(one.token, one.logprob, one.top_logprobs) for one in getattr(output, name)]
    _tell(replies, values)


def _tell(replies: TextIO, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=replies, flush=True)


if __name__ == "__main__":
    main()
