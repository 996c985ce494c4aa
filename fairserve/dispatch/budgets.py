"""Token budgets of clients and groups: how much of one is left, and whether a request may still enter.

A budget counts input tokens (cached ones, too) and output tokens, of what the ledger has merged, in a calendar window
of UTC: the minute, day or month under way. A client's holds for its batches and service tiers, too, a group's for the
sum of its clients; both for all models of the service together.

*Hard*: a request enters only if what is used, what is promised to requests under way and what this one is expected to
take fit together. Expected is its input and the output that the predictor foretells (1 token where it foretells none).

The bound: let a request under way when the last one entered be foretold p_i output tokens and be allowed m_i. Then a
window ends with at most ``hard + sum(m_i - p_i)`` tokens, the sum over those requests: at that moment used and promised
together were at most ``hard``, and of each request at most m_i - p_i tokens were not promised. So a burst overshoots by
what runs beyond its prediction, and by nothing where requests take what was foretold. Not promised, and on top of it:
what ran when the budget was set, or unseen by the counter actor (while it was away, or under its former epoch), and
tokens that are computed again after a replica died (``api.retry_on_replica_death``).

*Soft*: whoever is past it is served by a fraction of its weight until the window ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fairserve.dispatch.controls import Controls
from fairserve.dispatch.messages import Submit
from fairserve.dispatch.periods import WINDOWS, Window, utc
from fairserve.dispatch.usage import UsageBook
from fairserve.errors import BudgetSpent
from fairserve.fairness.hierarchy import is_group, owner_of, path_of
from fairserve.fairness.prediction import Predictor

PROMISED_RETRY_S = 5.0
"""When to come back if requests under way may leave room."""


class Budget(NamedTuple):
    """Tokens of one window. None: no such limit."""

    window: Window
    soft: int | None = None
    hard: int | None = None


BudgetRows = tuple[Budget, ...]
"""At most one of each window."""


def rows_of(plain: Mapping[str, Mapping[str, int | None]]) -> BudgetRows:
    """From ``{"day": {"soft": ..., "hard": ...}}``, as an operator writes it."""
    return tuple([Budget(window, **plain[window]) for window in WINDOWS if plain.get(window)])


def rows_from(plain: Iterable[Any]) -> BudgetRows:
    """From tuples, as requests carry them."""
    return tuple([Budget(*row) for row in plain])


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """``groups``: budgets of ``acme`` or ``acme/research``."""

    groups: Mapping[str, BudgetRows] = field(default_factory=dict)
    soft_weight: float = 0.1


@dataclass(slots=True)
class _Promise:
    """To a request under way: tokens it may still take."""

    nodes: tuple[str, ...]
    num_input: int
    num_output: int
    left: int


class Budgets:
    """Decides and promises; what was used is in the ``usage`` book. ``controls``: budgets that are set live hold in
    place of those that requests carry from their key."""

    def __init__(
        self, usage: UsageBook, controls: Controls, predictor: Predictor, settings: BudgetSettings | None = None
    ) -> None:
        self._usage = usage
        self._controls = controls
        self._predictor = predictor
        self._settings = settings or BudgetSettings()
        self._rows: dict[str, BudgetRows] = {}
        """In force, by client or group."""
        self._carried: dict[str, BudgetRows] = {}
        self._promises: dict[str, _Promise] = {}
        self._promised: dict[str, int] = {}
        usage.promised = self._promised
        self._to_weigh: set[str] = set()
        self._seen = usage.now
        for group, rows in self._settings.groups.items():
            self._put(group + "/", rows)
        for client in controls:
            self.control(client)

    # -- what holds ---------------------------------------------------------------------------------------------------

    def carry(self, client: str, rows: Sequence[Any]) -> None:
        """What a request's key says."""
        client = owner_of(client)
        if not rows and client not in self._carried:
            return
        carried = rows_from(rows)
        if carried != self._carried.get(client, ()):
            self._carried[client] = carried
            self.control(client)

    def control(self, client: str) -> None:
        """What is set live may have changed."""
        live = self._controls.of(client).budgets
        self._put(client, self._carried.get(client, ()) if live is None else rows_of(live))

    def forget(self, client: str) -> None:
        """The client is not known any more."""
        if self._carried.pop(client, None) is not None:
            self._put(client, ())

    def _put(self, node: str, rows: BudgetRows) -> None:
        if rows:
            self._rows[node] = rows
            self._usage.watch(node)
        elif self._rows.pop(node, None) is not None:
            self._usage.unwatch(node)
        self._to_weigh.add(node)

    # -- requests -----------------------------------------------------------------------------------------------------

    def refuse(self, submit: Submit) -> BudgetSpent | None:
        """Why a new request may not enter, or None. Of several budgets, the one that is free again last."""
        worst: BudgetSpent | None = None
        asked = 0
        for node, budget, used in self._of(submit.client):
            if budget.hard is None:
                continue
            asked = asked or submit.num_input + self._expected(submit)
            promised = self._promises_to(node)
            if used + promised + asked <= budget.hard:
                continue
            reset_s = self._reset_s(budget.window)
            wait_s = reset_s if used + asked > budget.hard else min(reset_s, PROMISED_RETRY_S)
            if worst is None or wait_s > worst.retry_after_s:
                worst = BudgetSpent(
                    client=submit.client,
                    budget=budget.window,
                    of=node.removesuffix("/"),
                    limit=budget.hard,
                    used=used,
                    promised=promised,
                    asked=asked,
                    resets_at=utc(self._usage.now.ends_s(budget.window)),
                    reset_s=reset_s,
                    retry_after_s=max(1.0, wait_s),
                )
        return worst

    def entered(self, submit: Submit) -> None:
        """It waits, new or again: it is promised what it is expected to take."""
        nodes = tuple([node for node in path_of(owner_of(submit.client)) if node in self._rows]) if self._rows else ()
        if nodes and submit.request_id not in self._promises:
            expected = self._expected(submit)
            self._promises[submit.request_id] = _Promise(nodes, submit.num_input, expected, 0)
            self._leave(submit.request_id, submit.num_input + expected)

    def progressed(self, request_id: str, has_started: bool, num_output: int) -> None:
        """The ledger holds its input, once it has started, and so many output tokens."""
        promise = self._promises.get(request_id)
        if promise is not None:
            left = (0 if has_started else promise.num_input) + max(0, promise.num_output - num_output)
            self._leave(request_id, left)

    def ended(self, request_id: str) -> None:
        """It leaves, from whatever stage."""
        if request_id in self._promises:
            self._leave(request_id, 0)
            del self._promises[request_id]

    def _leave(self, request_id: str, left: int) -> None:
        promise = self._promises[request_id]
        for node in promise.nodes:
            self._promised[node] = self._promised.get(node, 0) + left - promise.left
            if not self._promised[node]:
                del self._promised[node]
        promise.left = left

    def _promises_to(self, node: str) -> int:
        """Tokens, by all models of the service."""
        return self._promised.get(node, 0) + self._usage.promised_elsewhere(node)

    def _expected(self, submit: Submit) -> int:
        """Output tokens."""
        foretold = self._predictor.predict(submit.client, submit.application, submit.predicted_output)
        return max(1, min(submit.max_output, math.ceil(foretold)))

    # -- soft budgets -------------------------------------------------------------------------------------------------

    def served(self, client: str) -> None:
        """Something of it was merged."""
        if self._rows:
            self._to_weigh.update([node for node in path_of(owner_of(client)) if node in self._rows])

    def take_to_weigh(self) -> list[tuple[str, float]]:
        """Clients and groups whose factor may be another one since the last call, and the factor of their weight."""
        now = self._usage.now
        if (now.minute, now.day) != (self._seen.minute, self._seen.day):
            self._to_weigh.update(self._rows)
        self._seen = now
        self._to_weigh |= self._usage.take_touched() & self._rows.keys()
        nodes, self._to_weigh = self._to_weigh, set()
        return [(node, self._settings.soft_weight if self._passed(node) else 1.0) for node in sorted(nodes)]

    def _passed(self, node: str) -> bool:
        rows = self._rows.get(node, ())
        return any(one.soft is not None and self._usage.tokens(node, one.window) >= one.soft for one in rows)

    # -- for people ---------------------------------------------------------------------------------------------------

    def standing(self, client: str) -> tuple[Any, ...]:
        """The last fields of ``Standing``."""
        nearest: tuple[int, int, float, str] | None = None
        passed = ""
        for node, budget, used in self._of(client):
            name = f"{budget.window} {node.removesuffix('/')}"
            if budget.soft is not None and used >= budget.soft:
                passed = passed or name
            if budget.hard is not None:
                left = max(0, budget.hard - used - self._promises_to(node))
                if nearest is None or left < nearest[1]:
                    nearest = (budget.hard, left, self._reset_s(budget.window), name)
        return (*(nearest or (None, 0, 0.0, "")), passed)

    def views(self, client: str) -> list[dict[str, Any]]:
        """``views.BudgetView`` of the client's own budgets and of those above it."""
        return [
            {
                "of": node.removesuffix("/"),
                "is_group": is_group(node),
                "window": budget.window,
                "soft": budget.soft,
                "hard": budget.hard,
                "used": used,
                "promised": self._promises_to(node),
                "resets_s": self._usage.now.ends_s(budget.window),
            }
            for node, budget, used in self._of(client)
        ]

    def check(self) -> None:
        promised: dict[str, int] = {}
        for promise in self._promises.values():
            assert promise.left >= 0
            for node in promise.nodes:
                promised[node] = promised.get(node, 0) + promise.left
        assert {node: num for node, num in promised.items() if num} == self._promised
        self._usage.check()

    def _of(self, client: str) -> Iterator[tuple[str, Budget, int]]:
        """Every budget that holds for it, with what is used of it."""
        if not self._rows:
            return
        for node in path_of(owner_of(client)):
            for budget in self._rows.get(node, ()):
                yield node, budget, self._usage.tokens(node, budget.window)

    def _reset_s(self, window: Window) -> float:
        return max(0.0, self._usage.now.ends_s(window) - self._usage.now.unix_s)
