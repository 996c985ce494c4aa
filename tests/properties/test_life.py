"""Any interleaving of what can happen to Dispatcher, ledger and store: every token is charged as often as it should be.

The machine's steps are single events: a request, one exchange with one replica or router and its fate, a slice of a
cut, a crash. Beside the cluster runs a model that knows only what an authority may know: of each incarnation the newest
totals that reached the life which the present one goes on from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fairserve.dispatch import cut as cut_module
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.messages import NOTHING, ReportReply, StepReport, Totals
from fairserve.fairness.accounts import client_of
from tests.memory_store import MemoryStore, normal
from tests.toy_cluster import ToyCluster, ToyReplica, ToyRequest

CLIENTS = ("ann", "bob", "acme/x/cyd", "acme/y/dan")
ZERO = "zero"
"""A client that never has a request: leads are measured from it."""


@dataclass
class Model:
    """What the authority knows."""

    books: dict[tuple[str, int], tuple[int, dict[str, Totals]]] = field(default_factory=dict)
    charged: dict[str, float] = field(default_factory=dict)
    """Service by client."""
    knows_the_past: bool = False

    def hear(self, report: StepReport, epoch: int) -> None:
        seq, totals = self.books.setdefault((report.replica, report.incarnation), (0, {}))
        if report.seq <= seq:
            return
        is_baseline = not self.knows_the_past and (report.is_full or report.epoch not in (0, epoch))
        for account, total in report.totals.items():
            if not (is_baseline and account not in totals):
                more = total.service - totals.get(account, NOTHING).service
                self.charged[client_of(account)] = self.charged.get(client_of(account), 0.0) + more
        self.books[report.replica, report.incarnation] = (report.seq, totals | dict(report.totals))

    def tokens(self, client: str) -> tuple[int, int]:
        known = [totals.get(client, NOTHING) for _, totals in self.books.values()]
        return sum(one.num_input for one in known), sum(one.num_output for one in known)


class Heard(ToyCluster):
    """Tells the model what the authority hears."""

    def __init__(self, hear: Callable[[StepReport], ReportReply], policy: str, **more: Any) -> None:
        super().__init__(policy, **more)
        self._hear = hear

    def exchange_report(self, replica: ToyReplica) -> None:
        self.deliver_report_reply(replica, self._hear(self.compose(replica)))


class Life(RuleBasedStateMachine):
    """Three replicas, two routers, one authority; the network does as it likes."""

    @initialize(policy=st.sampled_from(["vtc", "lcf"]), lookahead=st.integers(0, 2))
    def begin(self, policy: str, lookahead: int) -> None:
        cut_module.SLICE = 1  # restored by teardown
        limits = DispatchLimits(lookahead=lookahead, lease_s=3.0, router_dead_s=30.0, replica_dead_s=30.0)
        self.cluster = Heard(self._hear, policy, num_replicas=3, num_routers=2, slots=2, limits=limits)
        self.cluster.dispatcher.queue.register(ZERO)
        self.model = Model()
        self.store = MemoryStore()
        self.saved: list[tuple[dict[str, Any], Model]] = []
        self.cutting: tuple[Any, Model, Any] | None = None
        self.sent: list[StepReport] = []

    # -- the world ----------------------------------------------------------------------------------------------------

    @rule(
        clients=st.lists(st.sampled_from(CLIENTS), min_size=1, max_size=5),
        router=st.integers(0, 1),
        num_input=st.integers(1, 30),
        num_output=st.integers(1, 6),
    )
    def arrive(self, clients: list[str], router: int, num_input: int, num_output: int) -> None:
        for client in clients:
            name = f"r{len(self.cluster.requests)}"
            self.cluster.submit(ToyRequest(name, client, num_input, num_output, num_output + 2), router=router)

    @rule(num_steps=st.integers(1, 3))
    def all_goes_well(self, num_steps: int) -> None:
        """Everybody computes and exchanges with the authority, and nothing is lost."""
        for _ in range(num_steps):
            self.cluster.step()

    @precondition(lambda self: self.cluster.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.cluster.cancel(data.draw(st.sampled_from(sorted(self.cluster.requests))))

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def pass_time(self, seconds: float) -> None:
        """Four seconds let every lease lapse."""
        self.cluster.now_s += seconds
        self.cluster.dispatcher.tick(self.cluster.now_s)

    @rule()
    def compute(self) -> None:
        for replica in self.cluster.replicas.values():
            replica.step()

    # -- messages -----------------------------------------------------------------------------------------------------

    @rule(data=st.data(), fate=st.sampled_from(["arrives", "lost", "reply lost", "twice"]))
    def report(self, data: st.DataObject, fate: str) -> None:
        replica = self._a_replica(data)
        report = self.cluster.compose(replica)
        if fate == "lost":
            self.sent.append(report)
            return
        reply = self._hear(report)
        if fate == "twice":
            reply = self._hear(report)
        if fate != "reply lost":
            self.cluster.deliver_report_reply(replica, reply)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def report_comes_late(self, data: st.DataObject) -> None:
        """Any of the last: overtaken, repeated, of an incarnation or to an authority that is no more."""
        self._hear(data.draw(st.sampled_from(self.sent[-8:])))

    @rule(
        router=st.integers(0, 1), poll=st.booleans(), fate=st.sampled_from(["arrives", "lost", "reply lost", "twice"])
    )
    def route(self, router: int, poll: bool, fate: str) -> None:
        book, dispatcher, now_s = self.cluster.routers[router], self.cluster.dispatcher, self.cluster.now_s
        call = book.compose_poll() if poll else book.compose(now_s)
        if fate == "lost":
            return
        for _ in range(2 if fate == "twice" else 1):
            reply = dispatcher.poll(call, now_s) if poll else dispatcher.route(call, now_s)
        if fate != "reply lost":
            book.replied(reply, to_poll=poll)

    def _hear(self, report: StepReport) -> ReportReply:
        dispatcher = self.cluster.dispatcher
        self.sent.append(report)
        self.model.hear(report, dispatcher.epoch)
        return dispatcher.report(report, self.cluster.now_s)

    # -- crashes ------------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def replica_crashes(self, data: st.DataObject) -> None:
        name = self._a_replica(data).name
        self.cluster.kill_replica(name)
        self.cluster.restart_replica(name)

    @rule()
    def save_begins(self) -> None:
        if self.cutting is None:
            steps = self.cluster.dispatcher.cutter.steps(is_whole=not self.saved)
            self.cutting = (steps, copy.deepcopy(self.model), normal(self.cluster.dispatcher.dump()))
            self.save_goes_on()

    @precondition(lambda self: self.cutting is not None)
    @rule(num_slices=st.sampled_from([1, 3, 100]))
    def save_goes_on(self, num_slices: int = 1) -> None:
        assert self.cutting is not None
        steps, model, expected = self.cutting
        try:
            for _ in range(num_slices):
                next(steps)
        except StopIteration as end:
            self.cutting = None
            self.store.save(end.value)
            assert normal(self.store.snapshot()) == expected
            self.saved.append((self.store.snapshot(), replace(model, knows_the_past=True)))

    @rule()
    def save_while_busy(self) -> None:
        self.save_begins()
        while self.cutting is not None:
            self.cluster.step()
            self.save_goes_on(5)

    @rule(age=st.sampled_from([0, 0, 0, 1, 2, None]))
    def authority_crashes(self, age: int | None) -> None:
        """It comes back with the newest snapshot, an older one, or none."""
        found = self.saved[-1 - age] if age is not None and age < len(self.saved) else None
        cluster, old = self.cluster, self.cluster.dispatcher
        cluster.dispatcher = cluster._new_dispatcher(old.epoch + 1)
        self.cutting = None  # it died with it
        self.model = Model()
        if found is not None:
            cluster.dispatcher.load(found[0])
            self.model = copy.deepcopy(found[1])
        else:
            cluster.dispatcher.queue.register(ZERO)
        self.saved = []  # the next cut is whole
        self.store = MemoryStore()

    # -- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def every_owner_is_in_order(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check()
            self._check_tokens(self.cluster.dispatcher)

    def _check_tokens(self, dispatcher: Dispatcher) -> None:
        for client in CLIENTS:
            totals = dispatcher.ledger.totals(client)
            assert (totals.num_input, totals.num_output) == self.model.tokens(client), client

    def _check_charges(self, dispatcher: Dispatcher) -> None:
        """Without lifts a counter is the service that was charged, at every level, provisional charges aside."""
        held = dispatcher.watch.unserved
        for client in CLIENTS:
            top = client.partition("/")[0] + "/" if "/" in client else client
            lead = dispatcher.queue.counter(top) - held.get(top, 0.0) - dispatcher.queue.counter(ZERO)
            family = [one for one in CLIENTS if one == client or ("/" in client and one.startswith(top))]
            assert abs(lead - sum(self.model.charged.get(one, 0.0) for one in family)) < 1e-6, client

    def teardown(self) -> None:
        cut_module.SLICE = 500
        if not hasattr(self, "cluster"):
            return
        if self.cluster.policy == "lcf":
            self._check_charges(self.cluster.dispatcher)
        for _ in range(3):  # one is news, one may answer a new epoch, one is full
            for replica in self.cluster.replicas.values():
                report = self.cluster.compose(replica)
                self.cluster.deliver_report_reply(replica, self._hear(report))
        self.cluster.check()
        self._check_tokens(self.cluster.dispatcher)
        for replica in self.cluster.replicas.values():  # of the living nothing is missing
            book = self.model.books.get((replica.name, replica.incarnation), (0, {}))[1]
            told = {client: [total.num_input, total.num_output] for client, total in book.items()}
            assert told == {client: row for client, row in replica.delivered.items() if any(row)}
        if self.cluster.policy == "lcf":
            self._check_charges(self.cluster.dispatcher)

    def _a_replica(self, data: st.DataObject) -> ToyReplica:
        return self.cluster.replicas[data.draw(st.sampled_from(sorted(self.cluster.replicas)))]


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
TestLife = Life.TestCase
