"""FairQueue with every policy: who goes next, and where a client that becomes active is lifted to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from fairserve.errors import ConfigError, RateLimited, Refused
from fairserve.fairness.baselines import Rpm
from fairserve.fairness.catalog import POLICIES, make_policy
from fairserve.fairness.queue import FairQueue

Make = Callable[[str], FairQueue[str]]


@pytest.fixture
def make() -> Iterator[Make]:
    """``make(policy)`` gives a queue; all are checked at the end."""
    queues: list[FairQueue[str]] = []

    def build(policy: str) -> FairQueue[str]:
        queues.append(FairQueue(make_policy(policy)))
        return queues[-1]

    yield build
    for queue in queues:
        queue.check()


def arrive(queue: FairQueue[str], client: str, request_id: str, place: float = 0.0) -> float:
    return queue.arrive(client, request_id, request_id, place)


# -- VTC ---------------------------------------------------------------------------------------------------------------


def test_the_client_with_the_least_counter_goes_next(make: Make) -> None:
    queue = make("vtc")
    for client in ("ann", "bob", "cyd"):
        arrive(queue, client, client)
    queue.charge("ann", 5)
    queue.charge("cyd", 2)
    assert queue.least_served() == "bob"
    queue.charge("bob", 3)
    assert [queue.pop() for _ in range(3)] == ["cyd", "bob", "ann"]


def test_equal_counters_go_by_name_whatever_the_order_of_arrival(make: Make) -> None:
    queue = make("vtc")
    for client in ("cyd", "ann", "bob"):
        arrive(queue, client, client)
    assert [queue.pop() for _ in range(3)] == ["ann", "bob", "cyd"]


def test_with_others_waiting_a_newcomer_is_lifted_to_the_least_of_them(make: Make) -> None:
    queue = make("vtc")
    for client, counter in (("ann", 100.0), ("bob", 70.0)):
        arrive(queue, client, client)
        queue.set_counter(client, counter)
    assert arrive(queue, "new", "n") == 70
    assert queue.counter("new") == 70


def test_when_nobody_waits_a_newcomer_is_lifted_to_the_last_that_left(make: Make) -> None:
    queue = make("vtc")
    for client, counter in (("ann", 100.0), ("bob", 70.0)):
        arrive(queue, client, client)
        queue.set_counter(client, counter)
    queue.pop()
    queue.pop()
    assert queue.groups[""].last_to_leave == "ann"
    queue.charge("ann", 11)
    assert arrive(queue, "new", "n") == 111, "the counter as it is now, not as it was when the client left"


def test_the_last_to_leave_is_the_client_whose_last_request_left_most_recently(make: Make) -> None:
    queue = make("vtc")
    top = queue.groups[""]
    assert top.last_to_leave is None
    for request_id, client in [("a1", "ann"), ("a2", "ann"), ("b1", "bob")]:
        arrive(queue, client, request_id)
    queue.pick("ann", "a1", 0.0, (1.0,))
    assert top.last_to_leave is None
    queue.pick("bob", "b1", 0.0, (1.0,))
    assert top.last_to_leave == "bob"
    queue.remove("a2")
    assert top.last_to_leave == "ann"


def test_the_very_first_client_is_not_lifted(make: Make) -> None:
    assert arrive(make("vtc"), "ann", "a") == 0


def test_an_idle_client_comes_back_level_not_ahead(make: Make) -> None:
    queue = make("vtc")
    arrive(queue, "sleeper", "s1")
    queue.pop()
    for i in range(10):
        arrive(queue, "busy", f"b{i}")
        queue.charge("busy", 100)
    arrive(queue, "sleeper", "s2")
    assert queue.counter("sleeper") == queue.counter("busy")


def test_a_lift_never_forgives_a_debt(make: Make) -> None:
    queue = make("vtc")
    arrive(queue, "ann", "a1")
    queue.charge("ann", 500)
    queue.pop()
    arrive(queue, "bob", "b1")
    queue.set_counter("bob", 10)
    assert arrive(queue, "ann", "a2") == 0
    assert queue.counter("ann") == 500
    assert queue.pop() == "b1"


def test_running_requests_do_not_keep_a_client_active(make: Make) -> None:
    queue = make("vtc")
    arrive(queue, "ann", "a1")
    queue.pop()  # runs now
    arrive(queue, "bob", "b1")
    queue.charge("bob", 50)
    assert arrive(queue, "ann", "a2") == 50


def test_a_client_that_waits_already_is_not_lifted_again(make: Make) -> None:
    queue = make("vtc")
    arrive(queue, "ann", "a1")
    arrive(queue, "bob", "b1")
    queue.set_counter("bob", 80)
    queue.set_counter("ann", 30)
    assert arrive(queue, "ann", "a2") == 0


def test_a_preempted_request_comes_back_without_a_lift(make: Make) -> None:
    queue = make("vtc")
    arrive(queue, "ann", "a1")
    queue.charge("ann", 40)
    assert queue.arrive("bob", "b1", "b1", 0.0, lift=False) == 0
    assert queue.counter("bob") == 0


def test_removing_the_last_request_makes_a_client_inactive(make: Make) -> None:
    queue = make("vtc")
    arrive(queue, "ann", "a1")
    assert queue.remove("a1") == "a1"
    assert queue.remove("a1") is None
    assert (queue.is_waiting("ann"), queue.least_served(), queue.peek(), len(queue)) == (False, None, None, 0)


def test_the_reference_of_the_lift_survives_a_restart(make: Make) -> None:
    queue = make("vtc")
    queue.set_counter("ann", 90)
    queue.restore_last_to_leave("", "ann")
    assert arrive(queue, "bob", "b") == 90


def test_a_charge_moves_the_counter_by_service_over_weight(make: Make) -> None:
    queue = make("vtc")
    queue.register("ann")
    queue.register("bob", weight=4.0)
    for client in ("ann", "bob"):
        queue.charge(client, 100)
    assert (queue.counter("ann"), queue.counter("bob")) == (100, 25)


def test_a_charge_is_given_back_in_full_even_after_the_weight_changed(make: Make) -> None:
    queue = make("vtc")
    queue.register("bob", weight=4.0)
    rates = queue.rates("bob")
    queue.charge("bob", 100, rates)
    queue.register("bob", weight=1.0)
    queue.charge("bob", -100, rates)
    assert queue.counter("bob") == 0


def test_a_charge_that_returns_before_the_same_is_served_leaves_nothing_behind(make: Make) -> None:
    queue = make("vtc")
    for i in range(10):
        arrive(queue, f"c{i}", f"r{i}")
    for i in range(10):
        queue.charge(f"c{i}", 100.0 + i)
    assert queue.least_served() == "c0"
    heap = queue.groups[""]._heap
    for client in ("c0", "c1", "c0"):
        queue.charge(client, -100.0)
        queue.charge(client, 102.0)
    assert queue.least_served() == "c2"
    assert len(heap) == 10
    queue.charge("c7", -50.0)
    assert queue.least_served() == "c7", "what returns and is not served counts at once"


def test_a_new_weight_leaves_earlier_charges_as_they_were(make: Make) -> None:
    queue = make("vtc")
    queue.register("bob", weight=4.0)
    queue.charge("bob", 100)
    queue.register("bob", weight=2.0)
    assert queue.counter("bob") == 25
    queue.charge("bob", 100)
    assert queue.counter("bob") == 75


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_lcf_does_not_lift_so_a_sleeper_takes_every_turn(make: Make) -> None:
    queue = make("lcf")
    arrive(queue, "busy", "b")
    queue.charge("busy", 1_000)
    for i in range(5):
        assert arrive(queue, "sleeper", f"s{i}") == 0
    for _ in range(5):
        assert queue.least_served() == "sleeper"
        queue.charge("sleeper", 100)
        queue.pop()


def test_fcfs_serves_all_clients_by_arrival_whatever_their_counters(make: Make) -> None:
    queue = make("fcfs")
    for place, (client, request_id) in enumerate([("bob", "1"), ("ann", "2"), ("bob", "3"), ("ann", "4")]):
        arrive(queue, client, request_id, place)
    queue.charge("bob", 10_000)
    assert [queue.pop() for _ in range(4)] == ["1", "2", "3", "4"]


def test_fcfs_gives_a_returned_request_its_old_place(make: Make) -> None:
    queue = make("fcfs")
    arrive(queue, "ann", "1", 1.0)
    arrive(queue, "bob", "2", 2.0)
    queue.pop()
    arrive(queue, "ann", "1", 1.0)
    assert queue.pop() == "1"


def told(error: Refused | None) -> tuple[str, int, float]:
    assert isinstance(error, RateLimited)
    return error.client, error.limit, error.retry_after_s  # type: ignore[attr-defined]


def test_rpm_accepts_its_limit_in_any_sixty_seconds_and_tells_when_to_come_back() -> None:
    policy = Rpm(limit=2)
    for now_s in (0.0, 10.0):
        assert policy.refuse("ann", now_s) is None
        policy.accepted("ann", now_s)
    assert told(policy.refuse("ann", 30.0)) == ("ann", 2, 30.0)
    assert policy.refuse("bob", 30.0) is None
    assert policy.refuse("ann", 60.0) is None, "the window slides"
    policy.accepted("ann", 60.0)
    assert told(policy.refuse("ann", 61.0)) == ("ann", 2, 9.0)


def test_rpm_needs_a_limit_of_at_least_one() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1"):
        Rpm(limit=0)


def test_policies_are_made_by_name_and_an_unknown_name_lists_the_known() -> None:
    for name in POLICIES:
        assert make_policy(name).name == name
    with pytest.raises(ConfigError, match="d2lpm, dlpm, drr, fcfs, lcf, round_robin, rpm, vtc, wsc"):
        make_policy("wfq")


def test_asking_a_policy_changes_nothing(make: Make) -> None:
    for name in POLICIES:
        queue = make(name)
        arrive(queue, "ann", "a", 1.0)
        arrive(queue, "bob", "b", 2.0)
        before = (queue.counter("ann"), queue.counter("bob"), queue.peek())
        for _ in range(3):
            queue.policy.order("ann", queue.groups[""])
            queue.policy.lift("cyd", queue.groups[""])
            queue.policy.refuse("ann", 0.0)
            queue.least_served()
        assert before == (queue.counter("ann"), queue.counter("bob"), queue.peek())


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_any_history_keeps_the_order_true(policy: str, make: Make, rng: random.Random) -> None:
    queue = make(policy)
    waiting: list[str] = []
    for i in range(600):
        client = rng.choice("abcdef")
        match rng.randrange(6):
            case 0 | 1:
                arrive(queue, client, f"r{i}", rng.randrange(50))
                waiting.append(f"r{i}")
            case 2 if waiting:
                waiting.remove(queue.pop())
            case 3 if waiting:
                queue.remove(waiting.pop(rng.randrange(len(waiting))))
            case 4 if client in queue.table:
                queue.charge(client, rng.randrange(100))
            case 5 if client in queue.table:
                queue.charge(client, -rng.randrange(50))
        queue.check()
    assert len(queue) == len(waiting)
