"""What people read of the counter actor: built once a second however many ask, in steps, and right. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from benchmarks.crowd import Crowd, Size
from fairserve.clock import VirtualClock
from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.reading import ORDERS, About, Reading, told
from fairserve.config import FairServeArgs
from fairserve.dispatch.controls import Control
from fairserve.dispatch.overview import client_view, look
from fairserve.dispatch.pages import SLICE
from fairserve.errors import InvalidRequest, UnknownClient
from fairserve.views import ClientPage, ClientView, EventView, History, Overview

UNIX_S = 1_700_000_040.0


class Room:
    """A crowd, somebody who reads of it, and their clocks."""

    def __init__(self, size: Size) -> None:
        self.crowd = Crowd(size)
        self.began_s = self.crowd.now_s
        self.cpu_s = 0.0
        self.cpu_of_a_step_s = 0.0
        self.num_steps = 0
        self.reading = Reading(
            lambda: self.crowd.dispatcher,
            lambda: About("tiny", "none"),
            lambda: self.crowd.now_s,
            unix_s=lambda: UNIX_S + self.crowd.now_s - self.began_s,
            cpu_s=self._cpu_s,
        )

    def _cpu_s(self) -> float:
        self.num_steps += 1
        self.cpu_s += self.cpu_of_a_step_s / 2  # asked before and after each step
        return self.cpu_s

    async def live(self, seconds: float) -> None:
        """Time passes as it does in the actor: ten ticks a second."""
        for _ in range(round(10 * seconds)):
            self.crowd.now_s += 0.1
            self.crowd.dispatcher.tick(self.crowd.now_s)
            await self.reading.tick()

    def serve(self) -> None:
        """Every slot runs a request and makes tokens for a second."""
        self.crowd.grant()
        self.crowd.start()
        for _ in range(30):
            self.crowd.step()
        self.crowd.finish()


@pytest.fixture
def room() -> Room:
    return Room(Size(300, 200, 2))


async def test_budgets_are_told_of_the_clients_that_are_shown_and_of_no_others(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.serve()
    await room.live(2)
    reading, budgets = room.reading, room.crowd.dispatcher.budgets
    asked: list[str] = []
    views = budgets.views

    def listening(client: str) -> list[dict[str, Any]]:
        asked.append(client)
        return views(client)

    monkeypatch.setattr(budgets, "views", listening)
    busiest = (await reading.overview(3))["clients"][0]["name"]
    assert (busiest in asked, len(asked)) == (True, 3)
    room.crowd.dispatcher.control(busiest, Control(budgets={"day": {"soft": 1, "hard": 10**9}}), room.crowd.now_s)
    await room.live(2)
    shown = {client.name: client.budgets for client in Overview.model_validate(await reading.overview(3)).clients}
    (budget,) = shown.pop(busiest)
    assert (budget.window, budget.soft, budget.hard, budget.of) == ("day", 1, 10**9, busiest)
    assert not any(shown.values())
    page = ClientPage.model_validate(await reading.clients(search=busiest))
    assert [client.budgets for client in page.clients if client.name == busiest] == [(budget,)]


async def test_every_answer_has_the_shape_that_was_promised(room: Room) -> None:
    room.serve()
    await room.live(2)
    reading = room.reading
    overview = Overview.model_validate(await reading.overview())
    assert (overview.model, overview.prediction, overview.started_s) == ("tiny", "none", UNIX_S)
    assert overview.num_clients == 300 and len(overview.clients) == 50 and overview.service_per_s > 0
    page = ClientPage.model_validate(await reading.clients(limit=10))
    assert page.total == 300 and page.clients[0].service >= page.clients[9].service > 0
    await room.live(12)
    name = page.clients[0].name
    assert ClientView.model_validate(await reading.client(name)).service == page.clients[0].service
    history = History.model_validate(await reading.history([name], since_s=UNIX_S))
    assert history.clients[name].service[-1] == page.clients[0].service
    events = [EventView.model_validate(event) for event in await reading.events()]
    assert [event.kind for event in events][:2] == ["joined", "joined"]


@pytest.mark.parametrize("order", ORDERS)
async def test_pages_come_in_the_order_asked_for(room: Room, order: str) -> None:
    room.serve()
    await room.live(2)
    page = await room.reading.clients(limit=300, order=order)
    values = [client[order] for client in page["clients"]]
    assert values == sorted(values, reverse=order != "name")
    assert len({client["name"] for client in page["clients"]}) == 300
    part = await room.reading.clients(offset=100, limit=50, order=order)
    assert part["clients"] == page["clients"][100:150] and part["offset"] == 100


async def test_a_search_finds_clients_that_are_idle(room: Room) -> None:
    assert (await room.reading.clients(search="client-29"))["total"] == 11
    overview = await room.reading.overview(search="CLIENT-29")
    assert [client["name"] for client in overview["clients"]] == ["client-29", *(f"client-29{i}" for i in range(10))]
    assert overview["others"] is None and overview["num_clients"] == 300


def answers(reading: Reading) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {
        "overview": reading.overview,
        "clients": reading.clients,
        "history": lambda: reading.history(["client-1"], since_s=1.5),
    }


@pytest.mark.parametrize("what", ["overview", "clients", "history"])
async def test_however_many_ask_an_answer_is_built_once_a_second(room: Room, what: str) -> None:
    ask = answers(room.reading)[what]
    before = room.num_steps
    await ask()
    once = room.num_steps - before
    await asyncio.gather(*(ask() for _ in range(20)))
    room.crowd.now_s += 0.9
    await asyncio.gather(*(ask() for _ in range(20)))
    assert room.num_steps == before + once
    room.crowd.now_s += 0.2
    await asyncio.gather(*(ask() for _ in range(20)))
    assert room.num_steps == before + 2 * once


async def test_what_takes_long_to_build_is_built_more_seldom(room: Room) -> None:
    room.cpu_of_a_step_s = 0.1
    first = await room.reading.overview()
    assert first["built_in_s"] >= 0.1
    room.crowd.now_s += 19 * first["built_in_s"]
    assert await room.reading.overview() is first
    room.crowd.now_s += 2 * first["built_in_s"]
    assert await room.reading.overview() is not first


async def test_between_two_steps_the_loop_is_free() -> None:
    room = Room(Size(6 * SLICE, 6 * SLICE, 2))
    num_turns, is_done = 0, False

    async def others() -> None:
        nonlocal num_turns
        while not is_done:
            num_turns += 1
            await asyncio.sleep(0)

    busy = asyncio.create_task(others())
    for num_least, ask in ((12, room.reading.overview), (12, lambda: room.reading.clients(5 * SLICE, 10))):
        before = num_turns
        await ask()
        assert num_turns - before >= num_least
    is_done = True
    await busy


async def test_answers_that_nobody_asks_for_any_more_are_forgotten(room: Room) -> None:
    for i in range(100):
        await room.reading.clients(search=f"client-{i}")
    assert len(room.reading._answers) <= 32


async def test_a_dispatcher_that_was_exchanged_is_read_from_the_next_answer_on(room: Room) -> None:
    assert (await room.reading.overview())["num_clients"] == 300
    room.crowd = Crowd(Size(7, 7, 1))
    room.crowd.now_s += 2.0
    assert (await room.reading.overview())["num_clients"] == 7
    with pytest.raises(UnknownClient):
        await room.reading.client("client-200")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda reading: reading.overview(top=-1), "top must be between 0 and 1,000, not -1"),
        (lambda reading: reading.clients(offset=-1), "offset must be at least 0, not -1"),
        (lambda reading: reading.clients(limit=0), "limit must be between 1 and 1,000, not 0"),
        (lambda reading: reading.clients(order="size"), "no order 'size': there are name, service"),
        (lambda reading: reading.history(["a"], resolution_s=5), "resolution must be 1 or 60 seconds, not 5"),
        (lambda reading: reading.history(list(map(str, range(51)))), "number of clients must be between 0 and 50"),
        (lambda reading: reading.events(limit=9_999), "limit must be between 1 and 1,000, not 9999"),
    ],
)
async def test_a_wrong_question_is_answered_with_what_is_allowed(
    room: Room, ask: Callable[[Reading], Awaitable[Any]], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await ask(room.reading)


async def test_groups_and_strangers_are_no_clients() -> None:
    room = Room(Size(50, 50, 1, levels=3))
    assert (await room.reading.clients())["total"] == 50
    for name in ("organisation-0/", "nobody"):
        with pytest.raises(UnknownClient, match=f"no client '{name}' is known"):
            await room.reading.client(name)


async def test_history_takes_in_the_busiest_and_writes_a_last_point_when_they_rest(room: Room) -> None:
    room.serve()
    await room.live(3)
    book = room.reading.history_book
    assert 100 <= len(book) <= 256
    moment = look(room.crowd.dispatcher, room.crowd.now_s, 0.0)
    try:
        while True:
            next(moment)
    except StopIteration as end:
        busiest = max((client_view(end.value, name) for name in book._clients), key=lambda view: view["service"])
    name = busiest["name"]
    dispatcher = room.crowd.dispatcher
    for session in dispatcher.sessions:
        dispatcher._losses.end_session(session, room.crowd.now_s)
    await room.live(20)
    points = book._clients[name].points[1]
    assert points.waiting[-1] == 0 and points.service[-1] == busiest["service"]
    num = len(points.time_s)
    await room.live(20)
    assert len(points.time_s) == num
    history = await room.reading.history([name])
    assert history["clients"][name]["service"][-1] == busiest["service"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"who": "root", "action": "client", "target": "ann", "before": {"weight": 1.0}, "after": {"weight": 4.0}},
            ("root", "client ann: weight from 1.0 to 4.0", "ann"),
        ),
        (
            {
                "who": "root",
                "action": "settings",
                "target": "fairness.policy",
                "before": {"fairness.policy": "fcfs"},
                "after": {"fairness.policy": "vtc"},
            },
            ("root", "fairness.policy from fcfs to vtc", None),
        ),
        (
            {"who": "cli:eve", "action": "key.revoke", "target": "0a1b", "before": {"client": "bob"}, "after": {}},
            ("cli:eve", "the API keys: revoked 0a1b", "bob"),
        ),
    ],
)
def test_a_change_is_told_with_who_and_what(entry: dict[str, Any], expected: tuple[str, str, str | None]) -> None:
    assert told(entry) == expected


async def test_the_actor_tells_that_it_began_and_what_was_changed() -> None:
    args = FairServeArgs.model_validate({"counter": {"store": None}})
    actor = CounterService(args.model_dump_json(), clock=VirtualClock(100.0), unix_s=lambda: UNIX_S)
    await actor.set_client("ann", {"weight": 4.0}, "root")
    await actor.set_client("ann", {"weight": 2.0}, "root")
    events = await actor.events()
    assert [(event["kind"], event["text"], event["count"]) for event in events] == [
        ("started", "The counter actor began, with nothing restored.", 1),
        ("changed", "root changed client ann: weight from None to 4.0.", 1),
        ("changed", "root changed client ann: weight from 4.0 to 2.0.", 1),
    ]
    assert events[0]["time_s"] == UNIX_S and (await actor.overview())["events"][0] == events[-1]
