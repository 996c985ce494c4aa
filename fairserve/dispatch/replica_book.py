"""The replica's side of the protocol: the local queue, the charges, and the reports that carry them.

:class:`LocalBook` lives on the engine thread and implements the engine's two hooks (``engine/hooks.py``).
:class:`Reporter` lives where the reports are sent from. Between them travel frozen :class:`BookEvents`.

Accounts are closed, so that 100,000 clients who come once do not stay for ever. What holds, whatever is lost, repeated
or restarted:

1. Within an account totals are cumulative, and an account is never reopened: whoever comes back counts from zero under
   a new generation of its name. To the ledger that is another account, and a difference of totals is always one of the
   same count.
2. Only the engine thread closes, and only what is exactly as it was reported: the client has no request here, and the
   total is the one that was proposed (:meth:`Reporter.idle`). What was never charged is closed without a word.
3. Only what the next life of the authority is sure to know is proposed (``ReportReply.saved``): a total that an older
   snapshot lacks could not be reported again. While the authority cannot be reached, nothing is closed.
4. The authority drops its row of an account when a report says that it is over, or when a full report does not name it;
   no later report does. Reports say so until one is acknowledged; one that was overtaken is not looked at.

So each side holds, besides what is in use and what is not saved yet, the ``KEPT_ACCOUNTS`` accounts used last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar

from fairserve.dispatch.messages import ReportReply, StepReport, Totals
from fairserve.dispatch.sums import Sum
from fairserve.fairness.accounts import account_of, application_of, client_of
from fairserve.fairness.cost import CostFunction
from fairserve.fairness.hierarchy import is_group
from fairserve.fairness.policy import Policy
from fairserve.fairness.queue import FairQueue


class LocalRequest(Protocol):
    """What the book needs to know of a request."""

    @property
    def request_id(self) -> str: ...
    @property
    def client(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def application(self) -> str: ...


Request = TypeVar("Request", bound=LocalRequest)

KEPT_ACCOUNTS = 1_000
"""Accounts that a replica keeps open although nothing happens in them: whoever comes back soon goes on in its own."""
MOST_CLOSED = 1_000
"""Accounts closed between two steps."""
UNCHARGED_LOOKED_AT = 8


@dataclass(frozen=True, slots=True)
class BookEvents:
    """What changed since the last take: cumulative totals of the accounts charged, and request ids by event."""

    totals: Mapping[str, Totals]
    service: Mapping[str, float]
    """Cumulative service of the clients charged."""
    received: tuple[str, ...]
    started: tuple[str, ...]
    finished: tuple[str, ...]
    weights: Mapping[str, float]
    clients: tuple[str, ...]
    """Every client with a request on the replica."""
    outputs: Mapping[str, int]
    """See ``StepReport.outputs``."""
    closed: tuple[str, ...] = ()
    """Accounts that are over: not in ``totals``, now or ever again."""
    left: tuple[str, ...] = ()
    """Clients without any open account, until they come back."""


@dataclass(slots=True)
class _Open:
    client: str
    account: str
    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0
    service: float = 0.0


class LocalBook(Generic[Request]):
    """Orders the replica's waiting requests by the cluster's policy and counters, and charges what is served.

    A counter here is the authority's newest answer plus what was charged here since the report it answered: the
    replica stays fair by itself while the authority cannot be reached. ``tracks_outputs``: reports tell how far each
    request is, for an authority that predicts.
    """

    def __init__(
        self,
        policy: Policy,
        cost: CostFunction,
        *,
        group_weights: Mapping[str, float] | None = None,
        tracks_outputs: bool = False,
    ) -> None:
        self._queue: FairQueue[Request] = FairQueue(policy, group_weights)
        self._cost = cost
        self._tracks_outputs = tracks_outputs
        self._open: dict[str, _Open] = {}
        self._num_open: dict[str, int] = {}
        self._totals: dict[str, Sum] = {}
        self._service: dict[str, float] = {}
        self._generation = 0
        """Of accounts opened from now on; rises when any is closed."""
        self._account: dict[tuple[str, str], str] = {}
        """The open account of a client and application."""
        self._accounts_of: dict[str, list[tuple[str, str]]] = {}
        """Keys of ``_account`` by client."""
        self._uncharged: dict[tuple[str, str], None] = {}
        """Open accounts that may never have been charged a token, of clients without a request here."""
        self._closed: list[str] = []
        self._left: list[str] = []
        self._changed: set[str] = set()
        self._received: list[str] = []
        self._started: list[str] = []
        self._finished: list[str] = []
        self._outputs: dict[str, int] = {}
        self._num_arrived = 0
        self._num_returned = 0

    # -- WaitingQueue -----------------------------------------------------------------------------------------------

    def push(self, request: Request) -> None:
        self._num_arrived += 1
        self._queue.register(request.client, request.weight)
        self._queue.arrive(request.client, request.request_id, request, self._num_arrived)

    def push_front(self, request: Request) -> None:
        self._num_returned += 1
        self._queue.arrive(request.client, request.request_id, request, -self._num_returned, lift=False)

    def peek(self) -> Request | None:
        return self._queue.peek()

    def pop(self) -> Request:
        return self._queue.pop()

    def remove(self, request_id: str) -> Request | None:
        return self._queue.remove(request_id)

    def counter(self, client: str) -> float:
        return self._queue.counter(client)

    def standing(self, client: str) -> tuple[float, ...]:
        return self._queue.standing(client)

    def lead(self, ahead: str, behind: str) -> float:
        return self._queue.lead(ahead, behind)

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def policy(self) -> str:
        """Name of the policy that orders what waits."""
        return self._queue.policy.name

    def take_settings(self, policy: Policy, group_weights: Mapping[str, float], tracks_outputs: bool) -> None:
        """Go on in the order of another policy. Counters stay, and so does what waits, each in its place."""
        before, self._queue = self._queue, FairQueue(policy, group_weights)
        for node in before.table:
            if not is_group(node):
                self._queue.register(node, before.table.weight(node))
        for node in before.table:
            self._queue.set_counter(node, before.counter(node))
        for client, request_id, place, request in before.backlog.entries():
            self._queue.arrive(client, request_id, request, place, lift=False)
        for group, siblings in before.groups.items():
            self._queue.restore_last_to_leave(group, siblings.last_to_leave)
        self._tracks_outputs = tracks_outputs

    # -- Account ----------------------------------------------------------------------------------------------------

    def received(self, request: Request) -> None:
        assert request.request_id not in self._open, f"{request.request_id} is here already"
        self._open[request.request_id] = _Open(request.client, self._account_for(request))
        self._num_open[request.client] = self._num_open.get(request.client, 0) + 1
        self._received.append(request.request_id)

    def _account_for(self, request: Request) -> str:
        key = (request.client, request.application)
        account = self._account.get(key)
        if account is None:
            account = self._account[key] = account_of(*key, self._generation)
            self._accounts_of.setdefault(request.client, []).append(key)
        return account

    def started(self, request_id: str, num_input: int, num_cached: int) -> None:
        entry = self._open[request_id]
        assert entry.num_input == 0, f"{request_id} was charged its input already"
        self._started.append(request_id)
        self._charge(entry, num_input, num_cached, 0)

    def output(self, request_id: str, num_tokens: int) -> None:
        entry = self._open[request_id]
        self._charge(entry, 0, 0, num_tokens)
        if self._tracks_outputs:
            self._outputs[request_id] = entry.num_output

    def is_unserved(self, request_id: str) -> bool:
        """The request waits here and was charged nothing yet."""
        return request_id in self._queue and not self._open[request_id].num_input

    def refund_input(self, request_id: str, num_tokens: int) -> None:
        entry = self._open[request_id]
        self._charge(entry, -num_tokens, 0, 0)
        assert entry.num_input >= entry.num_cached

    def finished(self, request_id: str) -> None:
        entry = self._open.pop(request_id)
        client = entry.client
        if entry.num_input:
            self._outputs[request_id] = entry.num_output
        self._num_open[client] -= 1
        if not self._num_open[client]:
            del self._num_open[client]
            self._uncharged.update(dict.fromkeys(self._accounts_of[client]))
        self._finished.append(request_id)
        self._close_uncharged()

    def _charge(self, entry: _Open, num_input: int, num_cached: int, num_output: int) -> None:
        entry.num_input += num_input
        entry.num_cached += num_cached
        entry.num_output += num_output
        service = self._cost.service(entry.num_input, entry.num_output, entry.num_cached)
        amount, entry.service = service - entry.service, service
        client, account = entry.client, entry.account
        total = self._totals.get(account)
        if total is None:
            total = self._totals[account] = Sum()
        total.num_input += num_input
        total.num_cached += num_cached
        total.num_output += num_output
        total.service += amount
        self._service[client] = self._service.get(client, 0.0) + amount
        self._changed.add(account)
        self._queue.charge(client, amount)

    # -- exchange with the reporter -----------------------------------------------------------------------------------

    def take_events(self) -> BookEvents:
        """What changed since the last call."""
        clients = {client_of(account) for account in self._changed}
        events = BookEvents(
            totals={account: self._totals[account].totals() for account in self._changed},
            service={client: self._service[client] for client in clients},
            received=tuple(self._received),
            started=tuple(self._started),
            finished=tuple(self._finished),
            weights={client: self._queue.table.weight(client) for client in clients},
            clients=tuple(self._num_open),
            outputs=self._outputs,
            closed=tuple(self._closed),
            left=tuple(self._left),
        )
        self._changed, self._outputs = set(), {}
        self._closed, self._left = [], []
        self._received, self._started, self._finished = [], [], []
        return events

    def apply_counters(self, counters: Mapping[str, float], reported: Mapping[str, float]) -> None:
        """The authority's counters of clients and groups, as of a report that carried ``reported`` service per client;
        what was charged here since is put on top."""
        for node, counter in counters.items():
            if node in self._queue.table:
                self._queue.set_counter(node, counter)
        for client, service in reported.items():
            since = self._service.get(client, 0.0) - service
            if since and client in counters and client in self._queue.table:
                self._queue.charge(client, since)

    def close(self, idle: Mapping[str, Totals]) -> None:
        """End those of these accounts in which nothing has happened since they were proposed."""
        num_closed = len(self._closed)
        for account, proposed in idle.items():
            key = (client_of(account), application_of(account))
            total = self._totals.get(account)
            is_as_proposed = total is not None and account not in self._changed and total.totals() == proposed
            if is_as_proposed and key[0] not in self._num_open and self._close(key):
                del self._totals[account]
                self._closed.append(account)
        self._generation += len(self._closed) > num_closed

    def _close_uncharged(self) -> None:
        """Nobody was told of these accounts. One that has to stay is looked at again, a few at a time."""
        for key in list(islice(self._uncharged, UNCHARGED_LOOKED_AT)):
            del self._uncharged[key]
            account = self._account.get(key)
            is_idle = account is not None and account not in self._totals and key[0] not in self._num_open
            if is_idle and not self._close(key):
                self._uncharged[key] = None

    def _close(self, key: tuple[str, str]) -> bool:
        """With the last account of a client, all that is known of it goes. False: newcomers are lifted to where it
        stands, and it stays."""
        client, _ = key
        is_last = len(self._accounts_of[client]) == 1
        if is_last and client in self._queue.table and not self._queue.can_forget(client):
            return False
        del self._account[key]
        self._accounts_of[client].remove(key)
        if is_last:
            if client in self._queue.table:
                self._queue.forget(client)
            del self._accounts_of[client]
            if self._service.pop(client, None) is not None:
                self._left.append(client)
        return True

    @property
    def held(self) -> tuple[str, ...]:
        return tuple(self._open)

    def check(self) -> None:
        self._queue.check()
        assert all(totals.num_input >= totals.num_cached for totals in self._totals.values())
        assert self._totals.keys() <= set(self._account.values())
        assert {key for keys in self._accounts_of.values() for key in keys} == self._account.keys()
        assert self._service.keys() <= self._accounts_of.keys()


@dataclass(slots=True)
class _Unacknowledged:
    """What the authority may not have seen yet."""

    accounts: set[str] = field(default_factory=set)
    received: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.accounts or self.received or self.started or self.finished or self.closed)

    def before(self, later: _Unacknowledged) -> _Unacknowledged:
        return _Unacknowledged(
            self.accounts | later.accounts,
            self.received + later.received,
            self.started + later.started,
            self.finished + later.finished,
            self.outputs | later.outputs,
            self.closed + later.closed,
        )


class Reporter:
    """Composes reports, one in flight: whatever no reply has acknowledged is in the next one again."""

    def __init__(self, replica: str, incarnation: int, kept_accounts: int = KEPT_ACCOUNTS) -> None:
        self._replica = replica
        self._incarnation = incarnation
        self._seq = 0
        self.epoch = 0
        """The authority's epoch, 0 before its first reply."""
        self._full_due = False
        self._totals: dict[str, Totals] = {}
        self._service: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._held: dict[str, None] = {}
        self._clients: tuple[str, ...] = ()
        self._new = _Unacknowledged()
        self._in_flight: _Unacknowledged | None = None
        self._reported: dict[str, float] = {}
        self._kept_accounts = kept_accounts
        self._sent_at: dict[str, int] = {}
        """The sequence number of the newest report with each account, the longest ago first."""
        self._saved = 0
        self.num_epochs = 0

    def add(self, events: BookEvents) -> None:
        for account in events.closed:
            self._totals.pop(account, None)
            self._sent_at.pop(account, None)
        for client in events.left:
            self._service.pop(client, None)
            self._weights.pop(client, None)
        self._totals.update(events.totals)
        self._service.update(events.service)
        self._weights.update(events.weights)
        self._clients = events.clients
        self._new = self._new.before(
            _Unacknowledged(
                set(events.totals),
                list(events.received),
                list(events.started),
                list(events.finished),
                dict(events.outputs),
                list(events.closed),
            )
        )
        self._held.update(dict.fromkeys(events.received))
        for request_id in events.finished:
            self._held.pop(request_id, None)

    @property
    def has_news(self) -> bool:
        return bool(self._new) or self._full_due or (self._in_flight is not None and bool(self._in_flight))

    @property
    def unmerged(self) -> int:
        """Accounts whose newest charges the authority has not acknowledged."""
        return len(self._new.accounts | (self._in_flight.accounts if self._in_flight else set()))

    def compose(
        self,
        *,
        free_kv_tokens: int,
        free_slots: int,
        kv_capacity_tokens: int,
        max_slots: int,
        num_running: int = 0,
        num_waiting: int = 0,
        is_draining: bool = False,
    ) -> StepReport:
        """The next report; also what was in one whose reply never came."""
        if self._in_flight is not None:
            self._new = self._in_flight.before(self._new)
        self._in_flight, self._new = self._new, _Unacknowledged()
        self._seq += 1
        sent = set(self._totals) if self._full_due else self._in_flight.accounts & self._totals.keys()
        clients = {client_of(account) for account in sent}
        for account in sent:
            self._sent_at.pop(account, None)
            self._sent_at[account] = self._seq
        self._reported = {client: self._service.get(client, 0.0) for client in {*clients, *self._clients}}
        return StepReport(
            replica=self._replica,
            incarnation=self._incarnation,
            seq=self._seq,
            epoch=self.epoch,
            free_kv_tokens=free_kv_tokens,
            free_slots=free_slots,
            kv_capacity_tokens=kv_capacity_tokens,
            max_slots=max_slots,
            totals={account: self._totals[account] for account in sent},
            received=tuple(self._in_flight.received),
            started=tuple(self._in_flight.started),
            finished=tuple(self._in_flight.finished),
            is_full=self._full_due,
            held=tuple(self._held) if self._full_due else (),
            clients=self._clients,
            num_running=num_running,
            num_waiting=num_waiting,
            is_draining=is_draining,
            weights={client: self._weights.get(client, 1.0) for client in clients},
            outputs=self._in_flight.outputs,
            closed=tuple(self._in_flight.closed),
        )

    def replied(self, reply: ReportReply) -> dict[str, float] | None:
        """Take in the reply to the report composed last. Returns, for :meth:`LocalBook.apply_counters`, the service
        per client of this incarnation that the counters include; None for a reply to be ignored."""
        if reply.epoch < self.epoch:
            return None  # from an authority that is no more
        if reply.epoch > self.epoch:
            self.num_epochs += 1
            self._full_due = reply.need_full
            self.epoch = reply.epoch
        elif reply.ack >= self._seq:
            self._full_due = False
        if reply.ack >= self._seq and not self._full_due:
            self._in_flight = None
        self._saved = reply.saved
        return self._reported

    def idle(self) -> dict[str, Totals]:
        """Accounts, beyond the newest ``kept_accounts``, in which nothing happens, and whose totals the authority will
        not lose: for :meth:`LocalBook.close`. Ask when a reply has come."""
        if self._full_due or self._in_flight is not None:
            return {}
        busy = {*self._clients, *map(client_of, self._new.accounts)}
        idle: dict[str, Totals] = {}
        for account, seq in self._sent_at.items():
            if len(self._sent_at) - len(idle) <= self._kept_accounts or seq > self._saved or len(idle) >= MOST_CLOSED:
                break
            if client_of(account) not in busy:
                idle[account] = self._totals[account]
        return idle
