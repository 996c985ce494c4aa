"""``preempt_gap``: who gives way, when, to whom; that nobody is charged twice for it; and what it buys."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.engine.batching import Batcher
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.fairness.catalog import POLICIES
from tests.dispatch.batch_cluster import BLOCK, BatchCluster, Job
from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit

MakeDesk = Callable[..., Desk]
GAP = 100.0


# -- the dispatcher's half: granting over the top ----------------------------------------------------------------------


class Scene:
    """One-slot replicas, each busy with a started request of ``greedy``, whose counter the test sets."""

    def __init__(self, desk: Desk, num_replicas: int = 1) -> None:
        self.desk = desk
        self.router: RouterVoice = desk.router()
        self.replicas: list[ReplicaVoice] = [desk.replica(f"r{i}", slots=1) for i in range(num_replicas)]
        for i in range(num_replicas):
            self.router.call(submit(f"g{i}", "greedy"))
            request_id, replica = f"g{i}", self.router.granted[f"g{i}"]
            self.voice(replica).report(
                received=(request_id,), started=(request_id,), served={"greedy": (10, 0)}, free_slots=0, free_kv=970
            )
        self.router.call(submit("g-waits", "greedy"), submit("m0", "modest"))
        assert len(self.desk.dispatcher.leases) == num_replicas

    def voice(self, name: str) -> ReplicaVoice:
        return next(voice for voice in self.replicas if voice.name == name)

    def lead(self, amount: float) -> None:
        """``greedy`` is this far ahead of ``modest`` when the dispatcher looks."""
        queue = self.desk.dispatcher.queue
        queue.set_counter("greedy", queue.counter("modest") + amount)
        self.desk.dispatcher.dispatch(self.desk.now_s)

    @property
    def over(self) -> set[str]:
        """Granted over the top and not started."""
        return {room.granted_over for room in self.desk.dispatcher.capacity if room.granted_over is not None}


@pytest.fixture
def make_scene(make_desk: MakeDesk) -> Callable[..., Scene]:
    def build(policy: str = "vtc", *, num_replicas: int = 1, **limits: object) -> Scene:
        return Scene(make_desk(policy, **({"preempt_gap": GAP, "lease_s": 3.0} | limits)), num_replicas)

    return build


@pytest.mark.parametrize(("lead", "is_granted"), [(-50.0, False), (99.0, False), (100.0, False), (100.5, True)])
def test_only_past_the_gap_is_anything_granted_where_there_is_no_room(
    make_scene: Callable[..., Scene], lead: float, is_granted: bool
) -> None:
    scene = make_scene()
    scene.lead(lead)
    assert scene.over == ({"m0"} if is_granted else set())
    assert scene.desk.dispatcher.num_granted_over == is_granted
    assert scene.desk.status()["granted_over"] == is_granted
    if is_granted:
        assert scene.desk.dispatcher.leases.get("m0").replica == "r0"  # type: ignore[union-attr]
        assert scene.desk.counter("modest") == scene.desk.counter("greedy") - lead + 10, "charged at once, as ever"


def test_without_the_setting_nobody_gives_way(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(preempt_gap=None)
    scene.lead(1e9)
    assert scene.over == set() and scene.desk.dispatcher.num_granted_over == 0


def test_at_most_one_request_per_replica_is_over_until_it_starts(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.router.call(submit("m1", "modest"), submit("n0", "newcomer"))
    scene.lead(1e6)
    (first,) = scene.over
    for _ in range(3):
        scene.desk.dispatcher.dispatch(scene.desk.now_s)
    assert scene.over == {first}
    report = {"received": (first,), "free_slots": -1, "free_kv": 940}
    scene.replicas[0].report(**report)
    assert scene.over == {first}, "confirmed is not started"
    client = scene.desk.dispatcher.leases.get(first).waiting.submit.client  # type: ignore[union-attr]
    scene.replicas[0].report(started=(first,), served={client: (10, 0)}, free_slots=-1, free_kv=940)
    assert len(scene.over) == 1 and scene.over != {first}, "then the next may come"


def test_each_replica_may_have_one(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(num_replicas=3)
    scene.router.call(*(submit(f"m{i}", "modest") for i in range(1, 9)))
    scene.lead(1e6)
    assert [room.granted_over is not None for room in scene.desk.dispatcher.capacity] == [True] * 3
    assert scene.desk.dispatcher.num_granted_over == 3


def test_it_goes_where_the_most_served_clients_youngest_request_runs(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(num_replicas=3)
    youngest = next(iter(scene.desk.dispatcher.leases.youngest_first("greedy"))).replica
    scene.lead(GAP + 1)
    assert scene.desk.dispatcher.leases.get("m0").replica == youngest  # type: ignore[union-attr]


def test_the_charge_at_the_grant_closes_the_gap_that_let_it_in(make_scene: Callable[..., Scene]) -> None:
    """So that one client cannot take all replicas at once for being a little past the gap."""
    scene = make_scene(num_replicas=3)
    scene.router.call(*(submit(f"m{i}", "modest") for i in range(1, 9)))
    scene.lead(GAP + 15)
    assert scene.desk.dispatcher.num_granted_over == 2, "10 tokens each: 115, 105, 95"


def test_nobody_gives_way_on_a_replica_that_is_silent_or_suspended(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.router.call(unreachable=("r0",))
    scene.lead(1e6)
    assert scene.over == set()
    scene.desk.clock.advance(6.0)
    scene.lead(1e6)
    assert scene.over == set()


def test_nobody_gives_way_before_its_start(make_desk: MakeDesk) -> None:
    desk = make_desk(preempt_gap=GAP)
    router, voice = desk.router(), desk.replica("r0", slots=1)
    router.call(submit("g0", "greedy"))
    voice.report(received=("g0",), free_slots=0, free_kv=970)
    router.call(submit("m0", "modest"))
    desk.dispatcher.queue.set_counter("greedy", 1e6)
    desk.dispatcher.dispatch(desk.now_s)
    assert desk.dispatcher.num_granted_over == 0


@pytest.mark.parametrize("how", ["cancelled", "declined", "lapsed", "finished"])
def test_when_the_request_that_was_let_in_leaves_its_place_over_is_free(
    make_scene: Callable[..., Scene], how: str
) -> None:
    scene = make_scene()
    scene.lead(1e6)
    assert scene.over == {"m0"}
    if how == "cancelled":
        scene.router.call(cancels=("m0",))
    elif how == "declined":
        scene.router.call(declined=("m0",))
    elif how == "lapsed":
        scene.desk.clock.advance(3.0)
        scene.replicas[0].report(free_slots=0, free_kv=970)
        scene.desk.dispatcher.queue.set_counter("greedy", 0.0)
        scene.desk.dispatcher.tick(scene.desk.now_s)
        assert scene.desk.dispatcher.num_lapsed == 1
    else:  # it failed before it started
        scene.replicas[0].report(received=("m0",), finished=("m0",), free_slots=0, free_kv=970)
    assert scene.over == set()
    scene.router.call(submit("m9", "modest"))
    scene.lead(1e6)
    assert len(scene.over) == 1


def test_within_an_organisation_its_own_members_are_compared(make_desk: MakeDesk) -> None:
    desk = make_desk(preempt_gap=GAP)
    router, voice = desk.router(), desk.replica("r0", slots=1)
    router.call(submit("g", "acme/greedy"))
    voice.report(received=("g",), started=("g",), served={"acme/greedy": (10, 0)}, free_slots=0, free_kv=970)
    router.call(submit("m", "acme/modest"))
    desk.dispatcher.queue.set_counter("acme/", 1e6)
    desk.dispatcher.dispatch(desk.now_s)
    assert desk.dispatcher.num_granted_over == 0, "that acme is ahead of others is no reason among its own"
    desk.dispatcher.queue.set_counter("acme/greedy", desk.counter("acme/modest") + GAP + 1)
    desk.dispatcher.dispatch(desk.now_s)
    assert desk.dispatcher.num_granted_over == 1


# -- the replica's half: giving way ------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A batcher with a queue in plain order of arrival; preempted requests stand first in it. Notes every charge."""

    counters: dict[str, float]
    num_blocks: int = 100
    slots: int = 2
    gap: float | None = GAP
    waiting: list[GenerateRequest] = field(default_factory=list)
    num_started: dict[str, int] = field(default_factory=dict)
    num_input: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kv = KVBlocks(self.num_blocks, BLOCK, num_lanes=self.slots)
        self.batcher = Batcher(
            self.kv,
            self,
            self,
            max_num_seqs=self.slots,
            max_num_batched_tokens=64,
            max_model_len=self.num_blocks * BLOCK,
            preempt_gap=self.gap,
        )

    # WaitingQueue

    def push(self, request: GenerateRequest) -> None:
        self.waiting.append(request)

    def push_front(self, request: GenerateRequest) -> None:
        self.waiting.insert(0, request)

    def peek(self) -> GenerateRequest | None:
        return self.waiting[0] if self.waiting else None

    def pop(self) -> GenerateRequest:
        return self.waiting.pop(0)

    def remove(self, request_id: str) -> GenerateRequest | None:
        return None

    def standing(self, client: str) -> tuple[float, ...]:
        return (self.counters[client],)

    def lead(self, ahead: str, behind: str) -> float:
        return self.counters[ahead] - self.counters[behind]

    def __len__(self) -> int:
        return len(self.waiting)

    # Account

    def received(self, request: GenerateRequest) -> None: ...

    def started(self, request_id: str, num_input: int, num_cached: int) -> None:
        self.num_started[request_id] = self.num_started.get(request_id, 0) + 1
        self.num_input[request_id] = self.num_input.get(request_id, 0) + num_input

    def output(self, request_id: str, num_tokens: int) -> None: ...
    def refund_input(self, request_id: str, num_tokens: int) -> None: ...
    def finished(self, request_id: str) -> None: ...

    def add(self, client: str, request_id: str, num_input: int = 8) -> None:
        self.push(GenerateRequest(request_id, client, (0,) * num_input, SamplingParams(max_tokens=300)))

    def step(self) -> int:
        plan = self.batcher.plan()
        self.batcher.commit(plan, {chunk.request_id: 0 for chunk in plan if chunk.samples})
        self.batcher.check()
        return plan.num_preempted

    @property
    def running(self) -> set[str]:
        return set(self.batcher.running)


@pytest.mark.parametrize(("lead", "num_preempted"), [(99.0, 0), (100.0, 0), (100.5, 1)])
def test_a_running_request_gives_way_only_past_the_gap(lead: float, num_preempted: int) -> None:
    bench = Bench({"greedy": lead, "modest": 0.0}, slots=1)
    bench.add("greedy", "g")
    bench.step()
    bench.add("modest", "m")
    assert bench.step() == num_preempted
    assert bench.running == ({"m"} if num_preempted else {"g"})


def test_with_room_for_both_nobody_gives_way() -> None:
    bench = Bench({"greedy": 1e6, "modest": 0.0})
    bench.add("greedy", "g")
    bench.step()
    bench.add("modest", "m")
    assert bench.step() == 0 and bench.running == {"g", "m"}


def test_without_the_setting_whoever_runs_runs_to_its_end() -> None:
    bench = Bench({"greedy": 1e6, "modest": 0.0}, slots=1, gap=None)
    bench.add("greedy", "g")
    bench.step()
    bench.add("modest", "m")
    assert [bench.step() for _ in range(5)] == [0] * 5


def test_the_most_served_clients_youngest_gives_way_first_and_no_more_than_it_takes() -> None:
    bench = Bench({"greedy": 900.0, "middle": 500.0, "modest": 0.0}, slots=4)
    for client, request_id in (("greedy", "g1"), ("middle", "x1"), ("greedy", "g2"), ("middle", "x2")):
        bench.add(client, request_id)
    bench.step()
    bench.add("modest", "m")
    assert bench.step() == 1
    assert bench.running == {"g1", "x1", "x2", "m"}


def test_several_give_way_where_one_is_not_enough() -> None:
    bench = Bench({"greedy": 900.0, "modest": 0.0}, num_blocks=12, slots=4)
    for i in range(4):
        bench.add("greedy", f"g{i}", num_input=8)
    bench.step()
    bench.add("modest", "m", num_input=20)
    assert bench.step() == 2
    assert "m" in bench.running and {"g0", "g1"} <= bench.running


def test_nobody_gives_way_for_nothing() -> None:
    """Preempting every client that is far enough ahead would still not make room: then none of them stops."""
    bench = Bench({"greedy": 900.0, "middle": 50.0, "modest": 0.0}, num_blocks=12, slots=4)
    bench.add("greedy", "g", num_input=8)
    bench.add("middle", "x", num_input=24)
    bench.step()
    bench.add("modest", "m", num_input=40)
    assert bench.step() == 0
    assert bench.running == {"g", "x"}


def test_who_was_given_way_to_starts_even_where_the_queue_puts_returners_first() -> None:
    """Under a policy that does not go by counters the preempted request would be admitted again, step after step."""
    bench = Bench({"greedy": 900.0, "modest": 0.0}, slots=1)
    bench.add("greedy", "g")
    bench.step()
    bench.add("modest", "m")
    assert bench.step() == 1
    assert bench.running == {"m"} and [r.request_id for r in bench.waiting] == ["g"]
    assert [bench.step() for _ in range(5)] == [0] * 5
    bench.batcher.finish("m")
    bench.step()
    assert bench.running == {"g"}


def test_a_preempted_request_is_started_and_charged_once_and_keeps_its_output() -> None:
    bench = Bench({"greedy": 900.0, "modest": 0.0}, slots=1)
    bench.add("greedy", "g", num_input=10)
    for _ in range(4):
        bench.step()
    bench.add("modest", "m", num_input=6)
    bench.step()
    assert len(bench.batcher.preempted["g"].output) == 4
    bench.batcher.finish("m")
    for _ in range(3):
        bench.step()
    assert len(bench.batcher.running["g"].output) == 7
    assert bench.num_started == {"g": 1, "m": 1}
    assert bench.num_input == {"g": 10, "m": 6}


def test_two_that_are_past_the_gap_of_nobody_do_not_take_turns() -> None:
    """After the swap the gap has the other sign only once the newcomer has had twice the gap."""
    bench = Bench({"greedy": 101.0, "modest": 0.0}, slots=1)
    bench.add("greedy", "g")
    bench.step()
    bench.add("modest", "m")
    swaps = 0
    for _ in range(150):
        swaps += bench.step()
        for request_id in bench.running:
            bench.counters["greedy" if request_id == "g" else "modest"] += 2.0
    assert swaps == 2, "at a lead of 101, and when modest is 100 ahead in turn"


# -- both halves -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    worst_gap: float
    num_tokens: int
    num_preempted: int
    cluster: BatchCluster


def greedy_and_modest(gap: float | None, *, num_replicas: int = 1, lookahead: int = 0, steps: int = 220) -> Run:
    """``greedy`` fills the batch with long answers before ``modest`` comes; then both always wait. The gap is that of
    service made, by the batchers' own count, since both wait."""
    cluster = BatchCluster(
        dispatch=DispatchConfig(
            lookahead=lookahead, reserve_output_tokens=None, preempt_gap=gap, prefix_block_tokens=BLOCK
        ),
        num_replicas=num_replicas,
        kv_tokens=480,
    )
    low = high = worst = 0.0
    both = False
    for step in range(steps):
        for client, length in (("greedy", 100), ("modest", 10)):
            waiting = cluster.dispatcher.queue.backlog.num_waiting(client)
            for i in range(6 * num_replicas - waiting if client == "greedy" or step >= 30 else 0):
                cluster.submit(Job(f"{client}-{step}-{i}", client, 20, length, length))
        cluster.step()
        both_now = all(map(cluster.dispatcher.queue.is_waiting, ("greedy", "modest")))
        lead = cluster.made("greedy") - cluster.made("modest")
        low, high = (min(low, lead), max(high, lead)) if both and both_now else (lead, lead)
        both = both_now
        worst = max(worst, high - low)
    return Run(worst, cluster.num_delivered_tokens, sum(r.num_preempted for r in cluster.replicas), cluster)


CHARGE = 20 + 2 * 10
"""Service of one request of ``modest``."""


@pytest.mark.parametrize(("num_replicas", "lookahead"), [(1, 0), (1, 1), (3, 0)])
def test_the_gap_shrinks_to_the_setting_and_a_charge_per_replica_or_two(num_replicas: int, lookahead: int) -> None:
    without = greedy_and_modest(None, num_replicas=num_replicas, lookahead=lookahead)
    assert without.num_preempted == 0
    assert without.worst_gap > 400 * num_replicas, "the batch is greedy's until it ends"
    for gap in (50.0, 200.0):
        run = greedy_and_modest(gap, num_replicas=num_replicas, lookahead=lookahead)
        assert run.num_preempted > 0
        assert run.worst_gap <= gap + 2 * CHARGE * num_replicas
        assert run.num_tokens >= 0.99 * without.num_tokens, "and in tokens it costs next to nothing here"


def test_what_gave_way_ends_and_nobody_is_charged_twice() -> None:
    run = greedy_and_modest(50.0, num_replicas=2, steps=150)
    assert run.num_preempted > 0
    cluster = run.cluster
    cluster.run_to_rest()
    ended = {r: s for replica in cluster.replicas for r, s in replica.ended.items()}
    assert {r: len(s.output) for r, s in ended.items()} == {r: job.num_output for r, job in cluster.jobs.items()}
    for client in ("greedy", "modest"):
        jobs = [job for job in cluster.jobs.values() if job.client == client]
        totals = cluster.dispatcher.ledger.totals(client)
        assert totals.num_input == sum(job.num_input for job in jobs)
        assert totals.num_output == sum(job.num_output for job in jobs)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(sorted(POLICIES)),
    prediction=st.sampled_from(["none", "moving_mean"]),
    gap=st.sampled_from([1.0, 20.0, 150.0]),
    reserve=st.sampled_from([None, 3]),
    num_replicas=st.integers(1, 3),
)
def test_under_every_policy_and_any_load_everything_ends_and_adds_up(
    seed: int, policy: str, prediction: str, gap: float, reserve: int | None, num_replicas: int
) -> None:
    rng = random.Random(seed)
    cluster = BatchCluster(
        FairnessConfig(policy=policy, prediction=prediction, rpm_limit=10_000, quantum=60.0),
        DispatchConfig(lookahead=1, reserve_output_tokens=reserve, preempt_gap=gap, prefix_block_tokens=BLOCK),
        num_replicas=num_replicas,
        kv_tokens=120,
        slots=3,
        report_every=rng.choice([1, 2]),
        rng=rng,
    )
    for i in range(60):
        for client in ("ann", "bob", "acme/cyd"):
            if rng.random() < 0.4:
                num_output = rng.randint(1, 30)
                cluster.submit(
                    Job(f"{client}{i}", client, rng.randint(1, 40), num_output, num_output + rng.randint(0, 9))
                )
        if cluster.jobs and rng.random() < 0.1:
            cluster.cancel(rng.choice(sorted(cluster.jobs)))
        cluster.step()
        over = [room.granted_over for room in cluster.dispatcher.capacity if room.granted_over is not None]
        assert all(request_id in cluster.dispatcher.leases for request_id in over)
    cluster.run_to_rest()
    ended = {r: s for replica in cluster.replicas for r, s in replica.ended.items()}
    for request_id, job in cluster.jobs.items():
        if request_id not in cluster.cancelled:
            assert len(ended[request_id].output) == job.num_output
    for client in cluster.clients:
        assert cluster.dispatcher.ledger.totals(client).service == pytest.approx(cluster.made(client))
