"""A request's way through the authority: it enters, is charged when it is granted, and leaves, from whatever stage.

*Waiting* (submitted) -> *leased* (granted: its input is charged, provisionally, in the same step as the pick) ->
*confirmed* (the replica reported it received) -> *started* (the provisional charge is replaced by what the replica
reports) -> *finished*. Whatever was charged and not served returns when it leaves.
"""

from __future__ import annotations

from fairserve.dispatch.leases import Lease, Waiting, scaled
from fairserve.dispatch.messages import Submit
from fairserve.dispatch.state import State
from fairserve.errors import InteractionThrottled, Refused


class Stages:
    """Keeps queue, leases, capacity, sessions, interactions and bounds in step with each other, request by request."""

    def __init__(self, state: State) -> None:
        self._state = state

    def enter(self, waiting: Waiting, now_s: float) -> float:
        """It waits, new or again. Returns by how much counters were lifted."""
        state, client = self._state, waiting.submit.client
        rise = state.room.enter(waiting)
        state.budgets.entered(waiting.submit)
        state.idlers.look_at(client)
        state.counts.num_lifts += rise > 0
        state.notes.entered(client, rise, now_s)
        state.watch.observe_one(client)
        return rise

    def goes_on(self, submit: Submit, now_s: float) -> None:
        """It was accepted before: its interaction, known from here or only to a predecessor, is under way."""
        state = self._state
        state.interactions.waits_again(submit.client, submit.interaction, submit.request_id, now_s)
        state.mark(submit.client)

    def refused(self, submit: Submit, error: Refused, now_s: float) -> None:
        """It may not enter, or had to leave: tell whoever counts."""
        state = self._state
        state.counts.num_refused += 1
        state.notes.refused(submit.client, error, now_s)
        state.throttle.num_throttled += isinstance(error, InteractionThrottled)
        state.mark(submit.client)
        state.idlers.look_at(submit.client)
        if state.log is not None:
            state.log.refused(submit, error, now_s)

    def confirm(self, request_id: str, lease: Lease) -> None:
        """Its replica has it."""
        if lease.confirmed:
            return
        state = self._state
        state.leases.confirm(request_id)
        state.capacity.release(lease.replica, request_id)
        session = state.sessions.get(lease.waiting.router)
        if session is not None:  # the router had the grant, though it may have no reason to call again
            session.withdraw(request_id)

    def settle(self, lease: Lease) -> None:
        """What the replica has reported is no longer held: input once it started, output token by token."""
        submit, cost = lease.waiting.submit, self._state.cost
        self._state.budgets.progressed(submit.request_id, lease.has_started, lease.num_output)
        if lease.has_started and lease.held:
            made = cost.service(submit.num_input, lease.num_output)
            expected = cost.service(submit.num_input, lease.predicted)
            self._release(lease, lease.held - max(0.0, expected - made))

    def _release(self, lease: Lease, service: float) -> None:
        """Give back what was charged at the grant: the replica's totals hold it now, or it will not be served."""
        if not lease.held:
            return
        client = lease.waiting.submit.client
        self._state.queue.charge(client, -service, lease.rates)
        self._state.watch.gave_back(client, scaled(service, lease.rates))
        lease.held = lease.held - service if service < lease.held else 0.0

    def no_longer_over(self, request_id: str, lease: Lease) -> None:
        """Nobody has to give way for it any more."""
        room = self._state.capacity.get(lease.replica)
        if room is not None and room.granted_over == request_id:
            room.granted_over = None

    def drop(self, request_id: str, now_s: float) -> Waiting | None:
        """The request leaves, from whatever stage; an unserved charge returns."""
        state = self._state
        waiting = state.room.remove(request_id)
        state.budgets.ended(request_id)
        lease = state.leases.pop(request_id)
        if lease is not None:
            waiting = lease.waiting
            client = waiting.submit.client
            with state.watch.returning((client,)):
                self._release(lease, lease.held)
                state.watch.ended(client, scaled(lease.owed, lease.rates))
                state.capacity.release(lease.replica, request_id)
                self.no_longer_over(request_id, lease)
        if waiting is not None:
            submit = waiting.submit
            session = state.sessions.get(waiting.router)
            if session is not None:
                session.requests.discard(request_id)
                session.withdraw(request_id)
            if submit.interaction:
                num_tokens = submit.num_input + lease.num_output if lease is not None and lease.has_started else 0
                state.interactions.ended(submit.client, submit.interaction, request_id, num_tokens, now_s)
            state.watch.observe_one(submit.client)
            state.notes.moved(submit.client, now_s)
            state.idlers.look_at(submit.client)
        return waiting

    def cancel(self, request_id: str, now_s: float) -> None:
        """Whoever wanted it went away."""
        if self.drop(request_id, now_s) is not None and self._state.log is not None:
            self._state.log.cancelled(request_id, now_s)

    def requeue(self, request_id: str, now_s: float) -> None:
        """Charge returned, request back at its place in the queue. If nothing else of its client waits, the client is
        lifted like any other that becomes active: what the others received meanwhile is no credit."""
        waiting = self.drop(request_id, now_s)
        assert waiting is not None
        session = self._state.sessions.get(waiting.router)
        if session is not None:
            session.requests.add(request_id)
            self.goes_on(waiting.submit, now_s)
            self.enter(waiting, now_s)
