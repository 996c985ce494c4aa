"""What people read of the counter actor, put together so that decisions hardly notice.

Answers are cached: one kind of answer is built at most once a second, and so seldom that building takes at most a
twentieth of the time. Building is done in slices of about a millisecond, between which the event loop is free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.events import event_view
from fairserve.dispatch.history import SPAN_S, HistoryBook, Row
from fairserve.dispatch.overview import Moment, Values, busiest, client_view, known_clients, lead, look, overview
from fairserve.dispatch.pages import Ranking
from fairserve.errors import InvalidRequest, UnknownClient

FRESH_S = 1.0
MOST_OF_TIME = 0.05
MAX_ANSWERS = 32
MAX_TOP, MAX_PAGE, MAX_EVENTS, MAX_SERIES = 1_000, 1_000, 1_000, 50
CHOOSE_EVERY_S = 10
NUM_CHOSEN = 100
"""Clients that history takes in, the busiest first, each time that it chooses."""
ORDERS = ("name", "service", "service_per_s", "waiting", "running", "lead", "weight")

Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Cached:
    task: asyncio.Task[Any]
    due_s: float


@dataclass(frozen=True, slots=True)
class About:
    """What the dispatcher does not know of itself."""

    model: str
    prediction: str


class Reading:
    """``dispatcher`` and ``about`` answer for now: both may be exchanged. ``clock_s`` is the authority's clock,
    ``unix_s`` the wall's, ``cpu_s`` counts the CPU time of this thread."""

    def __init__(
        self,
        dispatcher: Callable[[], Dispatcher],
        about: Callable[[], About],
        clock_s: Callable[[], float],
        *,
        unix_s: Callable[[], float] = time.time,
        cpu_s: Callable[[], float] = time.thread_time,
        history: HistoryBook | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._about = about
        self._clock_s = clock_s
        self._unix_s = unix_s
        self._cpu_s = cpu_s
        self._answers: dict[Hashable, _Cached] = {}
        self.history_book = history or HistoryBook()
        self._started_s = unix_s()
        self._sampled_s: int | None = None
        self._chosen_s = -CHOOSE_EVERY_S
        self._sampled: dict[str, None] = {}

    # -- answers ------------------------------------------------------------------------------------------------------

    async def overview(self, top: int = 50, search: str | None = None) -> Values:
        """As ``views.Overview``. With ``search`` its clients are those whose names contain it, and there are no others.

        Raises:
            InvalidRequest: ``top`` is out of range.
        """
        _check("top", top, 0, MAX_TOP)
        picture = await self._once(("overview", top), lambda: self._overview(top))
        if search:
            page = await self.clients(limit=top, order="service_per_s", search=search)
            return {**picture, "clients": page["clients"], "others": None}
        return picture

    async def clients(
        self, offset: int = 0, limit: int = 100, order: str = "service", search: str | None = None
    ) -> Values:
        """As ``views.ClientPage``, of all clients that are known.

        Raises:
            InvalidRequest: a number is out of range, or there is no such order.
        """
        _check("offset", offset, 0, None)
        _check("limit", limit, 1, MAX_PAGE)
        if order not in ORDERS:
            raise InvalidRequest(f"no order {order!r}: there are {', '.join(ORDERS)}", "order")
        moment, ranking = await self._once(("clients", order, search), lambda: self._ranking(order, search))
        names = ranking.page(offset, limit)
        now = Moment(self._dispatcher(), self._clock_s(), self._offset_s, (), moment.least)
        return {"total": len(ranking), "offset": offset, "clients": [client_view(now, name) for name in names]}

    async def client(self, name: str) -> Values:
        """As ``views.ClientView``, as of now; its lead is measured from a level up to a second old.

        Raises:
            UnknownClient: no client of that name is known.
        """
        moment = await self._once("moment", self._look)
        dispatcher = self._dispatcher()
        if name not in dispatcher.queue.table or name.endswith("/"):
            raise UnknownClient(name)
        return client_view(Moment(dispatcher, self._clock_s(), self._offset_s, (), moment.least), name)

    async def history(self, clients: Sequence[str], since_s: float = 0, resolution_s: int = 1) -> Values:
        """As ``views.History``. A client that is not kept has nulls throughout.

        Raises:
            InvalidRequest: another resolution, or too many clients.
        """
        if resolution_s not in SPAN_S:
            raise InvalidRequest(f"resolution must be 1 or 60 seconds, not {resolution_s}", "resolution")
        _check("number of clients", len(clients), 0, MAX_SERIES)
        names, since_s = tuple(dict.fromkeys(clients)), since_s // resolution_s * resolution_s
        book = self.history_book
        answer: Values = await self._once(
            ("history", names, since_s, resolution_s),
            lambda: book.series(names, since_s, resolution_s, self._unix_s()),
        )
        return answer

    async def events(self, after_seq: int = 0, limit: int = 200) -> list[Values]:
        """As ``views.EventView``, oldest first.

        Raises:
            InvalidRequest: a number is out of range.
        """
        _check("after", after_seq, 0, None)
        _check("limit", limit, 1, MAX_EVENTS)
        offset_s = self._offset_s
        return [event_view(event, offset_s) for event in self._dispatcher().events.after(after_seq, limit)]

    # -- history ------------------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Call it a few times a second: once in every second it notes where clients stand."""
        time_s = int(self._unix_s())
        if time_s != self._sampled_s:
            self._sampled_s = time_s
            await self._drive(self._sample(time_s))

    def take_new_rows(self) -> list[Row]:
        """Points of history that no store has yet."""
        return self.history_book.take_new_rows()

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _offset_s(self) -> float:
        return self._unix_s() - self._clock_s()

    def _look(self) -> Generator[None, None, Moment]:
        return look(self._dispatcher(), self._clock_s(), self._offset_s)

    def _overview(self, top: int) -> Generator[None, None, Values]:
        moment = yield from self._look()
        picture = yield from overview(moment, top)
        about = self._about()
        return picture | {"started_s": self._started_s, "model": about.model, "prediction": about.prediction}

    def _ranking(self, order: str, search: str | None) -> Generator[None, None, tuple[Moment, Ranking]]:
        moment = yield from self._look()
        dispatcher, now_s = moment.dispatcher, moment.now_s
        value: dict[str, Callable[[str], float]] = {
            "service": dispatcher.ledger.service,
            "service_per_s": lambda client: dispatcher.recent.service_per_s(client, now_s),
            "waiting": dispatcher.room.num_waiting,
            "running": dispatcher.leases.num_of,
            "lead": lambda client: lead(moment, client),
            "weight": dispatcher.queue.table.weight,
        }
        ranking = Ranking(known_clients(dispatcher), value.get(order), search)
        yield from ranking.steps()
        return moment, ranking

    def _sample(self, time_s: int) -> Generator[None, None, None]:
        moment = yield from self._look()
        dispatcher, book = moment.dispatcher, self.history_book
        if time_s - self._chosen_s >= CHOOSE_EVERY_S or len(book) < NUM_CHOSEN:
            self._chosen_s = time_s
            chosen = yield from busiest(moment, NUM_CHOSEN)
            book.choose(chosen, time_s)
        before, self._sampled = self._sampled, {}
        for name in dict.fromkeys((*(name for name in moment.active if name in book), *before)):
            waiting = dispatcher.room.num_waiting(name)
            if waiting or dispatcher.leases.num_of(name) or dispatcher.recent.service_per_s(name, moment.now_s):
                self._sampled[name] = None
            elif name not in before:
                continue  # a last point says that it has nothing to do; until it has, there are no more
            book.record(name, (time_s, dispatcher.ledger.service(name), waiting, lead(moment, name)))

    async def _once(self, key: Hashable, build: Callable[[], Generator[None, None, Answer]]) -> Answer:
        """The answer of that kind; a new one if the last is old, built once however many ask."""
        now_s = self._clock_s()
        cached = self._answers.pop(key, None)
        if cached is None or (cached.task.done() and now_s >= cached.due_s):
            cached = _Cached(asyncio.create_task(self._build(key, build)), now_s + FRESH_S)
        self._answers[key] = cached  # the latest asked for stands last
        if len(self._answers) > MAX_ANSWERS:
            del self._answers[next(iter(self._answers))]
        answer: Answer = await asyncio.shield(cached.task)
        return answer

    async def _build(self, key: Hashable, build: Callable[[], Generator[None, None, Answer]]) -> Answer:
        answer, cpu_s = await self._drive(build())
        cached = self._answers.get(key)
        if cached is not None:
            cached.due_s = max(cached.due_s, self._clock_s() + cpu_s / MOST_OF_TIME)
        if isinstance(answer, dict) and "verdict" in answer:
            answer["built_in_s"] = cpu_s
        return answer

    async def _drive(self, steps: Generator[None, None, Answer]) -> tuple[Answer, float]:
        """Run it to its end, step by step. Returns what it returns, and its CPU seconds."""
        cpu_s = 0.0
        while True:
            began_s = self._cpu_s()
            try:
                next(steps)
            except StopIteration as end:
                return end.value, cpu_s + self._cpu_s() - began_s
            cpu_s += self._cpu_s() - began_s
            await asyncio.sleep(0)


def told(entry: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Of an entry of the audit log: who, what in words, and which client."""
    action, target, before, after = (entry[field] for field in ("action", "target", "before", "after"))
    if action.startswith("key."):
        verb = "created" if action == "key.create" else "revoked"
        return entry["who"], f"the API keys: {verb} {target}", (after or before).get("client")
    if action == "counters.import":
        return entry["who"], f"the counters: imported those of {after['clients']:,} clients", None
    fields = (f"{name} from {before.get(name)} to {value}" for name, value in after.items())
    subject = f"client {target}: " if action == "client" else ""
    return entry["who"], subject + ", ".join(fields), target if action == "client" else None


def _check(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"between {least} and {most:,}"
        raise InvalidRequest(f"{name} must be {allowed}, not {value}", name)
