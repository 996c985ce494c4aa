"""Snapshots that go from one cluster to another: counters go on, tokens of the other cluster stay the other's."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from fairserve.dispatch.cut import SNAPSHOT_VERSION, Cut, Node
from fairserve.dispatch.ledger import CLUSTER, EARLIER
from fairserve.dispatch.messages import NOTHING, Totals
from fairserve.dispatch.store import Head, Snapshot, snapshot_of
from fairserve.fairness.accounts import client_of
from fairserve.fairness.hierarchy import TOP, is_group

FORMAT = "fairserve counters"
EXPORT_VERSION = 1


def adopted(head: Head, snapshot: Snapshot, alive: Collection[str] | None = None) -> Snapshot:
    """A snapshot that another cluster wrote, for a cluster whose own replicas have served nothing yet: the counters as
    they are; what the other's replicas served as the newest totals of that cluster. A report of it that is merged
    later adds what came after the snapshot, and no more.

    ``alive``: clusters that may still publish; totals of further ones are summed up. None: all.
    """
    served = snapshot["ledger"]["totals"]
    books = [[CLUSTER + head.cluster, head.incarnation, head.seq, served]]
    earlier: dict[str, Totals] = {}
    for name, incarnation, seq, totals in snapshot["ledger"]["books"]:
        if not name.startswith(CLUSTER):
            continue
        if (name, incarnation) != EARLIER and (alive is None or name.removeprefix(CLUSTER) in alive):
            books.append([name, incarnation, seq, totals])
        else:
            for account, row in totals.items():
                earlier[account] = earlier.get(account, NOTHING) + Totals(*row)
    if earlier:
        books.append([*EARLIER, 0, {account: total.row() for account, total in earlier.items()}])
    return {**snapshot, "ledger": {"totals": {}, "books": books}}


def laid_over(mine: Snapshot, theirs: Snapshot, cluster: str) -> Snapshot:
    """``mine`` with the counters and weights of ``theirs``, an :func:`adopted` one, for the clients that it names; the
    others keep their distance from the least served of ``mine``. Tokens that ``theirs`` knows are added where they are
    another cluster's than ``cluster`` and not known already: twice the same changes nothing."""
    base = min((counter for counter, _ in mine["counters"].values()), default=0.0)
    level = min((counter for counter, _ in theirs["counters"].values()), default=0.0)
    counters = {node: [counter - base, weight] for node, (counter, weight) in mine["counters"].items()}
    counters |= {node: [counter - level, weight] for node, (counter, weight) in theirs["counters"].items()}
    books = {(name, incarnation): [seq, totals] for name, incarnation, seq, totals in mine["ledger"]["books"]}
    for name, incarnation, seq, totals in theirs["ledger"]["books"]:
        key = (name, incarnation)
        if name != CLUSTER + cluster and key != EARLIER and (key not in books or books[key][0] < seq):
            books[key] = [seq, totals]
    return {
        "version": SNAPSHOT_VERSION,
        "counters": counters,
        "last_to_leave": theirs["last_to_leave"] | mine["last_to_leave"],
        "ledger": {"totals": mine["ledger"]["totals"], "books": [[*key, *book] for key, book in books.items()]},
    }


def whole_cut(snapshot: Snapshot) -> Cut:
    """The snapshot as rows, for a store."""
    counters, last = snapshot["counters"], snapshot["last_to_leave"]
    nodes: dict[str, Node] = {}
    for node in (*counters, *(group for group in last if group not in counters)):
        counter, weight = counters.get(node, (0.0, 1.0))
        nodes[node] = (counter, weight, last.get(node))

    def weight_of(account: str) -> float:
        return float(counters.get(client_of(account), (0.0, 1.0))[1])

    return Cut(
        is_whole=True,
        nodes=nodes,
        served={account: (*row, weight_of(account)) for account, row in snapshot["ledger"]["totals"].items()},
        books={
            (name, incarnation): (seq, {account: Totals(*row) for account, row in totals.items()})
            for name, incarnation, seq, totals in snapshot["ledger"]["books"]
        },
    )


# -- as a document ----------------------------------------------------------------------------------------------------


def document(head: Head, snapshot: Snapshot) -> dict[str, Any]:
    """As plain values that are JSON."""
    return {"format": FORMAT, "format_version": EXPORT_VERSION, "head": asdict(head), **snapshot}


def read_document(data: Any) -> tuple[Head, Snapshot]:
    """
    Raises:
        ValueError: it is no such document, is of a newer version, or something in it is wrong; the text says what.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ValueError(f'this is no export of counters: it does not say "format": "{FORMAT}"')
    if data.get("format_version") != EXPORT_VERSION:
        raise ValueError(f"format_version {data.get('format_version')!r}, this fairserve reads {EXPORT_VERSION}")
    try:
        head = Head.load(json.dumps(data["head"]))
        for node, row in data["counters"].items():
            if len(row) != 2:
                raise ValueError(f"counters: {_name(node)!r} has {row!r}, not a counter and a weight")
        counters = {_name(node): [float(value) for value in row] for node, row in data["counters"].items()}
        for node, (counter, weight) in counters.items():
            if not (math.isfinite(counter) and math.isfinite(weight) and weight > 0):
                raise ValueError(f"counters: {node!r} has counter {counter} and weight {weight}; weights are above 0")
        last = {_name(group): member for group, member in data["last_to_leave"].items()}
        if not all(group == TOP or is_group(group) for group in last):
            raise ValueError("last_to_leave: a group's name ends with a slash")
        nodes = {node: (*row, None) for node, row in counters.items()}
        books = [
            [_name(name), int(number), int(seq), dict(rows)] for name, number, seq, rows in data["ledger"]["books"]
        ]
        snapshot = snapshot_of(nodes, dict(data["ledger"]["totals"]), books)
        _check_rows(snapshot["ledger"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"something is missing or of the wrong kind: {error!r}") from error
    return head, {**snapshot, "last_to_leave": last}


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 512:
        raise ValueError(f"{str(value)[:64]!r} cannot be a name")
    return value


def _check_rows(ledger: Mapping[str, Any]) -> None:
    for totals in (ledger["totals"], *(book[3] for book in ledger["books"])):
        for account, row in totals.items():
            if len(row) != 4 or not all(math.isfinite(value) and value >= 0 for value in row):
                raise ValueError(f"ledger: {_name(account)!r} has {row!r}, not four numbers that are not negative")
