"""A process that has a part of a model and does what rank 0 says; `litgpt.llm.leader` starts it.

Lines of JSON come on standard input: first the job, then what rank 0 does, null at the end. On standard output one line
says that it is ready, or what went wrong.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from litgpt.generation.rank_engine import News, RanksLost, follow
from litgpt.kv_cache import layer_cache_of
from litgpt.llm.child_process import RankJob
from litgpt.parallel.process_group import ProcessGroup
from litgpt.parallel.tensor_parallel import split_model
from litgpt.sources.door import open_model
from litgpt.sources.load import load_model


class Follower:
    """What a rank knows of the others.

    Args:
        job: What rank 0 asks it to load, and where.
        lines: What comes from rank 0.
    """

    def __init__(self, job: RankJob, lines: queue.SimpleQueue[bytes]) -> None:
        self.group = ProcessGroup(job["rank"], job["count"], torch.device(job["device"]))
        self._lines = lines

    def hear(self) -> News | None:
        return json.loads(self._lines.get())

    def tell(self, news: News) -> None:
        raise NotImplementedError("Rank 0 tells.")

    def lost(self, error: BaseException) -> RanksLost:
        raise NotImplementedError("Rank 0 says so.")

    def check(self) -> None:
        pass


def main() -> None:
    """Loads a part of a model and follows rank 0."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(lines,), daemon=True).start()
    code = 0
    try:
        _work(json.loads(lines.get()), lines, replies)
    except BaseException as error:
        code = 1
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
    os._exit(code)  # nothing here is worth a wait, least of all an exchange with who is gone


def _work(job: RankJob, lines: queue.SimpleQueue[bytes], replies: TextIO) -> None:
    torch.set_num_threads(job["threads"])
    ranks = Follower(job, lines)
    if ranks.group.device.type == "cuda":
        torch.cuda.set_device(ranks.group.device)  # or else it would take memory of the first one, too
    model = load_model(
        open_model(job["checkpoint"]),
        dtype=getattr(torch, job["dtype"]),
        device=ranks.group.device,
        quantize=job["quantize"],
        split=partial(split_model, group=ranks.group),
    )
    model.layer_cache = layer_cache_of(job["kv_cache"])
    print(json.dumps({"ready": True}), file=replies, flush=True)
    ranks.group.rendezvous(Path(job["folder"]))
    follow(model, ranks)


def _receive(lines: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(1)  # rank 0 is gone, however: nobody else would say so where an exchange waits for it


if __name__ == "__main__":
    main()
