"""How much the engine of the VTC paper lets into its batch: S-LoRA's rule, as the capacity of a Dispatcher.

Source: artifact Ying1123/VTC-artifact at 192c2e2, ``slora/server/router/req_queue.py``, ``_can_add_new_req``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from fairserve.dispatch.capacity import Capacity, ReplicaRoom
from fairserve.simulate.records import Arrival

ADAPTER_TOKENS = 32
"""Memory set aside per client of the batch: 4 tokens for each of the 8 ranks of its adapter, although none is used."""
MAX_RUNNING = 1_000
PREFILL_TOKENS = 3_072
"""Prompt tokens of one prefill batch, or a sixth of the memory if that is more."""


class WorstCase:
    """Tokens that a batch holds at worst: with requests in descending order of the output that they have left, the
    maximum over k of left_k * k + (tokens held by the first k). It is the same after a decode step as before.

    ``entries``: (decode step after which it has no output left, tokens held - decode steps done), one per request.
    """

    def __init__(self, entries: Iterable[tuple[int, int]]) -> None:
        ordered = sorted(entries, reverse=True)
        self._ends = [-end for end, _ in ordered]
        self._held = list(accumulate((held for _, held in ordered), initial=0))
        peaks = [end * k + self._held[k] for k, (end, _) in enumerate(ordered, 1)]
        pushed = [peak + end for peak, (end, _) in zip(peaks, ordered, strict=True)]
        self._before = list(accumulate(peaks, max, initial=0))
        self._after = list(accumulate(reversed(pushed), max, initial=0))[::-1]

    def with_one_more(self, left: int, held: int, step: int) -> int:
        """At decode step ``step``, with one more request that has ``left`` output tokens to make and holds ``held``."""
        place = bisect_right(self._ends, -(left + step))
        own = left * (place + 1) + self._held[place] + place * step + held
        return max(self._before[place], own, self._after[place] - step + held)


class PaperCapacity(Capacity):
    """The dispatcher's question whether a request fits, answered by the engine's rule."""

    def __init__(self, arrivals: Mapping[str, Arrival], kv_tokens: int) -> None:
        super().__init__(lookahead=0, stale_s=float("inf"))
        self.kv_tokens = kv_tokens
        self.prefill_tokens = max(kv_tokens // 6, PREFILL_TOKENS)
        self.next_id: Callable[[], str | None] = lambda: None
        """The request that the dispatcher considers now."""
        self._arrivals = arrivals
        self._step: int | None = None
        self.watch(())

    def watch(self, running: Iterable[tuple[Arrival, int]]) -> None:
        """From now on this is the batch, and nothing may be added until :meth:`open`. With each request comes the
        number of decode steps that the engine had done when it was prefilled."""
        self._step = None
        batch = tuple(running)
        self._batch = [(joined + one.max_output - 2, one.num_input + 1 - joined) for one, joined in batch]
        self._clients = {one.client for one, _ in batch}
        self._worst = WorstCase(self._batch)
        self._prefill = 0

    def open(self, step: int) -> None:
        """Requests may be added, ``step`` decode steps having been done."""
        self._step = step

    def close(self) -> None:
        self._step = None

    def fits(self, arrival: Arrival, step: int) -> bool:
        """Whether it may be added to the batch and to what was picked in this round."""
        clients = len(self._clients) + (arrival.client not in self._clients)
        return (
            len(self._batch) < MAX_RUNNING
            and self._prefill + arrival.num_input <= self.prefill_tokens
            and self._worst.with_one_more(arrival.max_output - 1, arrival.num_input + 1, step)
            < self.kv_tokens - ADAPTER_TOKENS * clients
        )

    def can_hold(self, room: ReplicaRoom, need_tokens: int, now_s: float) -> bool:
        request_id = self.next_id() if self._step is not None else None
        return request_id is not None and self._step is not None and self.fits(self._arrivals[request_id], self._step)

    def best_for(self, need_tokens: int, now_s: float) -> ReplicaRoom | None:
        return next((room for room in self if self.can_hold(room, need_tokens, now_s)), None)

    def reserve(self, replica: str, request_id: str, need_tokens: int) -> None:
        """It was picked: the next one must fit beside it."""
        super().reserve(replica, request_id, need_tokens)
        assert self._step is not None, "a grant between two rounds"
        arrival = self._arrivals[request_id]
        self._batch.append((self._step + arrival.max_output - 1, arrival.num_input + 1 - self._step))
        self._clients.add(arrival.client)
        self._worst = WorstCase(self._batch)
        self._prefill += arrival.num_input
