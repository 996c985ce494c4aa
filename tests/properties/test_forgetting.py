"""Names come and go, accounts are closed and clients forgotten, messages are lost, authorities die: no token is lost or
charged twice, and nobody gains by being forgotten."""

from __future__ import annotations

import random
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.dispatch.forgetting import Idlers
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.replica_book import LocalBook
from fairserve.fairness.hierarchy import is_group
from tests.properties.test_mutations import removed
from tests.toy_cluster import Lossy, ToyCluster, ToyRequest


def many_names(
    seed: int, loss: float, crashes: bool, max_clients: int, kept_accounts: int, levels: int = 1
) -> tuple[ToyCluster, set[str]]:
    """A life with names of which most come once, and a cluster that has come to rest after it."""
    rng = random.Random(seed)
    cluster = ToyCluster(
        rng.choice(["vtc", "lcf", "drr"]),
        num_replicas=2,
        num_routers=2,
        network=Lossy(rng, loss),
        step_s=0.3,
        limits=DispatchLimits(lookahead=1, max_clients=max_clients),
        keeps=crashes,
        kept_accounts=kept_accounts,
    )
    clients: set[str] = set()
    for _ in range(60):
        for _ in range(rng.randrange(3)):
            name = f"often-{rng.randrange(3)}" if rng.random() < 0.4 else f"once-{len(cluster.requests)}"
            client = "/".join([*(f"{name[-1]}{level}" for level in range(levels - 1)), name])
            clients.add(client)
            output = rng.randrange(1, 8)
            request = ToyRequest(f"r{len(cluster.requests)}", client, rng.randrange(1, 30), output, output)
            cluster.submit(request, router=rng.randrange(2))
        if cluster.requests and rng.random() < 0.3:
            cluster.cancel(rng.choice(list(cluster.requests)))
        if crashes and rng.random() < 0.2:
            cluster.save()
        if crashes and cluster._saved is not None and rng.random() < 0.05:
            cluster.crash_authority(snapshot=True)
        cluster.step()
        cluster.check()
        assert not cluster.dispatcher.state.idlers.overlooked()
    cluster.run_until_quiet()
    for _ in range(3):
        cluster.save()
        cluster.step()
    cluster.check()
    return cluster, clients


LIFE = {"seed": st.integers(0, 10**6), "loss": st.sampled_from([0.0, 0.1, 0.5]), "crashes": st.booleans()}


@settings(max_examples=30, deadline=None)
@given(**LIFE, kept_accounts=st.sampled_from([0, 2]))
def test_with_accounts_closed_at_once_every_token_is_merged_exactly_once(
    seed: int, loss: float, crashes: bool, kept_accounts: int
) -> None:
    cluster, clients = many_names(seed, loss, crashes, 10**6, kept_accounts)
    for client in clients:
        totals = cluster.dispatcher.ledger.totals(client)
        assert (totals.num_input, totals.num_output) == cluster.told(client)
    for replica in cluster.replicas.values():
        assert len(replica.reporter._totals) <= kept_accounts + 1, "one stays whom newcomers are compared with"
        assert replica.book._totals.keys() == replica.reporter._totals.keys()
        book = cluster.dispatcher.ledger._books.get((replica.name, 1))
        assert book is None or book.totals.keys() == replica.reporter._totals.keys()


@settings(max_examples=30, deadline=None)
@given(**LIFE, max_clients=st.integers(1, 6), levels=st.sampled_from([1, 2, 3]))
def test_with_clients_forgotten_all_tokens_together_are_still_counted_once(
    seed: int, loss: float, crashes: bool, max_clients: int, levels: int
) -> None:
    cluster, clients = many_names(seed, loss, crashes, max_clients, 1, levels)
    whole = cluster.dispatcher.ledger.whole
    told = [cluster.told(client) for client in clients]
    assert (whole.num_input, whole.num_output) == (sum(one for one, _ in told), sum(two for _, two in told))
    known = [node for node in cluster.dispatcher.queue.table if not is_group(node)]
    assert len(known) <= max_clients
    assert len(cluster.dispatcher.queue.groups) - 1 <= (levels - 1) * max_clients, "no group outlives its clients"


def close_what_is_not_saved(self: LocalBook[Any], idle: dict[str, Any]) -> None:
    """Whatever was reported is closed, whether the authority's next life knows of it or not."""
    close(self, {account: total.totals() for account, total in self._totals.items()})


close = LocalBook.close


def test_accounts_closed_before_they_are_saved_lose_tokens() -> None:
    def is_exact(seed: int) -> bool:
        cluster, clients = many_names(seed, 0.1, True, 10**6, 0)
        totals = cluster.dispatcher.ledger.totals
        return all((totals(c).num_input, totals(c).num_output) == cluster.told(c) for c in clients)

    assert all(map(is_exact, range(8)))
    with removed(LocalBook, "close", close_what_is_not_saved):
        assert not all(map(is_exact, range(8)))


# -- forget me, please -------------------------------------------------------------------------------------------------

MAX_CLIENTS = 12
STEPS = 800


def share_of_mallory(max_clients: int) -> float:
    """Service of mallory over that of an honest client that always waits. Mallory sends one large request, keeps quiet
    while as many tiny names as it takes come and go, and sends the next."""
    limits = DispatchLimits(lookahead=0, max_clients=max_clients)
    cluster = ToyCluster(num_replicas=1, slots=2, kv_tokens=2_000, limits=limits)

    def send(client: str, num_input: int, num_output: int) -> str:
        request_id = f"{client}-{len(cluster.requests)}"
        cluster.submit(ToyRequest(request_id, client, num_input, num_output, num_output))
        return request_id

    large = ""
    replica = cluster.replicas["replica-0"]
    for _ in range(STEPS):
        while cluster.dispatcher.queue.backlog.num_waiting("honest") < 2:
            send("honest", 10, 10)
            cluster.exchange_router(cluster.routers[0])
        if not large or large in replica.usage:
            for _ in range(MAX_CLIENTS + 2):
                send("tiny" + str(len(cluster.requests)), 1, 1)
            cluster.step()
            cluster.step()
            large = send("mallory", 100, 30)
        cluster.step()
    return cluster.delivered("mallory") / cluster.delivered("honest")


def most_ahead_first(self: Idlers) -> tuple[str, float] | None:
    """Whoever is idle and stands highest: what a table that drops anybody would do to somebody."""
    found: tuple[str, float] | None = None
    for client in self._entries:
        lead = self._queue.counter(client) - self._queue.newcomer("")
        if self._is_idle(client) and self._queue.can_forget(client) and lead > (found[1] if found else -inf):
            found = (client, lead)
    return found


def test_who_is_ahead_gains_nothing_by_other_names_that_come_and_go() -> None:
    remembered = share_of_mallory(10**6)
    assert remembered < 1.1
    assert share_of_mallory(MAX_CLIENTS) == pytest.approx(remembered, rel=0.02)


def test_if_those_who_are_ahead_were_forgotten_the_same_attack_would_pay() -> None:
    with removed(Idlers, "first", most_ahead_first):
        assert share_of_mallory(MAX_CLIENTS) > 1.3 * share_of_mallory(10**6)
