"""Interactions: user tasks of several calls (FairServe, arXiv 2411.15997, section 2). Who has one under way, which call
is the first, and what was spent on interactions that were cut.

An interaction exists from the moment its first call was accepted here. What a caller says counts for little: an unknown
id is a first call, whatever its index, except in the first ``idle_s`` of an authority, which cannot know what its
predecessor had accepted. An id is worth ``max_calls`` calls and ``max_s`` seconds; then its next call is a first call
again, so that one id for everything buys nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Interaction:
    begun_s: float
    seen_s: float
    num_calls: int = 0
    num_tokens: int = 0
    """Input and output tokens of calls that have ended."""
    open_calls: set[str] = field(default_factory=set)
    is_cut: bool = False
    """The last call was refused. If the caller tries again in time, it goes on: its next call is not a first one."""


class Interactions:
    """Keys are (client, interaction id): nobody can touch another client's. Every method is O(1), amortised."""

    def __init__(self, idle_s: float = 60.0, max_s: float = 600.0, max_calls: int = 300) -> None:
        self._idle_s, self._max_s, self._max_calls = idle_s, max_s, max_calls
        self._known: OrderedDict[tuple[str, str], _Interaction] = OrderedDict()
        """In the order in which they were seen last."""
        self._num_of: dict[str, int] = {}
        self._born_s: float | None = None
        self.num_wasted_tokens = 0
        """Tokens spent on interactions that were cut; falls when one goes on after all."""
        self.num_cut = 0

    def __len__(self) -> int:
        return len(self._known)

    def is_under_way(self, client: str) -> bool:
        return client in self._num_of

    def is_first(self, client: str, interaction: str, call_index: int, now_s: float) -> bool:
        """Whether this call begins something: only such a call may be throttled."""
        if self._born_s is None:
            self._born_s = now_s
        if not interaction:
            return True
        known = self._known.get((client, interaction))
        if known is None:
            return call_index == 0 or now_s - self._born_s > self._idle_s
        return known.num_calls >= self._max_calls or now_s - known.begun_s > self._max_s

    def accepted(self, client: str, interaction: str, request_id: str, now_s: float, *, is_first: bool) -> None:
        if not interaction:
            return
        key = (client, interaction)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Interaction(now_s, now_s)
            self._num_of[client] = self._num_of.get(client, 0) + 1
        if known.is_cut:
            known.is_cut = False
            self._num_of[client] = self._num_of.get(client, 0) + 1
            if not is_first:
                self.num_cut -= 1
                self.num_wasted_tokens -= known.num_tokens
        if is_first:
            known.begun_s, known.num_calls, known.num_tokens = now_s, 0, 0
        known.num_calls += 1
        known.open_calls.add(request_id)
        self._saw(key, known, now_s)

    def waits_again(self, client: str, interaction: str, request_id: str, now_s: float) -> None:
        """A call that was accepted before, here or by a predecessor, is back in the queue."""
        known = self._known.get((client, interaction))
        if known is None:
            self.accepted(client, interaction, request_id, now_s, is_first=True)
        else:
            known.open_calls.add(request_id)
            self._saw((client, interaction), known, now_s)

    def ended(self, client: str, interaction: str, request_id: str, num_tokens: int, now_s: float) -> None:
        """A call left, after ``num_tokens`` of input and output."""
        known = self._known.get((client, interaction))
        if known is not None and request_id in known.open_calls:
            known.open_calls.discard(request_id)
            known.num_tokens += num_tokens
            self.num_wasted_tokens += num_tokens if known.is_cut else 0
            self._saw((client, interaction), known, now_s)

    def cut(self, client: str, interaction: str) -> None:
        """A call was refused. If its interaction has begun, what was spent on it, and what its open calls will still
        come to, is wasted, unless it goes on."""
        known = self._known.get((client, interaction))
        if known is not None and not known.is_cut:
            known.is_cut = True
            self.num_cut += 1
            self.num_wasted_tokens += known.num_tokens
            self._forgot(client)

    def expire(self, now_s: float) -> list[str]:
        """Forget interactions that nothing was heard of for ``idle_s``; the clients that have none under way now."""
        done = []
        while self._known:
            (client, _), known = key_and_value = next(iter(self._known.items()))
            if now_s - known.seen_s <= self._idle_s:
                break
            if known.open_calls:  # a call that waits or runs keeps it alive
                self._saw(key_and_value[0], known, now_s)
                continue
            del self._known[key_and_value[0]]
            if not known.is_cut:
                self._forgot(client)
                if client not in self._num_of:
                    done.append(client)
        return done

    def _saw(self, key: tuple[str, str], known: _Interaction, now_s: float) -> None:
        known.seen_s = now_s
        self._known.move_to_end(key)

    def _forgot(self, client: str) -> None:
        self._num_of[client] -= 1
        if not self._num_of[client]:
            del self._num_of[client]

    def check(self) -> None:
        count: dict[str, int] = {}
        for (client, _), known in self._known.items():
            if not known.is_cut:
                count[client] = count.get(client, 0) + 1
        assert count == self._num_of
