"""DRR, DLPM and D2LPM, which are written as counters here, against the same algorithms written as their papers do."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.fairness.deficit import D2lpm, Dlpm, Drr
from fairserve.fairness.policy import Place
from fairserve.fairness.queue import FairQueue

BASE = "mia"
"""Always waits, so that rounds never stand still."""


@dataclass
class Textbook:
    """Deficit round robin with debt. A client is served while its deficit is above 0, each pick and each token takes
    from it; when no waiting client has any left, a new round gives everybody a quantum. Who comes to the queue has at
    most one quantum: credit is not saved, debt is."""

    quantum: float
    weights: dict[str, float]
    deficit: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)

    def new_rounds(self) -> None:
        while self.waiting and all(self.deficit[client] <= 0 for client in self.waiting):
            for client in self.deficit:
                self.deficit[client] += self.quantum

    def arrive(self, client: str, request_id: str) -> None:
        if client not in self.waiting:
            self.new_rounds()
            self.deficit[client] = min(self.deficit.get(client, self.quantum), self.quantum)
        self.waiting.setdefault(client, []).append(request_id)

    def pick(self) -> tuple[str, str]:
        self.new_rounds()
        client = min(client for client in self.waiting if self.deficit[client] > 0)
        request_id = self.waiting[client].pop(0)
        if not self.waiting[client]:
            del self.waiting[client]
        return client, request_id

    def charge(self, client: str, service: float) -> None:
        self.deficit[client] -= service / self.weights[client]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), quantum=st.sampled_from([4.0, 32.0, 100.0]))
def test_drr_picks_what_the_textbook_picks(seed: int, quantum: float) -> None:
    """With input charged at the pick, output while it runs, debts of many rounds, and clients that come and go."""
    rng = random.Random(seed)
    clients = [BASE, "abe", "eva", "ida", "tom", "zoe"]
    weights = {client: rng.choice([0.5, 1.0, 2.0]) for client in clients}
    book = Textbook(quantum, weights)
    queue: FairQueue[tuple[str, str]] = FairQueue(Drr(quantum))
    for client, weight in weights.items():
        queue.register(client, weight)
    running: list[str] = []
    num = 0

    def arrive(client: str) -> None:
        nonlocal num
        num += 1
        book.arrive(client, f"r{num}")
        queue.arrive(client, f"r{num}", (client, f"r{num}"), float(num))

    arrive(BASE)
    for _ in range(150):
        match rng.randrange(4):
            case 0:
                arrive(rng.choice(clients))
            case 1 | 2:
                client, request_id = book.pick()
                assert queue.pop() == (client, request_id)
                service = float(rng.choice([1, 8, 50, 300]))
                book.charge(client, service)
                queue.charge(client, service)
                running.append(client)
                if BASE not in book.waiting:
                    arrive(BASE)
            case 3 if running:
                client = rng.choice(running)
                book.charge(client, 2.0)
                queue.charge(client, 2.0)
        queue.check()


def test_a_client_of_the_present_round_is_served_until_its_quantum_is_used_up() -> None:
    queue: FairQueue[str] = FairQueue(Drr(100.0))
    for i in range(6):
        for client in ("ann", "bob"):
            queue.arrive(client, f"{client}{i}", f"{client}{i}", i)
    order = []
    for _ in range(12):
        order.append(queue.pop())
        queue.charge(order[-1][:3], 40.0)
    # 0, 40, 80 -> 120: in debt by 20; so the second round is left after 160 and 200.
    assert order == [
        *("ann0", "ann1", "ann2", "bob0", "bob1", "bob2"),
        *("ann3", "ann4", "bob3", "bob4"),
        *("ann5", "bob5"),
    ]


def test_a_debt_of_three_quanta_is_sat_out_for_three_rounds() -> None:
    queue: FairQueue[str] = FairQueue(Drr(100.0))
    queue.arrive("ann", "huge", "ann", 0.0)
    assert queue.pop() == "ann"
    queue.charge("ann", 350.0)
    for i in range(10):
        queue.arrive("ann", f"a{i}", "ann", 0.0)
        queue.arrive("bob", f"b{i}", "bob", 0.0)
    queue.set_counter("bob", 0.0)
    picks = []
    for _ in range(8):
        picks.append(queue.pop())
        queue.charge(picks[-1], 50.0)
    assert picks == ["bob"] * 6 + ["ann", "bob"]


def test_who_comes_in_the_middle_of_a_round_gets_one_quantum_and_no_more() -> None:
    queue: FairQueue[str] = FairQueue(Drr(100.0))
    queue.arrive("busy", "b", "busy", 0.0)
    queue.set_counter("busy", 1_050.0)
    queue.arrive("new", "n", "new", 0.0)
    assert queue.counter("new") == 1_000.0
    queue.charge("new", 30.0)
    queue.remove("n")
    queue.arrive("new", "n2", "new", 0.0)
    assert queue.counter("new") == 1_030.0, "leaving and coming back refills nothing"


@pytest.mark.parametrize("policy", [Drr, Dlpm, D2lpm])
def test_quanta_must_be_positive(policy: type[Drr]) -> None:
    with pytest.raises(ValueError, match="quantum must be above 0"):
        policy(0.0)
    with pytest.raises(ValueError, match="replica_quantum must be above 0"):
        D2lpm(500.0, 32, -1.0)


# -- DLPM: who may be chosen among by prefix ---------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    counters=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 1_000), min_size=1),
    window=st.integers(1, 9),
    depth=st.integers(1, 4),
)
def test_the_front_is_every_client_of_the_present_round_and_nobody_else(
    counters: dict[str, int], window: int, depth: int
) -> None:
    queue: FairQueue[str] = FairQueue(Dlpm(100.0, window))
    for client, counter in counters.items():
        for i in range(3):
            queue.arrive(client, f"{client}{i}", f"{client}{i}", i)
        queue.set_counter(client, counter)
    round_now = min(counter // 100 for counter in counters.values())
    clients = sorted(client for client, counter in counters.items() if counter // 100 == round_now)[:window]
    assert queue.front(window, depth) == [f"{client}{i}" for client in clients for i in range(min(3, depth))]
    assert queue.front(1, 1) == [queue.peek()]


def test_the_front_of_a_tree_is_made_of_equals_at_every_level() -> None:
    queue: FairQueue[str] = FairQueue(Dlpm(100.0, 32))
    counters = {"acme/ann": 20, "acme/bob": 130, "zeta/eve": 90, "zeta/r/flo": 10, "solo": 99, "late": 100}
    for client in counters:
        queue.arrive(client, client, client, 0.0)
    for client, counter in counters.items():
        queue.set_counter(client, counter)
    assert queue.front(32, 4) == ["acme/ann", "solo", "zeta/eve", "zeta/r/flo"]
    queue.set_counter("zeta/", 100.0)
    assert queue.front(32, 4) == ["acme/ann", "solo"]


# -- D2LPM: a deficit per client and replica ---------------------------------------------------------------------------


@dataclass
class PapersRouter:
    """Algorithm 2 of arXiv 2501.14312, for one client."""

    quantum: float
    deficit: dict[str, float]

    def choose(self, places: list[Place]) -> str:
        while all(self.deficit[place.replica] <= 0 for place in places):
            for replica in self.deficit:
                self.deficit[replica] += self.quantum
        able = [place for place in places if self.deficit[place.replica] > 0]
        longest = max(place.num_matched for place in able)
        shortest = min(place.num_requests for place in able if place.num_matched == longest)
        return min(p.replica for p in able if p.num_matched == longest and p.num_requests == shortest)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), quantum=st.sampled_from([10.0, 100.0, 2_000.0]))
def test_d2lpm_chooses_the_papers_replica(seed: int, quantum: float) -> None:
    rng = random.Random(seed)
    replicas = [f"r{i}" for i in range(4)]
    policy = D2lpm(500.0, 32, quantum)
    papers = PapersRouter(quantum, dict.fromkeys(replicas, quantum))
    running: list[tuple[str, float]] = []
    for _ in range(60):
        if running and rng.random() < 0.3:
            replica, num_input = running.pop(rng.randrange(len(running)))
            output_service = float(rng.randrange(200))
            policy.finished("ann", "", replica, num_input, num_input + output_service)
            papers.deficit[replica] -= output_service
            continue
        # All replicas have room, as in the paper: which of them are asked about changes nothing about the others.
        places = [Place(replica, rng.choice([0, 0, 16, 64]), rng.randrange(4)) for replica in replicas]
        chosen = policy.choose_replica("ann", places)
        assert chosen == papers.choose(places)
        num_input = float(rng.randrange(1, 100))
        policy.placed("ann", chosen, num_input)
        papers.deficit[chosen] -= num_input
        running.append((chosen, num_input))


def test_a_client_stays_with_its_prefixes_for_a_quantum_and_then_moves() -> None:
    policy = D2lpm(500.0, 32, 100.0)
    places = [Place("knows", 64, 9), Place("other", 0, 0)]
    chosen = []
    for _ in range(6):
        chosen.append(policy.choose_replica("ann", places))
        policy.placed("ann", chosen[-1], 40.0)
    assert chosen == ["knows"] * 3 + ["other"] * 3
    assert policy.choose_replica("ann", places) == "knows", "both are used up: every replica gets a quantum more"
    assert policy.choose_replica("bob", places) == "knows", "deficits are each client's own"


def test_output_counts_against_the_replica_that_made_it() -> None:
    policy = D2lpm(500.0, 32, 100.0)
    places = [Place("knows", 64, 9), Place("other", 0, 0)]
    policy.placed("ann", "knows", 40.0)
    policy.finished("ann", "", "knows", 40.0, 140.0)
    assert policy.choose_replica("ann", places) == "other"


def test_a_debt_of_a_hundred_quanta_still_finds_a_replica() -> None:
    policy = D2lpm(500.0, 32, 1.0)
    policy.placed("ann", "only", 100.0)
    assert policy.choose_replica("ann", [Place("only", 0, 0)]) == "only"
