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

    def dispatch(self, now_s: float) -> None:
        """Grant while the head of the policy's order fits somewhere; the first that does not stops all (no skipping:
        the bound needs it), unless it is throttled: that is as if its caller had gone."""
        state, placement = self._state, self._state.placement
        num_refused = 0
        if placement.is_full(now_s) and not state.throttle.looks_at_picks:
            return
        while (waiting := placement.next()) is not None:
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
            state.queue.take(submit.client, submit.request_id)
            self._grant(waiting, room, need, now_s)

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
        policy, cost, counts = state.queue.policy, state.cost, state.counts
        foretold = state.predictor.predict(client, submit.application, submit.predicted_output)
        predicted = min(max(0.0, foretold), submit.max_output)
        input_service = cost.service(submit.num_input, 0)
        service = cost.service(submit.num_input, predicted) if predicted else input_service
        rates = state.queue.rates(client, policy.price(client, submit.application))
        owed = cost.service(submit.num_input, submit.max_output) - service
        counts.num_granted += 1
        counts.num_sent += 1
        deadline_s = now_s + state.limits.lease_s
        seq = counts.num_sent
        lease = Lease(waiting, room.name, room.incarnation, predicted, service, rates, owed, deadline_s, seq)
        state.leases.add(request_id, lease)
        state.queue.charge(client, service, rates)
        state.watch.granted(client, scaled(service, rates), scaled(owed, rates))
        waiting.is_first = False
        state.interactions.granted(client, submit.interaction, request_id)
        state.capacity.reserve(room.name, request_id, need)
        state.placement.placed(submit, room, input_service)
        waited_s = now_s - waiting.arrived_s
        state.door.granted(client, waited_s, now_s)
        state.watch.observe_one(client)
        state.notes.granted(client, room.name, waited_s, now_s, is_over=room.granted_over == request_id)
        if state.log is not None:
            state.log.granted(lease, state.queue.counter(client), waited_s, now_s)
        state.sessions.tell(waiting.router, Grant(request_id, room.name, waited_s, seq), now_s)
