"""What an attacker may gain at most, per attack; and without its protection the same runs gain more.

``benchmarks/attacks.py`` measures the same attacks at a realistic size and beside other policies. Here the attacker and
an honest client always want more than they get. *Lead*: the most that the attacker, under all its names, gains on the
honest client over any interval in which both wait, in delivered service (read from the replicas, not from counters). It
may be the bound 2 (U + S) of the run (``fairness/bounds.py``) and no more, however long the attack goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.published import PublishedInteractions, PublishedWsc
from fairserve.dispatch.granting import Granting
from fairserve.dispatch.replica_book import LocalBook
from fairserve.fairness.baselines import Fcfs, Lcf
from fairserve.fairness.cost import WeightedTokens
from fairserve.fairness.interactions import Interactions
from fairserve.fairness.policy import Policy
from fairserve.fairness.queue import FairQueue
from fairserve.fairness.throttle import Throttle, ThrottleSettings
from fairserve.fairness.vtc import Vtc
from fairserve.fairness.wsc import Wsc
from tests.properties.crowd import Crowd, Habit, Watch
from tests.properties.test_mutations import charge_only_the_client, grant_for_nothing, removed
from tests.toy_cluster import ToyCluster, ToyRequest

SEEDS = range(3)
STEPS = 600
OWN = WeightedTokens()


# -- attacks on a cluster ----------------------------------------------------------------------------------------------


class Attacker:
    """Keeps ``depth`` requests waiting under each of ``names``, from ``first_step`` on."""

    names: tuple[str, ...] = ("mallory",)
    depth = 4
    first_step = 0

    def size(self, rng: random.Random) -> tuple[int, int, int]:
        """Input, output, max_tokens."""
        return 20, 10, 10

    def afterwards(self, cluster: ToyCluster, mine: list[str]) -> None:
        """Once in each step, after it has sent its requests."""

    def live(self, cluster: ToyCluster, rng: random.Random, mine: list[str], step: int) -> None:
        if step < self.first_step:
            return
        for name in self.names:
            backlog = cluster.dispatcher.queue.backlog
            for _ in range(self.depth - backlog.num_waiting(name)):
                num_input, num_output, max_output = self.size(rng)
                request_id = f"{name}-{len(mine)}"
                mine.append(request_id)
                cluster.submit(ToyRequest(request_id, name, num_input, num_output, max_output))
        self.afterwards(cluster, mine)


class Sleeper(Attacker):
    """Idle for half the time, then all that was saved up."""

    depth = 60
    first_step = STEPS // 2


class Sybil(Attacker):
    """Ten keys of one organisation."""

    names = tuple(f"mallory/key{i}" for i in range(10))


class Aborter(Attacker):
    """Asks for long answers to long prompts, takes the first token and goes."""

    depth = 12

    def size(self, rng: random.Random) -> tuple[int, int, int]:
        return 40, 40, 40

    def afterwards(self, cluster: ToyCluster, mine: list[str]) -> None:
        for replica in cluster.replicas.values():
            for request_id in [one for one in replica.running if one in mine and replica.made[one]]:
                cluster.cancel(request_id)


class Crumbler(Attacker):
    """As much as ever, in the tiniest of requests."""

    depth = 120

    def size(self, rng: random.Random) -> tuple[int, int, int]:
        return 2, 1, 1


class Heaper(Attacker):
    """Everything in the largest of requests: what is counted by the request costs least."""

    def size(self, rng: random.Random) -> tuple[int, int, int]:
        return 60, 40, 40


class Liar(Attacker):
    """max_tokens of anything between the answer and three times the answer, for long answers to short prompts."""

    def size(self, rng: random.Random) -> tuple[int, int, int]:
        num_output = rng.randint(20, 40)
        return 2, num_output, rng.randint(num_output, 3 * num_output)


def pay_at_the_end_of_what_is_finished(self: LocalBook[Any], request_id: str) -> None:
    """Whoever goes early gets its input back."""
    entry = self._open[request_id]
    if entry.num_input and entry.num_output == 1:
        self.refund_input(request_id, entry.num_input)
    finished(self, request_id)


def output_is_free(self: LocalBook[Any], request_id: str, num_tokens: int) -> None:
    self._open[request_id].num_output += 0


finished = LocalBook.finished


@dataclass(frozen=True)
class Case:
    attacker: type[Attacker]
    protection: tuple[type, str, Callable[..., Any]] | str
    """Where it is, and what stands there instead when it is taken out; or a policy that lacks it."""


CASES = {
    "idle, then burst": Case(Sleeper, (Vtc, "lift", Lcf.lift)),
    "sybil under one organisation": Case(Sybil, (FairQueue, "charge", charge_only_the_client)),
    "abort after prefill": Case(Aborter, (LocalBook, "finished", pay_at_the_end_of_what_is_finished)),
    "many tiny requests": Case(Crumbler, (Vtc, "order", Fcfs.order)),
    "few huge requests": Case(Heaper, "round_robin"),
    "lying max_tokens": Case(Liar, (LocalBook, "output", output_is_free)),
}


def attack(attacker: Attacker, seed: int, policy: str = "vtc") -> tuple[float, float]:
    """The attacker's worst lead on the honest client, and the bound of the run."""
    rng = random.Random(seed)
    cluster = ToyCluster(policy, num_replicas=2, slots=4, kv_tokens=400)
    mallory = attacker.names[0].partition("/")[0] + ("/" if "/" in attacker.names[0] else "")
    leaves = {"honest": ("honest",), "other": ("other",), mallory: attacker.names}
    watch = Watch(cluster, dict.fromkeys(leaves, 1.0), leaves=leaves)
    crowd = Crowd(cluster, [Habit("honest", depth=6), Habit("other", depth=2, awake_steps=40, sleep_steps=30)], rng)
    mine: list[str] = []
    for step in range(STEPS):
        attacker.live(cluster, rng, mine, step)
        crowd.run(1)
    assert watch.num_pair_samples > 100, "both waited for long"
    return watch.worst_pair, cluster.dispatcher.bounds.bound


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_an_attacker_leads_by_the_bound_at_most(name: str, seed: int) -> None:
    lead, bound = attack(CASES[name].attacker(), seed)
    assert lead <= bound


@pytest.mark.parametrize("name", CASES)
def test_without_its_protection_the_same_attack_leads_by_more(name: str) -> None:
    case = CASES[name]
    bounds = [attack(case.attacker(), seed)[1] for seed in SEEDS]
    if isinstance(case.protection, str):
        leads = [attack(case.attacker(), seed, case.protection)[0] for seed in SEEDS]
    else:
        with removed(*case.protection):
            leads = [attack(case.attacker(), seed)[0] for seed in SEEDS]
    assert all(lead > bound for lead, bound in zip(leads, bounds, strict=True)), (leads, bounds)


# -- fifty at once -----------------------------------------------------------------------------------------------------


def picked_of_fifty() -> dict[str, int]:
    """Fifty long requests of a newcomer and fifty of an honest client, when there is room for fifty and before anybody
    was charged a token. The newcomer's come first."""
    cluster = ToyCluster(num_replicas=1, slots=50, kv_tokens=10_000)
    cluster.step()
    for client in ("mallory", "honest"):
        for i in range(50):
            cluster.submit(ToyRequest(f"{client}{i}", client, 60, 20, 20))
    for router in cluster.routers:
        cluster.exchange_router(router)
    names = [request_id for request_id, _ in cluster.granted]
    return {client: sum(name.startswith(client) for name in names) for client in ("mallory", "honest")}


def test_fifty_long_requests_before_the_first_charge_take_half_of_the_batch() -> None:
    assert picked_of_fifty() == {"mallory": 25, "honest": 25}


def test_without_the_charge_at_the_pick_they_take_all_or_nothing() -> None:
    with removed(Granting, "_grant", grant_for_nothing):
        assert sorted(picked_of_fifty().values()) == [0, 50]


# -- forged labels -----------------------------------------------------------------------------------------------------

MOST_GAIN = 1.05
REPORT, CHAT = (200, 100), (100, 50)


def share_under_label(policy: Policy, label: str) -> float:
    """Part of the service that goes to mallory, who chats and calls it ``label``, beside one that writes reports and
    one that chats."""
    queue: FairQueue[str] = FairQueue(policy)
    served = dict.fromkeys(("mallory", "writer", "chatter"), 0.0)
    labels = {"mallory": label, "writer": "report", "chatter": "chat"}
    for i in range(3):
        for client in served:
            queue.arrive(client, f"{client}-{i}", client, float(i))
    for i in range(3, 4_000):
        client = queue.pop()
        size = REPORT if client == "writer" else CHAT
        cost = OWN.service(*size)
        queue.charge(client, cost, queue.rates(client, policy.price(client, labels[client])))
        policy.finished(client, labels[client], "r0", float(size[0]), cost)
        queue.arrive(client, f"{client}-{i}", client, float(i))
        if i > 1_000:
            served[client] += cost
    return served["mallory"] / sum(served.values())


def test_a_forged_label_gains_nothing_where_the_operator_says_what_applications_cost() -> None:
    expected = {"report": 400.0, "chat": 200.0}
    honest = share_under_label(Wsc(expected=expected), "chat")
    assert share_under_label(Wsc(expected=expected), "report") <= MOST_GAIN * honest


def test_without_the_own_mean_of_each_client_a_forged_label_gains_half_as_much_again() -> None:
    expected = {"report": 400.0, "chat": 200.0}
    honest = share_under_label(PublishedWsc(expected=expected), "chat")
    assert share_under_label(PublishedWsc(expected=expected), "report") > 1.4 * honest


LIMIT = 5


def begun_under_overload(known: Interactions, call_index: int) -> int:
    """Interactions that one client begins in a minute of overload, all of whose first calls bear this index."""
    throttle = Throttle(ThrottleSettings(client_limit=LIMIT))
    throttle.overload.is_on = True
    known.is_first("somebody", "long-ago", 0, 0.0)
    begun = 0
    for i in range(50):
        now_s = 1_000.0 + i
        is_first = known.is_first("mallory", f"task-{i}", call_index, now_s)
        if is_first and throttle.refuse("mallory", "", 1.0, now_s) is not None:
            continue
        throttle.accepted("mallory", "", now_s)
        known.accepted("mallory", f"task-{i}", f"r{i}", now_s, is_first=is_first)
        begun += 1
    return begun


@pytest.mark.parametrize("call_index", [0, 1, 10**6])
def test_a_forged_call_index_begins_no_more_than_the_limit(call_index: int) -> None:
    assert begun_under_overload(Interactions(), call_index) == LIMIT


def test_where_callers_are_believed_a_forged_call_index_begins_what_it_likes() -> None:
    assert begun_under_overload(PublishedInteractions(), 1) == 50
