"""Where requests come in: through a router that waits for grants, or one that pushes them to a replica at once.

:class:`CentralRouter` does what ``cluster/router.py`` and ``RouterClient`` of ``cluster/counter_client.py`` do,
repeats, degraded mode and give-backs included.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from fairserve.dispatch.messages import Grant, RouterReply
from fairserve.dispatch.prefixes import PrefixMap
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import Refused
from fairserve.fairness.deficit import D2lpm
from fairserve.fairness.policy import Place
from fairserve.simulate.authority import Authority
from fairserve.simulate.live import Live
from fairserve.simulate.network import RETRY_S, Link, Network
from fairserve.simulate.records import PREFIX_BLOCK
from fairserve.simulate.replica import SimReplica
from fairserve.simulate.setup import ClusterSetup

MIN_MATCH = 0.5
"""Placement longest_prefix: part of a prompt that must be known somewhere to be followed. Without a threshold whoever
shares a first block with everybody is sent where everybody is."""


class Surroundings(Protocol):
    """What an ingress finds around it."""

    setup: ClusterSetup
    network: Network

    def living(self) -> Sequence[SimReplica]:
        """Replicas that are alive, always in the same order."""
        ...

    def find(self, name: str) -> SimReplica:
        """The replica of that name, as it was last."""
        ...

    def send(self, live: Live, replica: SimReplica, *, has_waited: bool = True) -> None:
        """Send the request to a replica, where it is. ``has_waited`` False: without its turn in the cluster's queue."""
        ...

    def refused(self, live: Live, error: Refused) -> None: ...
    def ended(self, live: Live) -> None: ...


class CentralRouter:
    """Submits to the authority and waits for the grant; without the authority, the less loaded of two replicas."""

    def __init__(self, name: str, cluster: Surroundings, authority: Authority, rng: random.Random) -> None:
        self._cluster = cluster
        self._authority = authority
        self._timeline = cluster.network.timeline
        self._book = RouterBook(name, 1)
        self._link = Link(cluster.network, name, cluster.setup.counter.call_timeout_s)
        self._rng = rng
        self._waiting: dict[str, Live] = {}
        self._is_sending = False
        self._is_polling = False

    # -- requests -----------------------------------------------------------------------------------------------------

    def arrive(self, live: Live) -> None:
        self._acquire(live, is_retry=False)

    def returned(self, live: Live) -> None:
        live.num_returns += 1
        self._acquire(live, is_retry=True)

    def bounced(self, live: Live) -> None:
        if live.grant is not None:
            self._book.decline(live.grant, is_unreachable=True)
        self._acquire(live, is_retry=True)

    def ended(self, live: Live) -> None:
        self._cluster.ended(live)

    def _acquire(self, live: Live, *, is_retry: bool) -> None:
        live.grant = None
        foretell = self._cluster.setup.foretell
        predicted = foretell(live.record.arrival) if foretell is not None else None
        submit = live.submit(self._timeline.now_s, predicted, is_retry=is_retry)
        self._book.want(submit, self._timeline.now_s, partial(self._granted, live), partial(self._refused, live))
        self._waiting[live.request_id] = live
        if self._link.is_down:
            self._let_go(live)
        self._send()
        self._poll()

    def _granted(self, live: Live, grant: Grant) -> None:
        del self._waiting[live.request_id]
        live.grant = grant
        self._cluster.send(live, self._cluster.find(grant.replica))

    def _refused(self, live: Live, error: Refused) -> None:
        del self._waiting[live.request_id]
        self._cluster.refused(live, error)

    def _let_go(self, live: Live) -> None:
        """Go ahead without a grant."""
        replicas = self._cluster.living()
        if not replicas:
            return  # nobody to send it to: the next call that fails asks again
        del self._waiting[live.request_id]
        self._book.forget(live.request_id)
        two = self._rng.sample(replicas, min(2, len(replicas)))
        self._cluster.send(live, min(two, key=lambda replica: replica.num_sent), has_waited=False)

    # -- one call and one poll in flight ------------------------------------------------------------------------------

    def _send(self) -> None:
        if self._is_sending or not self._book.has_news:
            return
        self._is_sending = True
        message = self._book.compose(self._timeline.now_s)
        self._link.call(partial(self._authority.route, message), self._sent)

    def _sent(self, reply: RouterReply | None) -> None:
        def go_on() -> None:
            self._is_sending = False
            self._send()

        self._took(reply, go_on, to_poll=False)

    def _poll(self) -> None:
        if self._is_polling or not (len(self._book) or self._link.is_down):
            return
        self._is_polling = True
        message = self._book.compose_poll()
        self._link.call(partial(self._authority.poll, message), self._polled)

    def _polled(self, reply: RouterReply | None) -> None:
        def go_on() -> None:
            self._is_polling = False
            self._poll()

        if reply is not None and reply.resubmit:  # polls have nothing to give until all is submitted again
            self._took(reply, partial(self._timeline.after, RETRY_S, go_on), to_poll=True)
        else:
            self._took(reply, go_on, to_poll=True)

    def _took(self, reply: RouterReply | None, go_on: Callable[[], None], *, to_poll: bool) -> None:
        if reply is not None:
            self._book.replied(reply, to_poll=to_poll)
            go_on()
            self._send()
            return
        if self._link.is_down:
            for live in list(self._waiting.values()):
                self._let_go(live)
        self._timeline.after(RETRY_S, go_on)


class DirectRouter:
    """Chooses a replica at once, by what this ingress alone has seen."""

    def __init__(self, cluster: Surroundings) -> None:
        self._cluster = cluster
        self._cost = cluster.setup.cost
        self._num_sent = 0
        self._d2lpm = D2lpm(replica_quantum=cluster.setup.replica_quantum)
        self._sent = PrefixMap(PREFIX_BLOCK)
        placements = {
            "round_robin": self._next,
            "least_loaded": self._least_loaded,
            "d2lpm": self._nearest,
            "longest_prefix": self._longest_prefix,
        }
        self._choose = placements[cluster.setup.placement]

    def arrive(self, live: Live) -> None:
        replicas = self._cluster.living()
        if replicas:
            self._cluster.send(live, self._choose(live, replicas))
        else:
            self._cluster.network.timeline.after(RETRY_S, partial(self.arrive, live))

    def bounced(self, live: Live) -> None:
        self.arrive(live)

    def returned(self, live: Live) -> None:
        raise AssertionError("nothing is given back where the cluster has no queue")

    def ended(self, live: Live) -> None:
        one, record = live.record.arrival, live.record
        whole = self._cost.service(one.num_input, record.num_output)
        self._d2lpm.finished(one.client, one.application, record.replica, self._cost.service(one.num_input, 0), whole)
        self._cluster.ended(live)

    def _next(self, live: Live, replicas: Sequence[SimReplica]) -> SimReplica:
        self._num_sent += 1
        return replicas[(self._num_sent - 1) % len(replicas)]

    def _least_loaded(self, live: Live, replicas: Sequence[SimReplica]) -> SimReplica:
        return min(replicas, key=lambda replica: replica.num_sent)

    def _longest_prefix(self, live: Live, replicas: Sequence[SimReplica]) -> SimReplica:
        one = live.record.arrival
        matched = self._sent.longest(one.prefix)
        most = max(matched.values(), default=0)
        if most >= MIN_MATCH * one.num_input:
            replicas = [replica for replica in replicas if matched.get(replica.name, 0) == most] or replicas
        chosen = self._least_loaded(live, replicas)
        self._sent.granted(chosen.name, one.prefix, chosen.setup.prefix_cache_tokens)
        return chosen

    def _nearest(self, live: Live, replicas: Sequence[SimReplica]) -> SimReplica:
        one = live.record.arrival
        places = [Place(r.name, r.cache.match(one.prefix), r.num_sent) for r in replicas]
        name = self._d2lpm.choose_replica(one.client, places)
        chosen = next(replica for replica in replicas if replica.name == name)
        self._d2lpm.placed(one.client, chosen.name, self._cost.service(one.num_input, 0))
        return chosen
