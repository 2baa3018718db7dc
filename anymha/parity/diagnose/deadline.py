"""How long a search may compute."""

from __future__ import annotations

import time


class Deadline:
    """The end of a time in which a thread may compute.

    Its own clock, a call of the system of which some are slow, runs no faster than the machine's:
    that is asked first.
    """

    def __init__(self, seconds: float) -> None:
        self._until, self._asked = time.thread_time() + seconds, time.perf_counter() + seconds

    @property
    def over(self) -> bool:
        """Whether the thread has computed for longer."""
        return time.perf_counter() > self._asked and time.thread_time() > self._until
