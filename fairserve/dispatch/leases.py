"""Granted requests: what each was charged, what of it is not served yet, and until when it must be confirmed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from fairserve.dispatch.messages import Submit
from fairserve.fairness.queue import Amounts


@dataclass(slots=True)
class Waiting:
    submit: Submit
    router: str
    arrived_s: float
    accepted_s: float | None = None
    """When the door let it in; None where a predecessor, or an earlier call, did that."""
    is_first: bool = False
    """It begins an interaction, and was never granted."""


@dataclass(slots=True)
class Lease:
    """A granted request. Until the replica's own report replaces it, its counters carry ``held`` times ``rates``."""

    waiting: Waiting
    replica: str
    incarnation: int
    predicted: float
    """Output tokens charged at the grant."""
    held: float
    """Service charged and not served yet."""
    rates: Amounts
    """What one unit of service adds to each counter along the client's path."""
    owed: float
    """Output service that it may still receive beyond what it was charged: part of the bound."""
    deadline_s: float
    seq: int
    confirmed: bool = False
    has_started: bool = False
    num_output: int = 0


def scaled(service: float, rates: Amounts) -> Amounts:
    return (service * rates[0],) if len(rates) == 1 else tuple([service * rate for rate in rates])


class Leases:
    """By request, by replica, and the unconfirmed ones in the order of their deadlines."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._unconfirmed: OrderedDict[str, Lease] = OrderedDict()
        self._on: dict[str, set[str]] = {}
        self._of: dict[str, dict[str, Lease]] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._leases

    def __iter__(self) -> Iterator[str]:
        return iter(self._leases)

    def get(self, request_id: str) -> Lease | None:
        return self._leases.get(request_id)

    def items(self) -> Iterator[tuple[str, Lease]]:
        return iter(self._leases.items())

    def values(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def on(self, replica: str) -> list[str]:
        """Requests granted to the replica, by name."""
        return sorted(self._on.get(replica, ()))

    def clients(self) -> Iterator[str]:
        """Clients with a granted request."""
        return iter(self._of)

    @property
    def num_clients(self) -> int:
        return len(self._of)

    def num_of(self, client: str) -> int:
        return len(self._of.get(client, ()))

    def of(self, client: str) -> Iterator[Lease]:
        return iter(self._of.get(client, {}).values())

    def youngest_first(self, client: str) -> Iterator[Lease]:
        return reversed(self._of.get(client, {}).values())

    def first_lapsed(self, now_s: float) -> str | None:
        for request_id, lease in self._unconfirmed.items():
            return request_id if lease.deadline_s <= now_s else None
        return None

    def add(self, request_id: str, lease: Lease) -> None:
        self._leases[request_id] = self._unconfirmed[request_id] = lease
        on = self._on.get(lease.replica)
        if on is None:
            on = self._on[lease.replica] = set()
        on.add(request_id)
        client = lease.waiting.submit.client
        of = self._of.get(client)
        if of is None:
            self._of[client] = {request_id: lease}
        else:
            of[request_id] = lease

    def confirm(self, request_id: str) -> None:
        self._leases[request_id].confirmed = True
        self._unconfirmed.pop(request_id, None)

    def pop(self, request_id: str) -> Lease | None:
        lease = self._leases.pop(request_id, None)
        if lease is None:
            return None
        self._unconfirmed.pop(request_id, None)
        self._on[lease.replica].discard(request_id)
        client = lease.waiting.submit.client
        del self._of[client][request_id]
        if not self._of[client]:
            del self._of[client]
        return lease

    def lost_replica(self, replica: str) -> None:
        assert not self._on.pop(replica, None), f"requests are still granted to {replica}"

    def check(self) -> None:
        unconfirmed = {request_id: lease for request_id, lease in self._leases.items() if not lease.confirmed}
        assert unconfirmed == dict(self._unconfirmed)
        assert {r for requests in self._on.values() for r in requests} == set(self._leases)
        assert {r for requests in self._of.values() for r in requests} == set(self._leases)
        assert all(lease.held >= 0 and lease.owed >= 0 for lease in self._leases.values())
