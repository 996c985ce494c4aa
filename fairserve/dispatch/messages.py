"""What travels between the counter actor, the routers and the replicas: frozen values, checked at the border."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from fairserve.errors import Refused


class Totals(NamedTuple):
    """Tokens and service of one account (a client's application) on one replica since that replica's incarnation began.

    ``num_input`` counts every charged input token, ``num_cached`` the part of it that came from the prefix cache,
    ``num_output`` every generated token; ``service`` is their cost by the replica's cost function. A tuple, because
    every report carries dozens: they are made, compared and sent in a third of the time.
    """

    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0
    service: float = 0.0

    def __add__(self, other: Totals) -> Totals:  # type: ignore[override]
        num_input, num_cached, num_output, service = other
        return Totals(self[0] + num_input, self[1] + num_cached, self[2] + num_output, self[3] + service)

    def __sub__(self, other: Totals) -> Totals:
        num_input, num_cached, num_output, service = other
        return Totals(self[0] - num_input, self[1] - num_cached, self[2] - num_output, self[3] - service)

    def row(self) -> list[float]:
        """As plain values, in the order of the fields."""
        return [self.num_input, self.num_cached, self.num_output, self.service]


NOTHING = Totals()


Message = TypeVar("Message")
Pack = Callable[[Any], Any]


def compact(**packed: tuple[Pack, Pack]) -> Callable[[type[Message]], type[Message]]:
    """Pickle a message as one tuple of plain values: a pickler calls Python for every object of a class, and for a
    frozen one with slots for each of its fields. ``packed``: by field, what makes its value plain, and the way back."""

    def compacted(kind: type[Message]) -> type[Message]:
        names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
        values_of = attrgetter(*names)
        ways = [(names.index(name), pack) for name, (pack, _) in packed.items()]
        _WAYS_BACK[kind] = tuple([(names.index(name), unpack) for name, (_, unpack) in packed.items()])

        def reduce(self: Any) -> tuple[Any, ...]:
            values = list(values_of(self))
            for place, pack in ways:
                values[place] = pack(values[place])
            return _unpacked, (kind, *values)

        kind.__reduce__ = reduce  # type: ignore[method-assign]
        return kind

    return compacted


_WAYS_BACK: dict[type, tuple[tuple[int, Pack], ...]] = {}


def _unpacked(kind: Callable[..., Any], *plain: Any) -> Any:
    values = list(plain)
    for place, unpack in _WAYS_BACK[kind]:  # type: ignore[index]
        values[place] = unpack(values[place])
    return kind(*values)


def _rows(totals: Mapping[str, Totals]) -> dict[str, tuple[float, ...]]:
    return {account: tuple(total) for account, total in totals.items()}


def _totals(rows: Mapping[str, Sequence[Any]]) -> dict[str, Totals]:
    return {account: Totals(*row) for account, row in rows.items()}


def _submit_rows(submits: Sequence[Submit]) -> tuple[tuple[Any, ...], ...]:
    return tuple([_submit_values(submit) for submit in submits])


def _submits(rows: Sequence[Sequence[Any]]) -> tuple[Submit, ...]:
    return tuple([Submit(*row) for row in rows])


def _grant_rows(grants: Sequence[Grant]) -> tuple[tuple[Any, ...], ...]:
    return tuple([tuple(grant) for grant in grants])


def _grants(rows: Sequence[Sequence[Any]]) -> tuple[Grant, ...]:
    return tuple([Grant(*row) for row in rows])


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
    budgets: tuple[tuple[str, int | None, int | None], ...] = ()
    """The client's own budgets of tokens: window, soft, hard (``dispatch/budgets.py``)."""


_submit_values = attrgetter(*(one.name for one in fields(Submit)))


class Standing(NamedTuple):
    """Where a client stands when a request of its is granted. Plain values only: it travels with every grant."""

    lead: float
    """Service / weight of the client (of its organisation, where names are paths), this request's charge included,
    above the least served that waits; negative below it, 0 when nobody waits."""
    max_requests: int
    """The limit that is nearest of those on the client's requests: waiting, or accepted in any 60 s."""
    requests_left: int
    requests_reset_s: float
    """Seconds until all of it is free again, if nothing more is sent."""
    max_tokens: int | None = None
    """The hard budget that has least left; None where there is none."""
    tokens_left: int = 0
    tokens_reset_s: float = 0.0
    budget: str = ""
    """Its window, and whose it is: "day acme"."""
    passed: str = ""
    """A soft budget that is passed, named alike; "" for none."""


class Grant(NamedTuple):
    """Actor -> router: send this request to that replica."""

    request_id: str
    replica: str
    waited_s: float
    """Seconds from arrival at the router to the grant."""
    seq: int
    """Rises with every grant and late refusal of an epoch; acknowledged by ``grants_ack`` of a later call, else sent
    again."""
    standing: tuple[Any, ...] | None = None
    """Where its client stands as the reply is made: fields of :class:`Standing`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Actor -> router: no room; ``error`` is what the caller gets to see."""

    request_id: str
    error: Refused
    seq: int = 0
    """Of a request that had been accepted: as ``Grant.seq``. 0: refused at once, in the reply to its call."""


@compact(submits=(_submit_rows, _submits))
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


@compact(grants=(_grant_rows, _grants))
@dataclass(frozen=True, slots=True)
class RouterReply:
    """Actor -> router, to a submit or a poll."""

    epoch: int
    grants: tuple[Grant, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    resubmit: bool = False
    """The actor does not know this router's waiting requests (restart): submit all of them again."""


@compact(totals=(_rows, _totals))
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


@compact()
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
    fairness: str = ""
    """The settings of this name that are in force, as JSON, for a replica that does not know this epoch."""
