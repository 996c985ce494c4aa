"""What ends without a word: leases that lapse, replicas and routers that fall silent, die, or are being stopped."""

from __future__ import annotations

from fairserve.dispatch.sessions import RouterSession
from fairserve.dispatch.stages import Stages
from fairserve.dispatch.state import State


class Losses:
    def __init__(self, state: State, stages: Stages) -> None:
        self._state = state
        self._stages = stages

    def tick(self, now_s: float) -> None:
        """Whatever has been silent for too long."""
        state, limits, notes = self._state, self._state.limits, self._state.notes
        for session in [s for s in state.sessions if s.is_dead(now_s, limits.router_dead_s)]:
            notes.lost_router(session.router, now_s - session.heard_s, now_s)
            self.end_session(session, now_s)
        for room in [r for r in state.capacity if now_s - r.heard_s > limits.replica_stale_s]:
            if room.is_draining and not state.leases.on(room.name):
                notes.drained(room.name, now_s)
                self._forget_replica(room.name, now_s)
            elif now_s - room.heard_s > limits.replica_dead_s:
                notes.lost_replica(room.name, now_s - room.heard_s, now_s)
                self._forget_replica(room.name, now_s)
        state.gone = {replica: until_s for replica, until_s in state.gone.items() if until_s > now_s}
        while (request_id := state.leases.first_lapsed(now_s)) is not None:
            state.counts.num_lapsed += 1
            lease = state.leases.get(request_id)
            assert lease is not None
            notes.lapsed(lease.waiting.submit.client, lease.replica, now_s)
            self._stages.requeue(request_id, now_s)

    def began_anew(self, replica: str, incarnation: int, now_s: float) -> None:
        """Its life of that number is over, and another has begun."""
        self._lose(replica, now_s)
        self._state.ledger.lost_replica(replica, incarnation)

    def _lose(self, replica: str, now_s: float, *, routers_know: bool = False) -> None:
        """It died or began anew: what it never confirmed waits again; the rest is over, the router will say more.
        What its cache held is gone, too. ``routers_know``: they notice with every request that they sent there, so
        only grants that no router has taken yet wait again."""
        leases, sessions = self._state.leases, self._state.sessions
        self._state.placement.forget(replica)
        for request_id in leases.on(replica):
            lease = leases.get(request_id)
            assert lease is not None
            if lease.confirmed or (routers_know and not sessions.holds_grant(lease.waiting.router, request_id)):
                self._stages.drop(request_id, now_s)
            else:
                self._stages.requeue(request_id, now_s)
        leases.lost_replica(replica)

    def _forget_replica(self, replica: str, now_s: float, *, routers_know: bool = False) -> None:
        state = self._state
        self._lose(replica, now_s, routers_know=routers_know)
        room = state.capacity.get(replica)
        if room is not None:
            state.ledger.lost_replica(replica, room.incarnation)
        state.capacity.forget(replica)
        state.watch.lost_replica(replica)

    def bury(self, replica: str, now_s: float) -> None:
        """Its process has ended: unserved charges return at once, not after ``replica_dead_s`` of silence."""
        state = self._state
        state.gone[replica] = now_s + state.limits.replica_stale_s
        if state.capacity.get(replica) is not None:
            state.notes.died(replica, now_s)
            self._forget_replica(replica, now_s, routers_know=True)

    def drain(self, replica: str, now_s: float) -> None:
        """It is being stopped: grants that no router has taken yet wait again; what it has not begun it gives back."""
        state = self._state
        room = state.capacity.get(replica)
        if room is None or room.is_draining:
            return
        state.capacity.drain(replica)
        state.notes.draining(replica, now_s)
        state.placement.forget(replica)
        for request_id in state.leases.on(replica):
            lease = state.leases.get(request_id)
            assert lease is not None
            if not lease.confirmed and state.sessions.holds_grant(lease.waiting.router, request_id):
                self._stages.requeue(request_id, now_s)

    def end_session(self, session: RouterSession, now_s: float) -> None:
        """The router is gone: what it waited for, and what was granted to it and never reached a replica, is
        cancelled."""
        self._state.sessions.remove(session.router)
        for request_id in sorted(session.requests):
            lease = self._state.leases.get(request_id)
            if lease is None or not lease.confirmed:
                self._stages.cancel(request_id, now_s)
