"""What travels between the counter actor, the routers and the replicas: frozen values, checked at the border."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fairserve.errors import Refused


@dataclass(frozen=True, slots=True)
class Totals:
    """Tokens and service of one account (a client's application) on one replica since that replica's incarnation began.

    ``num_input`` counts every charged input token, ``num_cached`` the part of it that came from the prefix cache,
    ``num_output`` every generated token; ``service`` is their cost by the replica's cost function.
    """

    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0
    service: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.num_input + other.num_input,
            self.num_cached + other.num_cached,
            self.num_output + other.num_output,
            self.service + other.service,
        )

    def __sub__(self, other: Totals) -> Totals:
        return Totals(
            self.num_input - other.num_input,
            self.num_cached - other.num_cached,
            self.num_output - other.num_output,
            self.service - other.service,
        )

    def row(self) -> list[float]:
        """As plain values, in the order of the fields."""
        return [self.num_input, self.num_cached, self.num_output, self.service]


NOTHING = Totals()


@dataclass(frozen=True, slots=True)
class Submit:
    """Router -> actor: a request waits. Metadata only; the prompt never travels here."""

    request_id: str
    client: str
    num_input: int
    max_output: int
    weight: float = 1.0
    max_waiting: int | None = None
    """The client's own limit of waiting requests; None for the cluster's default."""
    waited_s: float = 0.0
    """Seconds the request has waited already (after an actor restart or a failed replica)."""
    is_retry: bool = False
    """Accepted before: goes back to its place by ``waited_s`` and is not refused by queue limits."""
    application: str = ""
    """Which of the client's applications sends it; "" for none. The API lets only registered names through."""
    interaction: str = ""
    """Id of the user task that this call belongs to, within the client; "" for a call that stands alone."""
    call_index: int = 0
    """Position of the call in its interaction, from 0, as the caller says."""
    prefix: tuple[int, ...] = ()
    """Hashes of the prompt's leading blocks of tokens, each covering all before it; for policies that look at them."""
    predicted_output: int | None = None
    """Output tokens foretold by somebody who is believed (an oracle in simulations); None: the policy predicts."""
    trace: str = ""
    """The traceparent of the router's span, below which the actor's own belongs; "" when the request is not traced."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Actor -> router: send this request to that replica."""

    request_id: str
    replica: str
    waited_s: float
    """Seconds from arrival at the router to the grant."""
    seq: int
    """Rises with every grant and late refusal of an epoch; acknowledged by ``grants_ack`` of a later call, else sent
    again."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Actor -> router: no room; ``error`` is what the caller gets to see."""

    request_id: str
    error: Refused
    seq: int = 0
    """Of a request that had been accepted: as ``Grant.seq``. 0: refused at once, in the reply to its call."""


@dataclass(frozen=True, slots=True)
class RouterCall:
    """Router -> actor. One call in flight; a repeat carries the same ``seq`` and changes nothing."""

    router: str
    incarnation: int
    """Which life of the sender this is; a later life has a greater number."""
    seq: int
    epoch: int
    """The actor epoch the router believes in; 0 before the first reply. Later epochs are greater."""
    submits: tuple[Submit, ...] = ()
    cancels: tuple[str, ...] = ()
    """Requests whose caller went away, at whatever stage."""
    declined: tuple[str, ...] = ()
    """Grants that were not used (nobody waits for them any more, or the replica is gone); their charge returns."""
    unreachable: tuple[str, ...] = ()
    """Replicas that were granted to but that this router cannot reach."""
    gone: tuple[str, ...] = ()
    """Replicas whose process has ended, as the cluster says."""
    draining: tuple[str, ...] = ()
    """Replicas that the cluster sends no new request to any more: they stop, and finish what they run."""
    is_full: bool = False
    """``submits`` holds every request that waits at the router."""
    grants_ack: int = 0
    """The newest ``seq`` of a grant or late refusal of this epoch that arrived here."""


@dataclass(frozen=True, slots=True)
class RouterReply:
    """Actor -> router, to a submit or a poll."""

    epoch: int
    grants: tuple[Grant, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    resubmit: bool = False
    """The actor does not know this router's waiting requests (restart): submit all of them again."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """Replica -> actor: cumulative totals, so that loss, repeats and reordering change nothing.

    ``totals`` holds the accounts (``fairness/accounts.py``) that changed since the last acknowledged report;
    ``received``, ``started`` and ``finished`` name requests since then. ``free_kv_tokens`` and ``free_slots`` already
    exclude every request in ``received``, running or waiting locally.
    """

    replica: str
    incarnation: int
    """Which life of the sender this is; a later life has a greater number."""
    seq: int
    epoch: int
    """The actor epoch that the replica believes in; 0 before the first reply."""
    free_kv_tokens: int
    free_slots: int
    """Running slots that are free, minus requests that wait locally: may be negative."""
    kv_capacity_tokens: int
    max_slots: int
    totals: Mapping[str, Totals] = field(default_factory=dict)
    received: tuple[str, ...] = ()
    started: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    is_full: bool = False
    """``totals`` holds every account of this incarnation and ``held`` every request on the replica."""
    held: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    """Clients with a request on the replica: the reply carries their counters."""
    num_running: int = 0
    num_waiting: int = 0
    is_draining: bool = False
    """The replica stops: it finishes what it runs, gives back what it has not begun, and is granted nothing more."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each client in ``totals``, for an actor that has never seen the client."""
    outputs: Mapping[str, int] = field(default_factory=dict)
    """request id -> output tokens made in all, for requests that finished since the last acknowledged report and,
    where the policy predicts lengths, for those that made any."""
    closed: tuple[str, ...] = ()
    """Accounts that are over since the last acknowledged report: this incarnation never reports on them again."""


@dataclass(frozen=True, slots=True)
class ReportReply:
    """Actor -> replica."""

    epoch: int
    ack: int
    """The newest sequence number that has been merged."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """Counters, after the merge, of the clients that the report names, and of the groups that they belong to."""
    need_full: bool = False
    """The actor does not know this incarnation (restart): send a full report."""
    is_draining: bool = False
    """The replica is being stopped, as a router heard: it is granted nothing more."""
    saved: int = 0
    """The newest sequence number whose totals the authority's next life is sure to know; never above ``ack``."""
