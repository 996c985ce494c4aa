"""Each protection is taken out, one at a time, and the tests must notice: so they can fail, and each part is needed.

``SEEDS`` runs of a family are enough to see it; the same runs show nothing when nothing is taken out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fairserve.dispatch.capacity import ReplicaRoom
from fairserve.dispatch.cut import Changes
from fairserve.dispatch.granting import Granting
from fairserve.dispatch.leases import Waiting, scaled
from fairserve.dispatch.ledger import Ledger
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.messages import StepReport, Totals
from fairserve.dispatch.replica_book import LocalBook
from fairserve.dispatch.stages import Stages
from fairserve.fairness.baselines import Fcfs, Lcf
from fairserve.fairness.hierarchy import path_of
from fairserve.fairness.queue import Amounts, FairQueue
from fairserve.fairness.vtc import Vtc
from fairserve.fairness.waiting import WaitingClients
from tests.properties.bound_runs import violations
from tests.properties.crowd import Crowd, Habit
from tests.properties.test_life import Life
from tests.toy_cluster import Lossy, Perfect, ToyCluster

SEEDS = range(20)
STEPS = 200

grant, grant_all, requeue = Granting._grant, Granting._grant_all, Stages.requeue
merge, charge = Ledger.merge, FairQueue.charge


# -- what is taken out ------------------------------------------------------------------------------------------------


def lift_only_when_nobody_waits(self: Vtc, client: str, waiting: WaitingClients) -> float | None:
    if waiting.least_served() is not None or waiting.last_to_leave is None:
        return None
    return waiting.counter(waiting.last_to_leave)


def lift_only_when_somebody_waits(self: Vtc, client: str, waiting: WaitingClients) -> float | None:
    least = waiting.least_served()
    return None if least is None else waiting.counter(least)


def grant_for_nothing(self: Granting, waiting: Waiting, room: ReplicaRoom, need: int, now_s: float) -> None:
    """The input is charged when the replica reports it."""
    grant(self, waiting, room, need, now_s)
    lease = self._state.leases.get(waiting.submit.request_id)
    assert lease is not None
    self._stages._release(lease, lease.held)


def merge_repeats(self: Ledger, report: StepReport, *, as_baseline: bool = False) -> dict[str, Totals] | None:
    """A report that comes twice counts twice."""
    if report.seq <= self.ack(report.replica, report.incarnation):
        added = self.__dict__.get("last_added", {}).get(report.replica, {})
        for account, difference in added.items():
            self._add(account, difference)
        return dict(added)
    result = merge(self, report, as_baseline=as_baseline)
    self.__dict__.setdefault("last_added", {})[report.replica] = result
    return result


def grant_whatever_fits(self: Granting, now_s: float) -> None:
    """Past a head that does not fit, the next client's is tried."""
    state = self._state

    def fitting() -> tuple[Waiting, ReplicaRoom, int] | None:
        for client in sorted(state.queue.backlog.clients(), key=state.queue.standing):
            waiting = state.queue.backlog.head(client)[1]
            need = state.limits.need_tokens(waiting.submit)
            room = state.placement.room_for(waiting.submit, need, now_s)
            if room is not None:
                return waiting, room, need
        return None

    while (found := fitting()) is not None:
        waiting, room, need = found
        self._grant(waiting, room, need, now_s)


def requeue_without_refund(self: Stages, request_id: str, now_s: float) -> None:
    lease = self._state.leases.get(request_id)
    assert lease is not None
    self._state.watch.gave_back(lease.waiting.submit.client, scaled(lease.held, lease.rates))
    lease.held = 0.0
    requeue(self, request_id, now_s)


def apply_counters_as_they_are(self: LocalBook[Any], counters: dict[str, float], reported: dict[str, float]) -> None:
    """What was charged here since the report is forgotten until the next."""
    for node, counter in counters.items():
        self._queue.set_counter(node, counter)


def grant_all_then_charge(self: Granting, now_s: float) -> None:
    picked = []

    def take(queue: FairQueue[Any], client: str, request_id: str, service: float, rates: Amounts) -> None:
        queue.remove(request_id)
        picked.append((client, service, rates))

    with removed(FairQueue, "pick", take):
        grant_all(self, now_s)
    for client, service, rates in picked:
        self._state.queue.charge(client, service, rates)


def charge_only_the_client(self: FairQueue[Any], client: str, service: float, rates: Amounts | None = None) -> None:
    """The groups above pay nothing."""
    above = len(path_of(client)) - 1
    charge(self, client, service, (0.0,) * above + (rates or self.rates(client))[above:])


PROTECTIONS: dict[str, tuple[type, str, Callable[..., Any], str]] = {
    "counters": (Vtc, "order", Fcfs.order, "paper"),
    "lift": (Vtc, "lift", Lcf.lift, "paper"),
    "lift, somebody waits": (Vtc, "lift", lift_only_when_nobody_waits, "paper"),
    "lift, nobody waits": (Vtc, "lift", lift_only_when_somebody_waits, "hierarchy"),
    "charge at admission": (Granting, "_grant", grant_for_nothing, "cluster"),
    "no skipping": (Granting, "_grant_all", grant_whatever_fits, "paper"),
    "own charges on top": (LocalBook, "apply_counters", apply_counters_as_they_are, "late_replies"),
    "pick and charge in one step": (Granting, "_grant_all", grant_all_then_charge, "cluster"),
    "charges of groups": (FairQueue, "charge", charge_only_the_client, "hierarchy"),
}
"""Where, what stands there instead, and the family of runs whose bounds need it."""


@contextmanager
def removed(owner: type, method: str, instead: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, instead)
        yield


# -- bounds -----------------------------------------------------------------------------------------------------------


def finds_violation(family: str) -> bool:
    return any(violations(family, (seed,), STEPS) for seed in SEEDS)


@pytest.mark.parametrize("family", sorted({family for *_, family in PROTECTIONS.values()}))
def test_the_bounds_hold_in_these_runs_as_long_as_nothing_is_taken_out(family: str) -> None:
    assert not finds_violation(family)


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_bound_breaks_without(protection: str) -> None:
    owner, method, instead, family = PROTECTIONS[protection]
    with removed(owner, method, instead):
        assert finds_violation(family)


# -- accounts ---------------------------------------------------------------------------------------------------------


def charges_differ_from_delivery(seed: int) -> bool:
    """Reports come twice or not at all, or routers lose grants; there are no lifts, so that a counter is the service
    received and nothing else."""
    rng = random.Random(seed)
    swallowed = rng.choice((0.0, 0.1))
    cluster = ToyCluster(
        "lcf",
        num_replicas=2,
        kv_tokens=60,
        network=Perfect() if swallowed else Lossy(rng, 0.2),
        limits=DispatchLimits(lookahead=1, lease_s=1.0),
        swallow=lambda: rng.random() < swallowed,
    )
    Crowd(cluster, [Habit(client, max_input=20, max_output=10) for client in ("ann", "bob")], rng).run(50)
    swallowed = 0.0
    for _ in range(40):  # what was swallowed lapses
        cluster.step()
    cluster.run_until_quiet()
    for client in ("ann", "bob"):
        totals = cluster.dispatcher.ledger.totals(client)
        told = Totals(*(cluster.told(client)[0], 0, cluster.told(client)[1]), cluster.delivered(client))
        if totals != told or abs(cluster.dispatcher.queue.counter(client) - told.service) > 1e-6:
            return True
    return False


def test_charges_are_what_was_delivered_as_long_as_nothing_is_taken_out() -> None:
    assert not any(map(charges_differ_from_delivery, SEEDS))


@pytest.mark.parametrize(
    ("owner", "method", "instead"),
    [(Ledger, "merge", merge_repeats), (Stages, "requeue", requeue_without_refund)],
    ids=["the ledger's idempotence", "the refund of a lapsed lease"],
)
def test_charges_differ_from_delivery_without(owner: type, method: str, instead: Callable[..., Any]) -> None:
    with removed(owner, method, instead):
        assert any(map(charges_differ_from_delivery, SEEDS))


# -- any interleaving -------------------------------------------------------------------------------------------------


def merge_whatever_comes(self: Ledger, report: StepReport, *, as_baseline: bool = False) -> dict[str, Totals] | None:
    """An overtaken report is the newest to it."""
    book = self._books.get((report.replica, report.incarnation))
    if book is not None:
        book.seq = min(book.seq, report.seq - 1)
    return merge(self, report, as_baseline=as_baseline)


def read_late(self: Changes[Any, Any], keys: Any) -> None:
    """What changes while a cut is read is read as it is then."""


def tell_nothing(self: Changes[Any, Any], keys: Any) -> None:
    """The next cut does not hold what changed."""
    self.before_unkept(keys)


def run_life() -> None:
    """Until it goes wrong, mostly within a second, and without the search for a shorter example."""
    quick = settings(
        max_examples=2_000,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
    )
    run_state_machine_as_test(Life, settings=quick)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("owner", "method", "instead"),
    [
        (Ledger, "merge", merge_repeats),
        (Ledger, "merge", merge_whatever_comes),
        (Stages, "requeue", requeue_without_refund),
        (Changes, "before_unkept", read_late),
        (Changes, "before", tell_nothing),
    ],
    ids=["a repeat changes nothing", "nor does an overtaken report", "the refund", "copy on write", "telling changes"],
)
def test_some_life_goes_wrong_without(owner: type, method: str, instead: Callable[..., Any]) -> None:
    with removed(owner, method, instead), pytest.raises(AssertionError):
        run_life()
