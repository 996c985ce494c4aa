"""The weighted service counter: what an application is worth, what a forged label buys, what interactions may take."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.fairness.queue import FairQueue
from fairserve.fairness.wsc import RATE, Wsc

MEANS = {"chat": 50.0, "agent": 400.0, "report": 3_000.0}
Strategy = Callable[[str, float, random.Random], str]
"""True application, service, chance -> the label to send."""


def charge(policy: Wsc, client: str, label: str, service: float) -> float:
    """One request from beginning to end; what it added to the counter."""
    charged = policy.price(client, label) * service
    policy.finished(client, label, "r0", 0.0, service)
    return charged


def units(policy: Wsc, client: str, label: str, service: float) -> float:
    """The same, as a number of typical requests of that moment."""
    scale = policy._typical or service
    return charge(policy, client, label, service) / scale


def typical(application: str, rng: random.Random) -> float:
    return MEANS[application] * rng.uniform(0.5, 1.5)


def neighbours(policy: Wsc, rng: random.Random, num: int) -> None:
    """Twenty honest clients, who make the applications' means what they are."""
    for _ in range(num):
        application = rng.choice(sorted(MEANS))
        units(policy, f"neighbour{rng.randrange(20)}", application, typical(application, rng))


def rivals(strategy: Strategy, seed: int, *, num: int = 400, heaviness: float = 1.0) -> tuple[float, float]:
    """What an honest client and one that labels by ``strategy`` pay for the very same requests, in typical requests."""
    rng = random.Random(seed)
    policy = Wsc()
    neighbours(policy, rng, 1_500)
    honest = forger = 0.0
    for _ in range(num):
        neighbours(policy, rng, 8)
        application = rng.choice(sorted(MEANS))
        service = typical(application, rng) * heaviness
        honest += units(policy, "honest", application, service)
        forger += units(policy, "forger", strategy(application, service, rng), service)
    return honest, forger


# -- what an application is worth --------------------------------------------------------------------------------------


def test_until_anything_has_finished_service_counts_as_it_is() -> None:
    assert Wsc().price("ann", "chat") == 1.0


def test_requests_of_typical_size_count_the_same_in_every_application() -> None:
    rng = random.Random(0)
    policy = Wsc()
    neighbours(policy, rng, 3_000)
    prices = {application: policy.price("newcomer", application) * mean for application, mean in MEANS.items()}
    assert max(prices.values()) < 1.25 * min(prices.values())


def test_on_average_a_unit_of_service_remains_about_a_unit() -> None:
    """So that gaps, quanta and bounds keep their meaning."""
    rng = random.Random(1)
    policy = Wsc()
    neighbours(policy, rng, 500)
    served = charged = 0.0
    for _ in range(2_000):
        application = rng.choice(sorted(MEANS))
        service = typical(application, rng)
        served += service
        charged += charge(policy, f"neighbour{rng.randrange(20)}", application, service)
    assert charged == pytest.approx(served, rel=0.25)


def test_what_the_operator_says_of_an_application_is_not_learned_over() -> None:
    policy = Wsc(expected={"chat": 100.0})
    for _ in range(50):
        units(policy, "ann", "agent", 1_000.0)
    assert policy.price("bob", "chat") == pytest.approx(10.0)
    for _ in range(200):
        units(policy, "ann", "chat", 100_000.0)
    typical_now = policy.price("bob", "agent") * 1_000.0
    assert policy.price("bob", "chat") == pytest.approx(typical_now / 100.0)


def test_requests_of_no_service_make_no_price_infinite() -> None:
    policy = Wsc()
    for _ in range(50):
        charge(policy, "ann", "chat", 0.0)
    assert 0 < policy.price("ann", "chat") < float("inf")
    assert 0 < policy.price("bob", "") < float("inf")


def test_grace_must_be_positive() -> None:
    with pytest.raises(ValueError, match="grace must be above 0"):
        Wsc(0.0)


# -- forged labels -----------------------------------------------------------------------------------------------------

requests = st.lists(st.tuples(st.sampled_from([*MEANS, "new"]), st.floats(1.0, 10_000.0)), min_size=1, max_size=150)


@settings(max_examples=60, deadline=None)
@given(requests=requests, seed=st.integers(0, 100))
def test_whatever_the_labels_each_costs_at_least_one_typical_request_per_request(
    requests: list[tuple[str, float]], seed: int
) -> None:
    """Up to a credit that depends on where a client's means began and ended, and not on how many requests it sent: with
    its own mean o, service / o >= 1 + ln(o after / o before) / RATE."""
    rng = random.Random(seed)
    policy = Wsc()
    neighbours(policy, rng, 200)
    paid = 0.0
    first: dict[str, float] = {}
    for label, service in requests:
        neighbours(policy, rng, 1)
        paid += units(policy, "forger", label, service)
        first.setdefault(label, service)
    credit = sum(log(policy._own["forger"][label] / service) / RATE for label, service in first.items())
    assert paid >= len(requests) - len(first) + credit - 1e-6


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_labels_cost_more_than_the_truth(seed: int) -> None:
    honest, forger = rivals(lambda application, service, rng: rng.choice(sorted(MEANS)), seed)
    assert forger > 1.5 * honest


TRICKS: dict[str, Strategy] = {
    "always the largest": lambda application, service, rng: "report",
    "always the smallest": lambda application, service, rng: "chat",
    "one size up": lambda application, service, rng: {"chat": "agent", "agent": "report", "report": "report"}[
        application
    ],
    "one size down": lambda application, service, rng: {"chat": "chat", "agent": "chat", "report": "agent"}[
        application
    ],
    "upside down": lambda application, service, rng: {"chat": "report", "agent": "agent", "report": "chat"}[
        application
    ],
    "small ones as large": lambda application, service, rng: "report" if service < 200 else application,
    "none at all": lambda application, service, rng: "",
    "a new one each time": lambda application, service, rng: f"new{rng.randrange(10**9)}",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_client_whose_requests_are_typical_gains_nothing_by_any_trick(trick: str) -> None:
    """15 %: the noise of means over 20 requests."""
    ratios = [forger / honest for honest, forger in (rivals(TRICKS[trick], seed) for seed in range(4))]
    assert sum(ratios) / len(ratios) > 0.85, ratios


def test_a_client_heavier_than_its_applications_saves_its_surcharge_at_most() -> None:
    """What a larger label is worth to it: requests three times as heavy as typical cost three typical requests under
    their own label, and under a larger one never less than one. Labels are registered per key for this reason."""
    for seed in range(4):
        honest, forger = rivals(TRICKS["always the largest"], seed, heaviness=3.0)
        assert 400 * 0.9 < forger < honest < 400 * 3 * 1.25


def test_one_cheap_request_is_all_that_a_fresh_label_buys() -> None:
    rng = random.Random(0)
    policy = Wsc()
    neighbours(policy, rng, 1_000)
    first, second, *_ = (units(policy, "forger", "report", 10.0) for _ in range(5))
    assert second > 50 * first
    assert policy.price("forger", "report") * 10.0 == pytest.approx(policy._typical, rel=0.01)


def test_a_forger_changes_what_others_pay_only_through_the_means() -> None:
    policy = Wsc(expected={"chat": 100.0})
    units(policy, "ann", "chat", 100.0)
    before = policy.price("ann", "chat") / (policy._typical or 0)
    for _ in range(100):
        units(policy, "forger", "chat", 1.0)
    assert policy.price("ann", "chat") / (policy._typical or 0) == before


# -- interactions under way --------------------------------------------------------------------------------------------


def duel(policy: Wsc, costs: Iterable[float], under_way: Callable[[int], set[str]]) -> list[dict[str, float]]:
    """``greedy`` and ``modest`` always wait; each pick costs the next of ``costs``. The counters after each."""
    queue: FairQueue[str] = FairQueue(policy)
    history = []
    for client in ("greedy", "modest"):
        queue.arrive(client, f"{client}-0", client, 0.0)
    for i, cost in enumerate(costs):
        for client in ("greedy", "modest"):
            queue.set_under_way(client, client in under_way(i))
        client = queue.pop()
        queue.charge(client, cost)
        queue.arrive(client, f"{client}-{i + 1}", client, i + 1.0, lift=False)
        history.append({client: queue.counter(client) for client in ("greedy", "modest")})
    queue.check()
    return history


def test_within_the_grace_whoever_has_an_interaction_under_way_goes_first() -> None:
    history = duel(Wsc(500.0), [100.0] * 5, lambda i: {"greedy"})
    assert history[-1] == {"greedy": 500.0, "modest": 0.0}


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.floats(1.0, 800.0), min_size=20, max_size=200),
    grace=st.sampled_from([1.0, 50.0, 500.0]),
    switches=st.sets(st.integers(0, 200)),
)
def test_an_endless_interaction_starves_nobody(costs: list[float], grace: float, switches: set[int]) -> None:
    """However interactions come and go: the lead is at most the grace and one charge."""

    def under_way(i: int) -> set[str]:
        return {"greedy"} | ({"modest"} if i in switches else set())

    for counters in duel(Wsc(grace), costs, under_way):
        assert counters["greedy"] - counters["modest"] <= grace + max(costs)
        assert counters["modest"] - counters["greedy"] <= grace + max(costs)


def test_without_interactions_the_least_counter_goes_next_however_small_the_difference() -> None:
    queue: FairQueue[str] = FairQueue(Wsc(500.0))
    for client, counter in (("ann", 3.0), ("bob", 2.0), ("cyd", 499.0)):
        queue.arrive(client, client, client, 0.0)
        queue.set_counter(client, counter)
    assert [queue.pop() for _ in range(3)] == ["bob", "ann", "cyd"]


def test_who_was_away_is_lifted_to_nobody_more_than_the_grace_ahead() -> None:
    queue: FairQueue[str] = FairQueue(Wsc(500.0))
    for client, counter in (("ann", 900.0), ("bob", 510.0)):
        queue.arrive(client, client, client, 0.0)
        queue.set_counter(client, counter)
    queue.set_under_way("ann", True)
    queue.arrive("new", "n", "new", 1.0)
    assert 510.0 <= queue.counter("new") <= 510.0 + 500.0


def test_without_a_label_a_request_pays_for_what_it_costs() -> None:
    """Else, where nobody labels anything, the policy would count requests and long ones would be free."""
    policy = Wsc()
    neighbours(policy, random.Random(0), 200)
    for _ in range(50):
        policy.finished("heavy", "", "r0", 0.0, 10_000.0)
    assert policy.price("heavy", "") == 1.0
