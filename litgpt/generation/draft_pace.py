"""Whether drafting pays: speculative decoding that stops where it would slow an answer down."""

from __future__ import annotations

import statistics
from collections import deque

LEARNED = 3  # plain steps whose time is known before anything is drafted
RECENT = 16  # steps whose times count: they grow with the text
TRIAL = 4  # drafted steps that are judged together
FIRST_PAUSE = 16  # plain steps after a trial that did not pay; twice as many after the next, and so on


class DraftPace:
    """Says, step by step, whether the next one is to draft.

    A step that checks drafts takes longer than a plain one, by how much depends on the machine, and makes more tokens,
    how many depends on the text. Both are measured. Where some drafted steps made fewer tokens per second than plain
    ones do, drafting pauses, after each such trial twice as long: what the trials of an answer of n tokens can cost is
    of the order of log n steps.

    Args:
        plain_seconds: What the last plain steps took, which several answers of one engine share.
    """

    def __init__(self, plain_seconds: deque[float]) -> None:
        self.plain_seconds = plain_seconds
        self._drafted: deque[tuple[float, int]] = deque(maxlen=TRIAL)
        self._pause, self._next_pause = 0, FIRST_PAUSE

    def drafts(self) -> bool:
        """Whether the next step is to draft."""
        return len(self.plain_seconds) >= LEARNED and not self._pause

    @property
    def is_paused(self) -> bool:
        """Whether it has stopped for a while."""
        return self._pause > 0

    def note(self, seconds: float, num_proposed: int, num_made: int) -> None:
        """Take note of a step.

        Args:
            seconds: What it took, drafting included.
            num_proposed: How many tokens were drafted for it.
            num_made: How many tokens it made.
        """
        if not num_proposed:
            self.plain_seconds.append(seconds)
            self._pause = max(0, self._pause - 1)
            return
        self._drafted.append((seconds, num_made))
        if len(self._drafted) < TRIAL:
            return
        # Medians: another program may have held one step up.
        median = statistics.median(each for each, _ in self._drafted)
        made = statistics.mean(each for _, each in self._drafted)
        if made * statistics.median(self.plain_seconds) < median:
            self._pause, self._next_pause = self._next_pause, 2 * self._next_pause
            self._drafted.clear()
        else:
            self._next_pause = FIRST_PAUSE


def plain_times() -> deque[float]:
    """Room for what the last plain steps of an engine took."""
    return deque(maxlen=RECENT)
