"""What routers send: requests that come, go, or could not be placed."""

from __future__ import annotations

from fairserve.dispatch.granting import Granting
from fairserve.dispatch.leases import Waiting
from fairserve.dispatch.losses import Losses
from fairserve.dispatch.messages import Refusal, RouterCall, Submit
from fairserve.dispatch.sessions import RouterSession
from fairserve.dispatch.stages import Stages
from fairserve.dispatch.state import State
from fairserve.errors import ClientQueueFull, ClusterQueueFull

UNREACHABLE_PAUSE_S = 1.0


class Intake:
    def __init__(self, state: State, stages: Stages, granting: Granting, losses: Losses) -> None:
        self._state = state
        self._stages = stages
        self._granting = granting
        self._losses = losses

    def session(self, call: RouterCall, epoch: int, now_s: float) -> RouterSession | None:
        """The caller's session; None for a call of an earlier life that arrives late. ``epoch``: the authority's."""
        sessions = self._state.sessions
        session = sessions.get(call.router)
        if session is not None and session.incarnation == call.incarnation:
            session.heard_s = now_s
            if call.epoch == epoch:
                session.acknowledge(call.grants_ack)
            return session
        if session is not None and session.incarnation > call.incarnation:
            return None
        if session is not None:
            self._losses.end_session(session, now_s)
        is_first_call = call.epoch == 0
        session = RouterSession(call.router, call.incarnation, now_s, is_complete=is_first_call)
        sessions.add(session)
        return session

    def take(self, call: RouterCall, session: RouterSession, now_s: float) -> None:
        """Everything that a call says, which is not a repeat."""
        session.last_seq = call.seq
        session.is_complete = session.is_complete or call.is_full
        for replica in call.gone:
            self._losses.bury(replica, now_s)
        for replica in call.draining:
            self._losses.drain(replica, now_s)
        for replica in call.unreachable:
            self._state.capacity.suspend(replica, now_s + UNREACHABLE_PAUSE_S)
        for request_id in call.cancels:
            self._stages.cancel(request_id, now_s)
        for request_id in call.declined:
            self._stages.drop(request_id, now_s)
        submits = call.submits
        if call.is_full:  # the least served first, or a client that is ahead would lift those behind it
            submits = tuple(sorted(submits, key=lambda submit: self._state.queue.standing(submit.client)))
        refusals = [self._submit(submit, session, now_s) for submit in submits]
        session.last_refusals = tuple([refusal for refusal in refusals if refusal is not None])

    def _submit(self, submit: Submit, session: RouterSession, now_s: float) -> Refusal | None:
        state, request_id = self._state, submit.request_id
        if state.holds(request_id) or session.is_refused(request_id):
            return None
        client = submit.client
        state.weights.carry(client, submit.weight)
        state.budgets.carry(client, submit.budgets)
        waiting = Waiting(submit, session.router, now_s - submit.waited_s)
        if submit.is_retry:
            self._stages.goes_on(submit, now_s)
        elif (refusal := self._let_in(waiting, now_s)) is not None:
            return refusal
        session.requests.add(request_id)
        rise = self._stages.enter(waiting, now_s)
        if state.log is not None:
            state.log.submitted(submit, rise, now_s)
        return None

    def _let_in(self, waiting: Waiting, now_s: float) -> Refusal | None:
        """Ask the door about a new request."""
        state, submit = self._state, waiting.submit
        client, interactions = submit.client, state.interactions
        is_first = interactions.is_first(client, submit.interaction, submit.call_index, now_s)
        error = state.door.refuse(submit, is_first, now_s)
        if isinstance(error, ClientQueueFull | ClusterQueueFull):
            self._granting.dispatch(now_s)  # earlier ones of the same call may only look as if they had to wait
            error = state.door.refuse(submit, is_first, now_s)
        if error is not None:
            interactions.cut(client, submit.interaction)
            self._stages.refused(submit, error, now_s)
            return Refusal(submit.request_id, error)
        state.door.accepted(submit, now_s)
        state.usage.accepted(client)
        waiting.accepted_s, waiting.is_first = now_s, is_first
        interactions.accepted(client, submit.interaction, submit.request_id, now_s, is_first=is_first)
        state.mark(client)
        return None
