"""Grants: the head of the policy's order, a replica with room, a charge and a lease, in one step."""

from __future__ import annotations

from fairserve.dispatch.capacity import ReplicaRoom
from fairserve.dispatch.leases import Lease, Waiting, scaled
from fairserve.dispatch.messages import Grant, Refusal
from fairserve.dispatch.stages import Stages
from fairserve.dispatch.state import State

MOST_REFUSED = 32
"""Interactions that are throttled in one go: no call takes long, and the next goes on."""


class Granting:
    """Nothing else grants."""

    def __init__(self, state: State, stages: Stages) -> None:
        self._state = state
        self._stages = stages
        self._waits: list[tuple[str, float]] = []
        """Of what is being granted: which client waited how long."""

    def dispatch(self, now_s: float) -> None:
        """Grant while the head of the policy's order fits somewhere; the first that does not stops all (no skipping:
        the bound needs it), unless it is throttled: that is as if its caller had gone."""
        state = self._state
        if state.placement.is_full(now_s) and not state.throttle.looks_at_picks:
            return
        first = state.counts.num_granted
        self._grant_all(now_s)
        if state.counts.num_granted > first:
            self._tell(now_s)

    def _grant_all(self, now_s: float) -> None:
        state, placement = self._state, self._state.placement
        num_refused = 0
        while (waiting := placement.next(now_s)) is not None:
            submit = waiting.submit
            need = state.limits.need_tokens(submit)
            room = placement.room_for(submit, need, now_s)
            if room is None:
                room = placement.room_over(submit.client, now_s)
                if room is None:
                    if num_refused < MOST_REFUSED and self._turned_away(waiting, now_s):
                        num_refused += 1
                        continue
                    return
                room.granted_over = submit.request_id
                state.counts.num_granted_over += 1
                state.notes.granted_over(submit.client, room.name, now_s)
            self._grant(waiting, room, need, now_s)

    def _tell(self, now_s: float) -> None:
        """What was granted in one go, all at once, to whoever counts."""
        state, waits = self._state, self._waits
        self._waits = []
        state.door.granted(waits, now_s)
        state.notes.granted(waits, now_s)
        has = state.queue.backlog.has
        for client in {client for client, _ in waits if not has(client)}:
            state.watch.observe_one(client)
            state.notes.moved(client, now_s)

    def _turned_away(self, waiting: Waiting, now_s: float) -> bool:
        """Refuse what was picked and fits nowhere, with all that waits for the same interaction, if that may not begin
        now (FairServe, section 4.1)."""
        state, submit = self._state, waiting.submit
        if state.interactions.has_begun(submit.client, submit.interaction, submit.request_id):
            return False
        error = state.door.refuse_late(waiting, now_s)
        if error is None:
            return False
        for request_id in state.interactions.turned_away(submit.client, submit.interaction, submit.request_id):
            refused = self._stages.drop(request_id, now_s)
            if refused is not None:
                state.counts.num_sent += 1
                state.door.refused_late(refused)
                self._stages.refused(refused.submit, error, now_s)
                state.sessions.tell(refused.router, Refusal(request_id, error, state.counts.num_sent), now_s)
        return True

    def _grant(self, waiting: Waiting, room: ReplicaRoom, need: int, now_s: float) -> None:
        """Charge and lease what was picked: one step, nobody can come between."""
        state, submit = self._state, waiting.submit
        client, request_id = submit.client, submit.request_id
        queue, cost, counts = state.queue, state.cost, state.counts
        predicted = state.predictor.predict(client, submit.application, submit.predicted_output)
        predicted = min(max(0.0, predicted), submit.max_output) if predicted else 0.0
        input_service = cost.service(submit.num_input, 0)
        service = cost.service(submit.num_input, predicted) if predicted else input_service
        rates = queue.rates(client, queue.policy.price(client, submit.application))
        owed = cost.service(submit.num_input, submit.max_output) - service
        counts.num_granted += 1
        counts.num_sent = seq = counts.num_sent + 1
        deadline_s = now_s + state.limits.lease_s
        lease = Lease(waiting, room.name, room.incarnation, predicted, service, rates, owed, deadline_s, seq)
        queue.pick(client, request_id, service, rates)
        state.leases.add(request_id, lease)
        state.watch.granted(client, scaled(service, rates), scaled(owed, rates))
        waiting.is_first = False
        if submit.interaction:
            state.interactions.granted(client, submit.interaction, request_id)
        state.capacity.reserve(room.name, request_id, need)
        state.placement.placed(submit, room, input_service)
        waited_s = now_s - waiting.arrived_s
        self._waits.append((client, waited_s))
        if state.log is not None:
            state.log.granted(lease, queue.counter(client), waited_s, now_s)
        state.sessions.tell(waiting.router, Grant(request_id, room.name, waited_s, seq), now_s)
