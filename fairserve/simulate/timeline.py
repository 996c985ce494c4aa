"""Virtual time: a heap of what is to happen. Nobody sleeps, and an hour without events costs nothing."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Act = Callable[[], object]


class Timeline:
    """Acts at equal times happen in the order in which they were asked for, so that runs repeat."""

    def __init__(self) -> None:
        self.now_s = 0.0
        """Seconds since the start of the run."""
        self._heap: list[tuple[float, int, Act]] = []
        self._num_asked = 0

    def at(self, time_s: float, act: Act) -> None:
        """``act`` happens at ``time_s``, which is not before now."""
        assert time_s >= self.now_s, f"{time_s} has passed, it is {self.now_s}"
        self._num_asked += 1
        heapq.heappush(self._heap, (time_s, self._num_asked, act))

    def after(self, delay_s: float, act: Act) -> None:
        self.at(self.now_s + delay_s, act)

    def every(self, period_s: float, act: Act) -> None:
        """``act`` happens each ``period_s`` from now on, for ever."""

        def again() -> None:
            act()
            self.after(period_s, again)

        self.after(period_s, again)

    def run(self, until_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Let everything happen that is due before ``until_s``, or until ``is_over``; then it is ``until_s``."""
        heap = self._heap
        while heap and heap[0][0] < until_s and not is_over():
            self.now_s, _, act = heapq.heappop(heap)
            act()
        self.now_s = until_s
