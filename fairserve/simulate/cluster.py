"""A cluster on virtual time: the real Dispatcher, RouterBook, LocalBook, Reporter and Batcher, event by event.

    record = simulate(ClusterSetup(replicas=(ReplicaSetup(step_time),), make_policy=..., make_dispatcher=...), arrivals)

Only the world is modelled: how long a step takes (``step_time.py``), what a prefix cache holds (``prefix_cache.py``),
how messages travel (``network.py``), who goes away and what fails. The same setup, arrivals and seed give the same
record, ``wall_s`` apart.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial

from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.request import GenerateRequest
from fairserve.errors import ConfigError, Refused
from fairserve.simulate.audit import check_charges
from fairserve.simulate.authority import Authority, Tally
from fairserve.simulate.ingress import CentralRouter, DirectRouter
from fairserve.simulate.live import Live, request_of
from fairserve.simulate.meter import Meter
from fairserve.simulate.network import Network
from fairserve.simulate.records import Arrival, RequestRecord, RunRecord
from fairserve.simulate.replica import SimReplica
from fairserve.simulate.reporting import Reporting
from fairserve.simulate.setup import ClusterSetup, Fault, ReplicaSetup
from fairserve.simulate.timeline import Timeline

__all__ = ["ClusterSetup", "Fault", "ReplicaSetup", "SimCluster", "simulate"]


def simulate(setup: ClusterSetup, arrivals: Sequence[Arrival], *, check: bool = False) -> RunRecord:
    """Serve the arrivals until ``setup.duration_s``, or until all are over.

    Args:
        check: after the run, assert the invariants of every owner and that the authority has charged what was
            delivered, to the token.

    Raises:
        ConfigError: two arrivals of one id, one that no replica could hold, or one at an ingress that is not there.
    """
    began_s = time.perf_counter()
    cluster = SimCluster(setup, arrivals)
    cluster.run()
    record = cluster.record()
    if check:
        cluster.check()
    record.wall_s = time.perf_counter() - began_s
    return record


class SimCluster:
    def __init__(self, setup: ClusterSetup, arrivals: Sequence[Arrival]) -> None:
        self.setup = setup
        self.records = [
            RequestRecord(one)
            for one in sorted(arrivals, key=lambda one: one.arrival_s)
            if one.arrival_s < setup.duration_s
        ]
        _check_arrivals(setup, self.records)
        self.timeline = Timeline()
        self.network = Network(self.timeline, setup.network_delay_s, setup.loss, self._rng("network"))
        self.meter = Meter(self.timeline, setup.group_weights, setup.max_watched)
        is_central = setup.placement == "central"
        self.authority = Authority(setup, self.timeline, self.meter) if is_central else None
        self.incarnations: list[tuple[SimReplica, Reporting | None]] = []
        """Every replica that there ever was; the newest of a name comes last."""
        self._replicas: dict[str, SimReplica] = {}
        self._reportings: dict[str, Reporting] = {}
        for i in range(len(setup.replicas)):
            self._start_replica(f"replica-{i}")
        self._doors = [self._new_door(i) for i in range(setup.num_ingress)]
        self._ingress_rng = self._rng("ingress")
        self._num_come = 0
        self._num_open = 0
        self._cut: set[tuple[str, str]] = set()
        """Client and interaction of every interaction with a refused call."""
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._schedule()

    def _rng(self, name: str) -> random.Random:
        """Chance of its own for everybody, so that what one draws changes nothing for another."""
        return random.Random(f"{self.setup.seed} {name}")

    def _new_door(self, i: int) -> CentralRouter | DirectRouter:
        if self.authority is None:
            return DirectRouter(self)
        return CentralRouter(f"router-{i}", self, self.authority, self._rng(f"router-{i}"))

    def _schedule(self) -> None:
        if self.records:
            self.timeline.at(self.records[0].arrival.arrival_s, self._arrive)
        for fault in self.setup.faults:
            self.timeline.at(fault.at_s, partial(self._fault, fault))
        self._sample()
        self.timeline.every(self.setup.sample_s, self._sample)

    def run(self) -> None:
        self.timeline.run(self.setup.duration_s, lambda: not self._num_open and self._num_come == len(self.records))
        self.meter.pass_time()
        for replica in self.living():
            replica.book_started()
        self._sample()

    def _sample(self) -> None:
        service = {client: value for client, value in self.meter.service.items() if not client.endswith("/")}
        self._samples.append((self.timeline.now_s, service))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        """One request comes; the next one is scheduled."""
        record = self.records[self._num_come]
        self._num_come += 1
        if self._num_come < len(self.records):
            self.timeline.at(self.records[self._num_come].arrival.arrival_s, self._arrive)
        one = record.arrival
        if one.interaction and (one.client, one.interaction) in self._cut:
            record.outcome, record.finished_s = "cut", one.arrival_s
            return
        organisation, slash, _ = one.client.partition("/")
        door = self._doors[self._ingress_of(one)]
        live = Live(record, request_of(one), organisation + slash, door)
        self._num_open += 1
        self.meter.came(live)
        if self.authority is None:
            self.meter.look(self.meter.is_waiting)
        door.arrive(live)

    def _ingress_of(self, one: Arrival) -> int:
        num = self.setup.num_ingress
        choose = self.setup.choose_ingress
        if one.ingress is not None:
            ingress = one.ingress
        elif choose is not None:
            ingress = choose(one, self._ingress_rng)
        else:
            ingress = self._ingress_rng.randrange(num)
        if not 0 <= ingress < num:
            raise ConfigError(f"request {one.request_id} arrives at ingress {ingress}, but there are {num}, from 0 on")
        return ingress

    def living(self) -> list[SimReplica]:
        return [replica for replica in self._replicas.values() if replica.is_alive]

    def find(self, name: str) -> SimReplica:
        return self._replicas[name]

    def send(self, live: Live, replica: SimReplica, *, has_waited: bool = True) -> None:
        live.record.granted_s = self.timeline.now_s
        replica.num_sent += 1
        self.network.carry(partial(self._arrive_at, live, replica, has_waited))

    def _arrive_at(self, live: Live, replica: SimReplica, has_waited: bool) -> None:
        if not has_waited and replica.is_alive:
            self._reportings[replica.name].keep(live)
        replica.accept(live)

    def refused(self, live: Live, error: Refused) -> None:
        record = live.record
        record.outcome, record.reason, record.finished_s = "refused", error.reason, self.timeline.now_s
        if record.arrival.interaction:
            self._cut.add((record.arrival.client, record.arrival.interaction))
        self.meter.left(live)
        self.ended(live)

    def ended(self, live: Live) -> None:
        self._num_open -= 1

    # -- replicas and faults ------------------------------------------------------------------------------------------

    def _start_replica(self, name: str) -> None:
        setup = self.setup
        book = LocalBook[GenerateRequest](setup.make_policy(), setup.cost)
        if setup.make_book is not None:
            book = setup.make_book()
        reserve, preempt_gap = None, setup.preempt_gap
        if self.authority is not None:
            reserve = self.authority.limits.reserve_output_tokens
            preempt_gap = self.authority.limits.preempt_gap
        number = int(name.removeprefix("replica-"))
        incarnation = 1 + sum(replica.name == name for replica, _ in self.incarnations)
        rng = self._rng(f"{name} {incarnation}")
        replica = SimReplica(
            name,
            setup.replicas[number],
            book,
            self.meter,
            self.network,
            cost=setup.cost,
            jitter=setup.jitter,
            rng=rng,
            reserve_output_tokens=reserve,
            preempt_gap=preempt_gap,
        )
        self._replicas[name] = replica
        reporting = None
        if self.authority is not None:
            reporting = Reporting(replica, incarnation, self.authority, self.network, setup)
            self._reportings[name] = reporting
        self.incarnations.append((replica, reporting))

    def _fault(self, fault: Fault) -> None:
        if fault.kind == "replica_crash" and self._replicas[fault.target].is_alive:
            for live in self._replicas[fault.target].crash():
                self.network.carry(partial(live.door.bounced, live))
        elif fault.kind == "replica_return" and not self._replicas[fault.target].is_alive:
            self._start_replica(fault.target)
        elif fault.kind == "actor_crash":
            assert self.authority is not None
            self.authority.crash(with_snapshot=fault.with_snapshot)
        elif fault.kind == "partition":
            self.network.cut_off(fault.target)
        elif fault.kind == "heal":
            self.network.heal(fault.target)

    # -- the end ------------------------------------------------------------------------------------------------------

    def record(self) -> RunRecord:
        setup, meter = self.setup, self.meter
        tally = self.authority.tally if self.authority is not None else Tally()
        return RunRecord(
            scenario=setup.scenario,
            policy=setup.make_policy().name,
            seed=setup.seed,
            duration_s=setup.duration_s,
            requests=self.records,
            worst_gap=meter.worst_gap,
            bound=tally.bound,
            unit=tally.unit,
            staleness=tally.staleness,
            busy_s=meter.busy_s,
            idle_while_waiting_s=meter.idle_while_waiting_s,
            num_replicas=len(setup.replicas),
            num_steps=meter.num_steps,
            num_preempted=meter.num_preempted,
            num_recomputed=meter.num_recomputed,
            num_lifts=tally.num_lifts,
            num_lapsed=tally.num_lapsed,
            num_wasted_tokens=self._num_wasted_tokens(),
            service=self._samples,
        )

    def _num_wasted_tokens(self) -> int:
        return sum(
            record.num_input + record.num_output
            for record in self.records
            if record.arrival.interaction and (record.arrival.client, record.arrival.interaction) in self._cut
        )

    def check(self) -> None:
        """After the run: everything is told over a perfect network, then every account must agree."""
        check_charges(self.records, self.incarnations, self.authority, self.timeline.now_s)


def _check_arrivals(setup: ClusterSetup, records: Sequence[RequestRecord]) -> None:
    ids = {record.arrival.request_id for record in records}
    if len(ids) < len(records):
        raise ConfigError(f"{len(records) - len(ids)} of {len(records)} arrivals have another's request_id")
    most = min(replica.model_len for replica in setup.replicas)
    for record in records:
        one = record.arrival
        if not 1 <= one.num_input < most or one.length < 1:
            raise ConfigError(
                f"request {one.request_id} has {one.num_input} input and {one.length} output tokens: it needs at least "
                f"one of each, and the smallest replica holds {most} tokens of one request"
            )
        if one.arrival_s < 0:
            raise ConfigError(f"request {one.request_id} arrives at {one.arrival_s} s: a run starts at 0")
