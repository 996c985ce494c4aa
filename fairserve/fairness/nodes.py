"""What is known of one client or group, in one record: whoever picks it looks it up once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairserve.fairness.policy import Order

if TYPE_CHECKING:
    from fairserve.fairness.queue import Siblings


class Node:
    """Counter and weight are the :class:`~fairserve.fairness.counters.CounterTable`'s; the rest is written by the
    :class:`~fairserve.fairness.queue.FairQueue` alone."""

    __slots__ = ("counter", "entry", "name", "order", "siblings", "weight")

    siblings: Siblings
    """The group whose member it is. Not set outside a queue."""
    order: Order
    """Of one that waits: where it stands now."""

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = 0.0
        self.entry: Entry | None = None
        """Of one that waits: the entry that counts in its group's heap."""

    def __lt__(self, other: Node) -> bool:
        """Whatever tells two entries apart stands before this."""
        return False


Entry = tuple[Order, str, Node]
"""Order, name, node; the least goes first."""
