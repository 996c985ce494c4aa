"""Every token of a storm three times: made (the witnesses), charged (the ledger), told (the callers)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos_load import CUT, FAILED, FINISHED, LEFT, Record
from benchmarks.chaos_witness import Made

Tokens = tuple[int, int]
"""Input and output."""


@dataclass(slots=True)
class Audit:
    made: Tokens = (0, 0)
    charged: Tokens = (0, 0)
    unreported: Tokens = (0, 0)
    """Made by replicas that were killed before they reported it: charged to nobody, told perhaps."""
    unreported_by_replica: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tokens; the seconds of work that they are: about one report, or the time for which the actor was away, too."""
    told: Tokens = (0, 0)
    """Usage of the finished requests."""
    made_for_finished: Tokens = (0, 0)
    made_in_vain: Tokens = (0, 0)
    """For finished requests, by replicas that were killed before any of it had reached the ingress: made once more
    elsewhere, as nobody could know that it had begun."""
    num_in_vain: int = 0
    """Requests of which that is true."""
    made_for_others: Tokens = (0, 0)
    """For requests whose stream broke off or was left, or that nobody read to the end."""
    streamed_to_others: int = 0
    """Output tokens of those that their callers saw all the same."""
    problems: list[str] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        return (
            not self.problems
            and self.made == plus(self.charged, self.unreported)
            and self.told == self.made_for_finished
            and self.made == plus(plus(self.told, self.made_in_vain), self.made_for_others)
        )


def audit(
    made: dict[str, Made], books: dict[str, Tokens], charged: Tokens, alive: Iterable[str], records: Iterable[Record]
) -> Audit:
    """``books``: what the ledger has by replica; ``charged``: what it has by client, summed; ``alive``: replicas."""
    result = Audit(charged=charged)
    alive = set(alive)
    tries: defaultdict[str, list[tuple[int, str, Tokens]]] = defaultdict(list)
    for replica, one in made.items():
        result.made = plus(result.made, one.num_tokens)
        for name, tokens in one.requests.items():
            request_id, _, number = name.partition("~")
            tries[request_id].append((int(number or 0), replica, tokens))
        missing = minus(one.num_tokens, books.get(replica, (0, 0)))
        if missing != (0, 0):
            seconds = one.seconds_since(books.get(replica, (0, 0))[1])
            result.unreported_by_replica[replica] = {"tokens": missing, "seconds": round(seconds, 3)}
            result.unreported = plus(result.unreported, missing)
            if replica in alive:
                result.problems.append(f"living replica {replica}: made minus charged is {missing}")
            elif missing[1] < 0:
                result.problems.append(f"dead replica {replica} was charged more than it made: {missing}")
    if unknown := books.keys() - made.keys():
        result.problems.append(f"charged by replicas without a witness: {sorted(unknown)}")
    sums = total(books.values())
    if sums != charged:
        result.problems.append(f"the ledger's books hold {sums}, its clients {charged}")
    for record in records:
        request_id = f"{record.id}-0"
        *earlier, last = sorted(tries[request_id]) or [(0, "", (0, 0))]
        mine = last[2]
        if record.outcome == FINISHED and record.usage is not None:
            result.told = plus(result.told, record.usage)
            result.made_for_finished = plus(result.made_for_finished, mine)
            if record.usage != mine:
                result.problems.append(f"{record.client} was told {record.usage} for {request_id}, made was {mine}")
            vain = [(replica, tokens) for _, replica, tokens in earlier if tokens != (0, 0)]
            result.num_in_vain += bool(vain)
            for replica, tokens in vain:
                result.made_in_vain = plus(result.made_in_vain, tokens)
                if replica in alive:
                    result.problems.append(
                        f"{record.client}: {tokens} of {request_id} made in vain by living {replica}"
                    )
        elif record.outcome in (FAILED, LEFT, CUT):
            num_made = sum(tokens[1] for _, _, tokens in (*earlier, last))
            result.streamed_to_others += record.num_streamed
            if record.num_streamed > num_made:
                result.problems.append(f"{record.client} saw {record.num_streamed} tokens of {request_id}: {num_made}")
    result.made_for_others = minus(minus(result.made, result.made_for_finished), result.made_in_vain)
    return result


def total(amounts: Iterable[Tokens]) -> Tokens:
    result = 0, 0
    for amount in amounts:
        result = plus(result, amount)
    return result


def plus(one: Tokens, other: Tokens) -> Tokens:
    return one[0] + other[0], one[1] + other[1]


def minus(one: Tokens, other: Tokens) -> Tokens:
    return one[0] - other[0], one[1] - other[1]
