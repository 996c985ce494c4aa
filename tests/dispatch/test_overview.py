"""The overview and the verdict: right numbers, the right few clients, and only those looked at that are active."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

import pytest

from fairserve.dispatch.controls import Control
from fairserve.dispatch.overview import ACTIVE_S, Moment, client_view, known_clients, look, overview
from fairserve.dispatch.pages import SLICE
from fairserve.dispatch.verdict import sentence
from fairserve.views import ClientView, Overview
from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit

MakeDesk = Callable[..., Desk]
Answer = TypeVar("Answer")
UNIX_S = 1_700_000_000.0


def driven(steps: Generator[None, None, Answer]) -> Answer:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def moment_of(desk: Desk) -> Moment:
    return driven(look(desk.dispatcher, desk.now_s, UNIX_S - desk.now_s))


def seen(desk: Desk, top: int = 50) -> Overview:
    """Checked as the views say."""
    picture = driven(overview(moment_of(desk), top))
    of_the_actor = {"built_in_s": 0.0, "started_s": 0.0, "prediction": "none", "model": "m"}
    return Overview.model_validate(picture | of_the_actor)


class Scene:
    """One replica of two slots: ``ann`` runs one request and waits with another, ``bob`` waits with two."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.router: RouterVoice = desk.router()
        self.replica: ReplicaVoice = desk.replica("r0", slots=1)
        self.router.call(submit("a0", "ann"))
        desk.wait(2.0)
        self.router.call(submit("a1", "ann", weight=2.0), submit("b0", "bob"), submit("b1", "bob"))
        self.serve({"ann": (10, 5)}, received=("a0",), started=("a0",))

    def serve(self, served: dict[str, tuple[int, int]], **more: Any) -> None:
        """A report, and the time that it takes to count."""
        self.replica.report(served=served, free_slots=0, **more)
        self.desk.wait(1.0)


@pytest.fixture
def scene(desk: Desk) -> Scene:
    return Scene(desk)


def test_the_overview_counts_what_waits_runs_and_was_served(scene: Scene) -> None:
    scene.desk.wait(1.0)
    view = seen(scene.desk)
    assert (view.waiting, view.running, view.num_clients, view.num_granted) == (3, 1, 2, 1)
    assert view.time_s == UNIX_S and view.policy == "vtc" and view.epoch == 1
    assert [(c.name, c.waiting, c.running, c.service, c.weight) for c in view.clients] == [
        ("ann", 1, 1, 20.0, 2.0),
        ("bob", 2, 0, 0.0, 1.0),
    ]
    ann, bob = view.clients
    assert (ann.num_input, ann.num_output, ann.lead, bob.lead) == (10, 5, pytest.approx(ann.counter - bob.counter), 0.0)
    assert ann.oldest_wait_s == bob.oldest_wait_s == 2.0 and ann.mean_wait_s == 0.0
    assert ann.service_per_s == view.service_per_s == pytest.approx(20 / 2)
    assert view.tokens_per_s == view.replicas[0].tokens_per_s == pytest.approx(15 / 2)
    assert ann.last_active_s == UNIX_S and view.others is None
    assert [event.kind for event in view.events] == ["lifted", "joined"]


def test_replicas_and_routers_are_shown_with_their_age(scene: Scene) -> None:
    scene.desk.wait(6.0)
    view = seen(scene.desk)
    (replica,), (router,) = view.replicas, view.routers
    assert (replica.name, replica.state, replica.report_age_s, replica.max_slots) == ("r0", "stale", 7.0, 1)
    assert (router.name, router.requests, router.call_age_s) == ("east", 4, 7.0)
    scene.replica.report(free_slots=0)
    assert seen(scene.desk).replicas[0].state == "live"


def test_those_beyond_the_top_are_summed(scene: Scene) -> None:
    whole, part = seen(scene.desk), seen(scene.desk, top=1)
    assert [client.name for client in part.clients] == ["ann"]
    others, bob = part.others, whole.clients[1]
    assert others is not None and others.name == "other"
    fields = ("waiting", "running", "service", "service_per_s", "num_output", "weight", "oldest_wait_s")
    assert [getattr(others, name) for name in fields] == [getattr(bob, name) for name in fields]
    nobody = seen(scene.desk, top=0)
    assert nobody.others is not None and nobody.others.waiting == 3 and nobody.others.service == 20.0


def test_what_was_refused_counts_for_its_client_and_for_others(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=1)
    desk.router().call(submit("a0", "ann"), submit("a1", "ann"), submit("b0", "bob"), submit("b1", "bob"))
    view = seen(desk, top=1)
    assert view.num_refused == 2 and view.others is not None
    assert [client.num_refused for client in (*view.clients, view.others)] == [1, 1]


def test_a_paused_client_is_shown_with_what_waits_and_is_not_backlogged(scene: Scene) -> None:
    scene.desk.dispatcher.control("bob", Control(is_paused=True, max_waiting=7, requests_per_min=9), scene.desk.now_s)
    view = seen(scene.desk)
    bob = next(client for client in view.clients if client.name == "bob")
    assert (bob.is_paused, bob.max_waiting, bob.requests_per_min, bob.waiting) == (True, 7, 9, 2)
    assert bob.oldest_wait_s == 1.0
    assert view.waiting == 3 and view.verdict.num_backlogged == 1


def test_leads_are_taken_among_siblings(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a", "acme/ann"), submit("b", "acme/bob"), submit("c", "solo"))
    for node, counter in {"acme/": 50.0, "acme/ann": 900.0, "acme/bob": 700.0, "solo": 40.0}.items():
        desk.dispatcher.queue.set_counter(node, counter)
    leads = {client.name: client.lead for client in seen(desk).clients}
    assert leads == {"acme/ann": 200.0, "acme/bob": 0.0, "solo": 0.0}
    assert seen(desk).num_clients == 3 and "acme/" not in known_clients(desk.dispatcher)


def test_clients_that_had_nothing_for_a_minute_are_not_looked_at(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5 * SLICE):
        desk.dispatcher.queue.register(f"idle-{i}")
    router = desk.router()
    router.call(submit("a", "ann"))
    router.call(submit("b", "bob"))
    router.call(cancels=("b",))
    assert set(moment_of(desk).active) == {"ann", "bob"}
    desk.clock.advance(ACTIVE_S + 1)
    assert set(moment_of(desk).active) == {"ann"}, "she waits"
    looked_at: list[str] = []
    totals = desk.dispatcher.ledger.totals
    monkeypatch.setattr(desk.dispatcher.ledger, "totals", lambda client: (looked_at.append(client), totals(client))[1])
    view = seen(desk)
    assert looked_at == ["ann"] and view.num_clients == 5 * SLICE + 2


def test_a_crowd_is_looked_at_in_steps(desk: Desk) -> None:
    router = desk.router()
    for i in range(4 * SLICE):
        router.call(submit(f"r{i}", f"c{i:05}"))
    assert sum(1 for _ in look(desk.dispatcher, desk.now_s, 0.0)) >= 4
    assert sum(1 for _ in overview(moment_of(desk), 10)) >= 8
    assert [client.name for client in seen(desk, top=2).clients] == ["c00000", "c00001"]


def test_a_client_that_never_had_a_request_has_a_plain_view(desk: Desk) -> None:
    desk.dispatcher.queue.register("new", 3.0)
    view = ClientView.model_validate(client_view(moment_of(desk), "new"))
    assert (view.weight, view.waiting, view.service, view.last_active_s, view.lead) == (3.0, 0, 0.0, None, 0.0)


# -- the verdict -------------------------------------------------------------------------------------------------------


def test_the_gap_of_now_falls_when_the_one_behind_catches_up_and_the_worst_stays(scene: Scene) -> None:
    scene.serve({"bob": (20, 5)})
    verdict = seen(scene.desk).verdict
    assert verdict.gap == 30.0 and verdict.gap_pair == ("bob", "ann") and verdict.is_fair
    scene.serve({"ann": (0, 30)})
    verdict = seen(scene.desk).verdict
    assert verdict.gap == pytest.approx(30.0) and verdict.gap_pair == ("ann", "bob"), "60 / weight 2 since then"
    assert verdict.worst_gap == pytest.approx(30.0) and verdict.num_backlogged == 2
    scene.router.call(cancels=("b0", "b1"))
    verdict = seen(scene.desk).verdict
    assert (verdict.gap, verdict.gap_pair, verdict.worst_gap) == (0.0, None, pytest.approx(30.0))
    assert verdict.text == "Fair: only one waits, so nobody is ahead of anybody."


@pytest.mark.parametrize(
    ("policy", "gap", "num", "text"),
    [
        ("vtc", 0, 0, "Nobody waits: everyone gets what they ask for."),
        ("fcfs", 0, 0, "Nobody waits: everyone gets what they ask for. The policy is fcfs."),
        ("vtc", 412, 3, "Fair: the widest gap among 3 waiting clients is 412, the bound is 5,120."),
        ("vtc", 412, 200, "Fair: the widest gap among 64 of 200 waiting clients is 412, the bound is 5,120."),
        ("vtc", 9_000, 3, "NOT FAIR: ann is 9,000 ahead of bob among 3 waiting clients, the bound is 5,120."),
        (
            "fcfs",
            412,
            3,
            "Fair: the widest gap among 3 waiting clients is 412. Policy fcfs keeps no bound; 5,120 would be VTC's.",
        ),
        (
            "fcfs",
            9_000,
            3,
            "NOT FAIR: ann is 9,000 ahead of bob among 3 waiting clients. "
            "Policy fcfs keeps no bound; 5,120 would be VTC's.",
        ),
    ],
)
def test_the_verdict_is_one_plain_sentence(policy: str, gap: float, num: int, text: str) -> None:
    assert sentence(policy, gap, ("ann", "bob"), 5_120.0, num, min(num, 64)) == text


def test_under_fcfs_a_greedy_client_makes_the_verdict_say_no(make_desk: MakeDesk) -> None:
    desk = make_desk("fcfs")
    router, replica = desk.router(), desk.replica("r0", slots=1)
    router.call(*(submit(f"g{i}", "greedy") for i in range(30)), submit("m0", "modest"))
    for i in range(20):
        replica.report(received=(f"g{i}",), started=(f"g{i}",), served={"greedy": (10, 0)}, free_slots=0)
        replica.report(finished=(f"g{i}",), served={"greedy": (0, 20)}, free_slots=1)
    verdict = seen(desk).verdict
    assert not verdict.is_fair and verdict.gap_pair == ("greedy", "modest")
    assert verdict.gap == 20 * 50 and verdict.text.startswith("NOT FAIR: greedy is 1,000 ahead of modest")
