"""After which step several ranks stop that are asked to: the same one on each, without a word through the devices."""

from __future__ import annotations

from itertools import count

from litgpt.parallel.ranks import store_of_ranks

_runs = count()  # of this process; every rank begins the same ones


class LastStep:
    """Steps are begun one after the other, until a rank asks for a stop: then the newest that any rank has begun is the
    last one, for all of them.

    Ranks do not begin a step at the same time: on GPUs the host of one may be several ahead of another's. So what has
    been begun is noted in the store over which the processes met (on the host of rank 0). Each rank asks there before
    each step, which takes a tenth of a millisecond on one machine, and waits for no other rank and no device.

    Args:
        step: How many steps are done at the start, the same on every rank.
    """

    def __init__(self, step: int) -> None:
        self.store = store_of_ranks()
        self.key = f"litgpt/last_step/{next(_runs)}"
        # The newest step that was begun; and, after a space, why it is the last one.
        self._replace("", str(step))

    def ask_to_stop(self, reason: str) -> None:
        """The newest step is the last one. Where several ask, the first one's reason counts. A handler of signals may
        call this at any time."""
        entry = self.store.get(self.key).decode()
        while " " not in entry:
            entry = self._replace(entry, f"{entry} {reason}")

    def begin(self, step: int) -> str | None:
        """None if this rank may begin a step, counted from 1; otherwise why it must not."""
        newest, _, reason = self._replace(str(step - 1), str(step)).partition(" ")
        return reason if reason and step > int(newest) else None

    def _replace(self, seen: str, by: str) -> str:
        """What the store holds from now on: `by`, or what is there by now instead of what was seen."""
        return self.store.compare_set(self.key, seen, by).decode()
