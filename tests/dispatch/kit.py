"""A dispatcher under a virtual clock, and the two voices that speak to it: a router's and a replica's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairserve.clock import VirtualClock
from fairserve.dispatch.dispatcher import Dispatcher, DispatchLimits
from fairserve.dispatch.messages import NOTHING, ReportReply, RouterCall, RouterReply, StepReport, Submit, Totals
from fairserve.dispatch.sessions import RouterSession
from fairserve.dispatch.status import status
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import CostFunction, WeightedTokens


def submit(request_id: str, client: str = "ann", num_input: int = 10, max_output: int = 20, **more: object) -> Submit:
    return Submit(request_id, client, num_input, max_output, **more)  # type: ignore[arg-type]


@dataclass
class ReplicaVoice:
    """Composes reports by hand: keeps the cumulative totals and the sequence number, nothing else."""

    desk: Desk
    name: str
    incarnation: int = 1
    kv: int = 1_000
    slots: int = 4
    seq: int = 0
    epoch: int = 0
    totals: dict[str, Totals] = field(default_factory=dict)
    reply: ReportReply | None = None

    def compose(
        self,
        *,
        received: tuple[str, ...] = (),
        started: tuple[str, ...] = (),
        finished: tuple[str, ...] = (),
        served: Mapping[str, tuple[int, int]] | None = None,
        cached: Mapping[str, int] | None = None,
        free_kv: int | None = None,
        free_slots: int | None = None,
        is_full: bool = False,
        held: tuple[str, ...] = (),
        clients: tuple[str, ...] = (),
        weights: Mapping[str, float] | None = None,
    ) -> StepReport:
        """``served``: client -> input and output tokens since the last report; ``cached``: input tokens among them."""
        self.seq += 1
        for client, (num_input, num_output) in (served or {}).items():
            num_cached = (cached or {}).get(client, 0)
            service = self.desk.dispatcher.cost.service(num_input, num_output, num_cached)
            self.totals[client] = self.totals.get(client, NOTHING) + Totals(num_input, num_cached, num_output, service)
        sent = self.totals if is_full else {client: self.totals[client] for client in served or {}}
        return StepReport(
            replica=self.name,
            incarnation=self.incarnation,
            seq=self.seq,
            epoch=self.epoch,
            free_kv_tokens=self.kv if free_kv is None else free_kv,
            free_slots=self.slots if free_slots is None else free_slots,
            kv_capacity_tokens=self.kv,
            max_slots=self.slots,
            totals=dict(sent),
            received=received,
            started=started,
            finished=finished,
            is_full=is_full,
            held=held,
            clients=clients,
            weights=weights or {},
        )

    def report(self, **what: object) -> ReportReply:
        return self.send(self.compose(**what))  # type: ignore[arg-type]

    def send(self, report: StepReport) -> ReportReply:
        reply = self.desk.dispatcher.report(report, self.desk.now_s)
        self.epoch = reply.epoch
        return reply


@dataclass
class RouterVoice:
    """Composes calls by hand. ``granted``: where each request was sent; acknowledging is up to the test."""

    desk: Desk
    name: str
    incarnation: int = 1
    seq: int = 0
    epoch: int = 0
    ack: int = 0
    granted: dict[str, str] = field(default_factory=dict)
    refused: dict[str, Exception] = field(default_factory=dict)

    def compose(self, *submits: Submit, **more: object) -> RouterCall:
        self.seq += 1
        return RouterCall(
            self.name,
            self.incarnation,
            self.seq,
            self.epoch,
            submits,
            grants_ack=self.ack,
            **more,  # type: ignore[arg-type]
        )

    def call(self, *submits: Submit, **more: object) -> RouterReply:
        return self.take(self.desk.dispatcher.route(self.compose(*submits, **more), self.desk.now_s))

    def poll(self) -> RouterReply:
        call = RouterCall(self.name, self.incarnation, self.seq, self.epoch, grants_ack=self.ack)
        return self.take(self.desk.dispatcher.poll(call, self.desk.now_s))

    def take(self, reply: RouterReply) -> RouterReply:
        self.epoch = reply.epoch
        self.granted.update({grant.request_id: grant.replica for grant in reply.grants})
        self.refused.update({refusal.request_id: refusal.error for refusal in reply.refusals})
        self.ack = max([self.ack, *(grant.seq for grant in reply.grants)])
        return reply


class Desk:
    """The dispatcher with its clock; ``check`` runs its invariants."""

    def __init__(
        self, policy: str = "vtc", *, cost: CostFunction | None = None, epoch: int = 1, **limits: object
    ) -> None:
        self.policy, self.cost = policy, cost or WeightedTokens()
        self.limits = DispatchLimits(**({"lookahead": 0} | limits))  # type: ignore[arg-type]
        self.clock = VirtualClock(1_000.0)
        self.dispatcher = Dispatcher(make_policy(policy), self.cost, self.limits, epoch=epoch)

    @property
    def now_s(self) -> float:
        return self.clock.now_s()

    def wait(self, seconds: float) -> None:
        """Time passes, and the dispatcher ticks once at the end of it."""
        self.clock.advance(seconds)
        self.dispatcher.tick(self.now_s)

    def router(self, name: str = "east", incarnation: int = 1) -> RouterVoice:
        return RouterVoice(self, name, incarnation)

    def replica(self, name: str = "r0", *, incarnation: int = 1, slots: int = 4, kv: int = 1_000) -> ReplicaVoice:
        """A replica that has said hello, all empty."""
        voice = ReplicaVoice(self, name, incarnation, kv, slots)
        voice.reply = voice.report()
        return voice

    def session(self, router: str = "east") -> RouterSession:
        (session,) = [session for session in self.dispatcher.sessions if session.router == router]
        return session

    def counter(self, client: str) -> float:
        return self.dispatcher.queue.counter(client)

    @property
    def num_leases(self) -> int:
        return int(self.status()["leases"])

    def status(self) -> dict[str, Any]:
        return status(self.dispatcher, self.now_s)

    def restart(self, *, snapshot: dict[str, object] | None) -> None:
        """The authority's next life, with a snapshot of an earlier moment or with nothing."""
        old = self.dispatcher
        self.dispatcher = Dispatcher(make_policy(self.policy), self.cost, self.limits, epoch=old.epoch + 1)
        if snapshot is not None:
            self.dispatcher.load(snapshot)

    def check(self) -> None:
        self.dispatcher.check()
