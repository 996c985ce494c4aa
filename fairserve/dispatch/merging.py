"""What was served: reports of replicas, and totals of other clusters, merged into counters, leases and capacity."""

from __future__ import annotations

from collections.abc import Mapping

from fairserve.dispatch.leases import Lease
from fairserve.dispatch.ledger import CLUSTER
from fairserve.dispatch.losses import Losses
from fairserve.dispatch.messages import StepReport, Totals
from fairserve.dispatch.stages import Stages
from fairserve.dispatch.state import State
from fairserve.fairness.accounts import SEPARATOR, application_of, client_of


class Merging:
    def __init__(self, state: State, stages: Stages, losses: Losses) -> None:
        self._state = state
        self._stages = stages
        self._losses = losses

    def report(self, report: StepReport, epoch: int, now_s: float) -> bool:
        """A replica's report; False when it is a repeat or was overtaken. ``epoch``: the authority's."""
        state, watch = self._state, self._state.watch
        is_old_acquaintance = report.is_full or report.epoch not in (0, epoch)
        added = state.ledger.merge(report, as_baseline=is_old_acquaintance and not state.knows_the_past)
        if added is None:
            return False
        owners = {account: account if SEPARATOR not in account else client_of(account) for account in report.totals}
        clients = {owners[account] for account in added}
        self._count(added, owners)
        given_back = {owners[account] for account, difference in added.items() if difference.service < 0}
        with watch.returning(self._settled_by(report) | given_back):
            offers_room = self._meet(report, now_s)
            to_look_at = given_back
            for client in owners.values():
                if client not in state.queue.table:
                    to_look_at.add(client)
                    state.weights.carry(client, report.weights.get(client, 1.0))
                    if (
                        client in clients
                    ):  # forgotten, or unknown to this life: what it is charged now is on top of that
                        state.queue.begin_level(client)
            with watch.merging(report.replica, clients):
                self._take(report, added, owners, now_s)
        if offers_room:
            state.capacity.report(report, now_s)
        watch.observe(clients)
        for client in to_look_at:  # the others are as busy as before; those whose request ended were looked at
            state.idlers.look_at(client)
        if report.is_draining:
            self._losses.drain(report.replica, now_s)
        return True

    def cluster(
        self,
        cluster: str,
        incarnation: int,
        totals: Mapping[str, Totals],
        weights: Mapping[str, float],
        seq: int,
        *,
        is_usage: bool = True,
    ) -> None:
        """Totals of another cluster; see :meth:`Dispatcher.merge_cluster`. ``is_usage``: nobody else counts them
        towards usage and budgets."""
        state, watch = self._state, self._state.watch
        added = state.ledger.merge_cluster(cluster, incarnation, totals, seq)
        clients = {client_of(account) for account in added}
        if is_usage:
            self._count(added, {account: client_of(account) for account in added})
        with watch.returning(clients), watch.merging(CLUSTER + cluster, clients):
            for account, difference in added.items():
                if (client := client_of(account)) not in state.queue.table:
                    state.weights.carry(client, weights.get(account, 1.0))
                self._charge(account, client, difference.service)
        watch.observe(clients)
        for client in clients:
            state.idlers.look_at(client)

    def _count(self, added: Mapping[str, Totals], owners: Mapping[str, str]) -> None:
        """Towards usage and budgets; ``owners``: client by account."""
        for account, difference in added.items():
            self._state.usage.served(owners[account], difference)
            self._state.budgets.served(owners[account])

    def _settled_by(self, report: StepReport) -> set[str]:
        """Clients whose grants the report may settle."""
        named = (*report.received, *report.held, *report.started, *report.outputs, *report.finished)
        leases = map(self._state.leases.get, named)
        return {lease.waiting.submit.client for lease in leases if lease is not None}

    def _meet(self, report: StepReport, now_s: float) -> bool:
        """Who reports: a replica that is new, anew or known. False for one whose room counts no more."""
        state, replica = self._state, report.replica
        room = state.capacity.get(replica)
        if room is None:
            if state.gone.get(replica, now_s) > now_s:
                return False  # its last words: they count, and offer no room
            state.notes.joined(replica, now_s)
            return True
        if room.incarnation < report.incarnation:
            self._losses.began_anew(replica, room.incarnation, now_s)
            state.notes.restarted(replica, now_s)
        return room.incarnation <= report.incarnation

    def _take(self, report: StepReport, added: Mapping[str, Totals], owners: Mapping[str, str], now_s: float) -> None:
        """What became of its requests, and what they received; ``owners``: client by account."""
        for request_id in (*report.received, *report.held):
            self._confirm(request_id, report, now_s)
        for request_id in report.started:
            self._start(request_id, report, now_s)
        shares = []
        for account, difference in added.items():
            client, service = owners[account], difference[3]
            shares.append((client, service, self._charge(account, client, service)))
        num_tokens = sum([difference[0] + difference[2] for difference in added.values()])
        self._state.notes.served(report.replica, shares, num_tokens)
        for request_id, num_output in report.outputs.items():
            self._progress(request_id, num_output, report)
        for request_id in report.finished:
            self._finish(request_id, report, now_s)

    def _charge(self, account: str, client: str, service: float) -> float:
        """It was served; returns what it adds to the client's counter at the top level."""
        queue = self._state.queue
        application = application_of(account) if account != client else ""
        rates = queue.rates(client, queue.policy.price(client, application))
        queue.charge(client, service, rates)
        self._state.watch.served(client, service, rates)
        return service * rates[0]

    def _lease(self, request_id: str, report: StepReport) -> Lease | None:
        """What this life of the replica holds."""
        lease = self._state.leases.get(request_id)
        if lease is None or (lease.replica, lease.incarnation) != (report.replica, report.incarnation):
            return None
        return lease

    def _confirm(self, request_id: str, report: StepReport, now_s: float) -> Lease | None:
        lease = self._lease(request_id, report)
        if lease is None:
            self._void(request_id, now_s)
        else:
            self._stages.confirm(request_id, lease)
        return lease

    def _void(self, request_id: str, now_s: float) -> None:
        """It is on a replica already: whatever else was planned for it is void. A router that wants it all the same
        (it could not reach that replica) is asked to submit again."""
        waiting = self._stages.drop(request_id, now_s)
        session = self._state.sessions.get(waiting.router) if waiting is not None else None
        if session is not None:
            session.is_complete = False

    def _start(self, request_id: str, report: StepReport, now_s: float) -> None:
        """The replica's totals include this request's input from now on."""
        lease = self._confirm(request_id, report, now_s)
        if lease is not None:
            lease.has_started = True
            self._stages.settle(lease)
            self._stages.no_longer_over(request_id, lease)

    def _progress(self, request_id: str, num_output: int, report: StepReport) -> None:
        """The replica's totals include this many output tokens of the request."""
        lease = self._lease(request_id, report)
        if lease is not None:
            lease.num_output = max(lease.num_output, num_output)
            self._stages.settle(lease)

    def _finish(self, request_id: str, report: StepReport, now_s: float) -> None:
        state, lease = self._state, self._lease(request_id, report)
        if lease is None:
            return
        submit = lease.waiting.submit
        if lease.has_started:
            client, application = submit.client, submit.application
            if submit.max_output:  # what is only scored or embedded tells nothing of answers
                state.predictor.learn(client, application, lease.num_output)
            service = state.cost.service(submit.num_input, lease.num_output)
            input_service = state.cost.service(submit.num_input, 0)
            state.queue.policy.finished(client, application, lease.replica, input_service, service)
        if state.log is not None:
            state.log.finished(request_id, lease, now_s)
        self._stages.drop(request_id, now_s)
