"""After a simulated run: have the charges been what was delivered, to the token?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fairserve.dispatch.ledger import EARLIER
from fairserve.dispatch.messages import Totals
from fairserve.simulate.authority import Authority
from fairserve.simulate.records import RequestRecord
from fairserve.simulate.replica import SimReplica
from fairserve.simulate.reporting import Reporting

Tokens = dict[str, list[int]]
"""client -> input, cached and output tokens."""


def check_charges(
    records: Sequence[RequestRecord],
    incarnations: Sequence[tuple[SimReplica, Reporting | None]],
    authority: Authority | None,
    now_s: float,
) -> None:
    """Assert that requests, replicas and authority agree about every client's tokens, and every owner's invariants.

    What a replica did not tell before it died, or told an authority that died without a snapshot of it, is lost: of
    dead incarnations the authority knows at most what they delivered. Ends the run: replicas tell all they know.
    """
    for replica, _ in incarnations:
        if replica.is_alive:
            replica.flush()
            replica.check()
    delivered = [_sum([replica.totals()]) for replica, _ in incarnations]
    assert _sum(delivered) == _of_records(records), "requests and replicas differ"
    if authority is None:
        return
    authority.revive()
    for replica, reporting in incarnations:
        if replica.is_alive and reporting is not None:
            _tell_all(reporting, authority, now_s)
    authority.dispatcher.check()
    known = authority.dispatcher.ledger.dump()["books"]
    books = {(name, incarnation): _of_accounts(totals) for name, incarnation, _, totals in known}
    books = {key: book for key, book in books.items() if key != EARLIER}  # it is in the books of replicas, too
    num_lives: dict[str, int] = {}
    for (replica, _), tokens in zip(incarnations, delivered, strict=True):
        num_lives[replica.name] = num_lives.get(replica.name, 0) + 1
        book = books.get((replica.name, num_lives[replica.name]), {})
        if replica.is_alive:
            assert book == tokens, f"{replica.name} delivered {tokens}, the authority knows of {book}"
        for client, row in book.items():
            most = tokens.get(client, [0, 0, 0])
            assert all(told <= had for told, had in zip(row, most, strict=True)), (replica.name, client, row, most)
    for client, row in _sum(books.values()).items():
        totals = authority.dispatcher.ledger.totals(client)
        assert row == [totals.num_input, totals.num_cached, totals.num_output], client


def _tell_all(reporting: Reporting, authority: Authority, now_s: float) -> None:
    """Three exchanges: one is news, one may answer a new epoch, one is full."""
    for _ in range(3):
        reporting.reporter.replied(authority.dispatcher.report(reporting.compose(), now_s))


def _of_records(records: Iterable[RequestRecord]) -> Tokens:
    tokens: Tokens = {}
    for record in records:
        _add(tokens, record.arrival.client, [record.num_input, record.num_cached, record.num_output])
    return tokens


def _of_accounts(totals: dict[str, list[float]]) -> Tokens:
    """An account's name begins with its client's, up to a bar."""
    tokens: Tokens = {}
    for account, row in totals.items():
        had = Totals(*row)  # type: ignore[arg-type]
        _add(tokens, account.partition("|")[0], [had.num_input, had.num_cached, had.num_output])
    return tokens


def _sum(parts: Iterable[Tokens]) -> Tokens:
    tokens: Tokens = {}
    for part in parts:
        for client, row in part.items():
            _add(tokens, client, row)
    return tokens


def _add(tokens: Tokens, client: str, row: Sequence[int]) -> None:
    """A client that had nothing is not listed."""
    if any(row):
        mine = tokens.setdefault(client, [0, 0, 0])
        for i, num in enumerate(row):
            mine[i] += num
