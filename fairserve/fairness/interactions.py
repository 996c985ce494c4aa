"""Interactions: user tasks of several calls (FairServe, arXiv 2411.15997, section 2). Who has one under way, which call
is the first, and what was spent on interactions that were cut.

An interaction exists from the moment its first call was accepted here, and has begun once a call of it was granted.
What a caller says counts for little: an unknown id is a first call, whatever its index, except in the first ``idle_s``
of an authority, which cannot know what its predecessor had accepted; but what it refused itself, it knows. An id is
worth ``max_calls`` calls and ``max_s`` seconds; then its next call is a first call again, so that one id for everything
buys nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

MOST_KNOWN = 100_000
"""Interactions beyond which idle ones are forgotten before their time."""


@dataclass(slots=True)
class _Interaction:
    begun_s: float
    seen_s: float
    num_calls: int = 0
    num_tokens: int = 0
    """Input and output tokens of calls that have ended."""
    worth: int = 0
    """Rises with every call that is a first one."""
    begun: int = 0
    """The newest ``worth`` of which a call was granted."""
    open_calls: dict[str, int] = field(default_factory=dict)
    """By request: the ``worth`` that it belongs to."""
    is_cut: bool = False
    """The last call was refused. If the caller tries again in time, it goes on: its next call is not a first one."""
    is_under_way: bool = False
    """Neither cut nor idle."""


class Interactions:
    """Keys are (client, interaction id): nobody can touch another client's. Every method is O(1), amortised."""

    def __init__(self, idle_s: float = 60.0, max_s: float = 600.0, max_calls: int = 300) -> None:
        self._idle_s, self._max_s, self._max_calls = idle_s, max_s, max_calls
        self._known: OrderedDict[tuple[str, str], _Interaction] = OrderedDict()
        """In the order in which they were seen last."""
        self._awake: OrderedDict[tuple[str, str], _Interaction] = OrderedDict()
        """Those that are not idle, in the same order."""
        self._num_of: dict[str, int] = {}
        self._born_s: float | None = None
        self._never_begun: set[tuple[str, str]] = set()
        """Refused here before they began, as long as callers are believed: a second call of such an interaction, sent
        before the first was refused, is in the middle of nothing."""
        self.num_wasted_tokens = 0
        """Tokens spent on interactions that were cut; falls when one goes on after all."""
        self.num_cut = 0

    def __len__(self) -> int:
        """Interactions that are not idle."""
        return len(self._awake)

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
            believes = now_s - self._born_s <= self._idle_s
            if not believes:
                self._never_begun.clear()
            return call_index == 0 or not believes or (client, interaction) in self._never_begun
        return known.num_calls >= self._max_calls or now_s - known.begun_s > self._max_s

    def accepted(self, client: str, interaction: str, request_id: str, now_s: float, *, is_first: bool) -> None:
        if not interaction:
            return
        key = (client, interaction)
        self._never_begun.discard(key)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Interaction(now_s, now_s)
        if known.is_cut:
            known.is_cut = False
            if is_first:  # what was wasted on the one before stays wasted
                known.num_tokens = 0
            else:
                self.num_cut -= 1
                self.num_wasted_tokens -= known.num_tokens
        if is_first:
            known.begun_s, known.num_calls = now_s, 0
            known.worth += 1
        known.num_calls += 1
        known.open_calls[request_id] = known.worth
        self._saw(key, known, now_s)

    def granted(self, client: str, interaction: str, request_id: str) -> None:
        """From now on it has begun."""
        known = self._known.get((client, interaction))
        if known is not None:
            known.begun = max(known.begun, known.open_calls.get(request_id, 0))

    def has_begun(self, client: str, interaction: str, request_id: str) -> bool:
        """Whether a call of the same interaction was granted."""
        known = self._known.get((client, interaction))
        return known is not None and request_id in known.open_calls and known.begun >= known.open_calls[request_id]

    def turned_away(self, client: str, interaction: str, request_id: str) -> list[str]:
        """This call was to begin an interaction, and is refused before it did. Returns all calls that wait for the same
        interaction, this one included: they would be served for nothing."""
        key = (client, interaction)
        known = self._known.get(key)
        if known is None or request_id not in known.open_calls:
            return [request_id]
        worth = known.open_calls[request_id]
        calls = [call for call, its_worth in known.open_calls.items() if its_worth >= worth]
        for call in calls:
            del known.open_calls[call]
        if known.begun:  # an earlier worth of the same id was used up: the caller's task ends in the middle
            known.num_calls = self._max_calls
            self.cut(client, interaction)
        else:
            self._rests(client, known)
            del self._known[key], self._awake[key]
            self._never_begun.add(key)
        return calls

    def waits_again(self, client: str, interaction: str, request_id: str, now_s: float) -> None:
        """A call that was accepted before, here or by a predecessor, is back in the queue."""
        known = self._known.get((client, interaction))
        if known is None:
            self.accepted(client, interaction, request_id, now_s, is_first=True)
        else:
            known.open_calls[request_id] = known.worth
            self._saw((client, interaction), known, now_s)
        self.granted(client, interaction, request_id)

    def ended(self, client: str, interaction: str, request_id: str, num_tokens: int, now_s: float) -> None:
        """A call left, after ``num_tokens`` of input and output."""
        known = self._known.get((client, interaction))
        if known is not None and request_id in known.open_calls:
            del known.open_calls[request_id]
            known.num_tokens += num_tokens
            self.num_wasted_tokens += num_tokens if known.is_cut else 0
            self._saw((client, interaction), known, now_s)

    def cut(self, client: str, interaction: str) -> None:
        """A call was refused. If its interaction has begun, what was spent on it, and what its open calls will still
        come to, is wasted, unless it goes on."""
        known = self._known.get((client, interaction))
        if known is None:
            self._never_begun.add((client, interaction))
        elif not known.is_cut:
            known.is_cut = True
            self.num_cut += 1
            self.num_wasted_tokens += known.num_tokens
            self._rests(client, known)

    def expire(self, now_s: float) -> list[str]:
        """Interactions that nothing was heard of for ``idle_s`` are under way no more; whoever goes on with one within
        ``max_s`` does not begin it anew, and then it is forgotten. Returns the clients that have none under way now."""
        done = []
        while self._awake:
            key, known = next(iter(self._awake.items()))
            if now_s - known.seen_s <= self._idle_s:
                break
            if known.open_calls:  # a call that waits or runs keeps it alive
                self._saw(key, known, now_s)
                continue
            del self._awake[key]
            if known.is_under_way:
                client = key[0]
                self._rests(client, known)
                if client not in self._num_of:
                    done.append(client)
        while self._known:
            key, known = next(iter(self._known.items()))
            if key in self._awake or (now_s - known.seen_s <= self._max_s and len(self._known) <= MOST_KNOWN):
                break
            del self._known[key]
        if self._born_s is not None and now_s - self._born_s > self._idle_s:
            self._never_begun.clear()
        return done

    def _saw(self, key: tuple[str, str], known: _Interaction, now_s: float) -> None:
        known.seen_s = now_s
        self._known.move_to_end(key)
        self._awake[key] = known
        self._awake.move_to_end(key)
        if not known.is_cut and not known.is_under_way:
            known.is_under_way = True
            self._num_of[key[0]] = self._num_of.get(key[0], 0) + 1

    def _rests(self, client: str, known: _Interaction) -> None:
        if known.is_under_way:
            known.is_under_way = False
            self._num_of[client] -= 1
            if not self._num_of[client]:
                del self._num_of[client]

    def check(self) -> None:
        count: dict[str, int] = {}
        for key, known in self._known.items():
            if known.is_under_way:
                count[key[0]] = count.get(key[0], 0) + 1
            assert known.is_under_way == (key in self._awake and not known.is_cut)
            assert key in self._awake or not known.open_calls
        assert count == self._num_of
        assert list(self._known)[len(self._known) - len(self._awake) :] == list(self._awake)
