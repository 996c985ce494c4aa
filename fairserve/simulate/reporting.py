"""A replica's reports to the authority, one in flight: the second half of ``cluster/replica.py`` on virtual time."""

from __future__ import annotations

from functools import partial

from fairserve.dispatch.messages import ReportReply, StepReport
from fairserve.dispatch.replica_book import BookEvents, Reporter
from fairserve.simulate.authority import Authority
from fairserve.simulate.live import Live
from fairserve.simulate.network import RETRY_S, Link, Network
from fairserve.simulate.replica import SimReplica
from fairserve.simulate.setup import ClusterSetup

KEEP_S, MAX_KEEP_S = 1.0, 30.0
"""How long a request without a grant is kept waiting, at first and at the most, once the authority answers; as live."""


class Reporting:
    """Of one incarnation of a replica; begins with a report at once."""

    def __init__(
        self, replica: SimReplica, incarnation: int, authority: Authority, network: Network, setup: ClusterSetup
    ) -> None:
        self._replica = replica
        self._authority = authority
        self._timeline = network.timeline
        self._link = Link(network, replica.name, setup.counter.call_timeout_s)
        self.reporter = Reporter(replica.name, incarnation)
        self._every_steps = setup.report_every_steps
        self._heartbeat_s = setup.counter.heartbeat_s
        self._is_sending = False
        self._has_news = False
        self._num_steps = 0
        self._sent_s = 0.0
        self._kept: dict[str, tuple[Live, float]] = {}
        """Requests that came without a grant and have not started, and when to give each back."""
        replica.on_events = self.take
        self._send()
        self._timeline.after(self._heartbeat_s, self._beat)

    def keep(self, live: Live) -> None:
        """A request comes without a grant, from a router that cannot reach the authority."""
        keep_s = min(KEEP_S * 2**live.num_returns, MAX_KEEP_S)
        self._kept[live.request_id] = (live, self._timeline.now_s + keep_s)

    def take(self, events: BookEvents) -> None:
        """What a step, or a moment without one, has brought."""
        self.reporter.add(events)
        if self._kept:
            for request_id in events.started:
                self._kept.pop(request_id, None)
        if self.reporter.has_news:
            self._has_news = True
            self._send_news()

    def compose(self) -> StepReport:
        state = self._replica.state
        return self.reporter.compose(
            free_kv_tokens=state.free_kv_tokens,
            free_slots=state.free_slots,
            kv_capacity_tokens=self._replica.kv_capacity_tokens,
            max_slots=self._replica.setup.max_num_seqs,
            num_running=state.num_running,
            num_waiting=state.num_waiting,
        )

    def _send_news(self) -> None:
        if not self._has_news or self._is_sending:
            return
        num_steps = self._replica.num_steps - self._num_steps
        if self._every_steps is None or num_steps >= self._every_steps or self._replica.is_empty:
            self._send()

    def _send(self) -> None:
        self._is_sending = True
        self._has_news = False
        self._num_steps = self._replica.num_steps
        self._sent_s = self._timeline.now_s
        self._link.call(partial(self._authority.report, self.compose()), self._replied)

    def _replied(self, reply: ReportReply | None) -> None:
        if not self._replica.is_alive:
            return
        if reply is None:
            self._timeline.after(RETRY_S, self._go_on)
            return
        reported = self.reporter.replied(reply)
        if reported is not None and reply.counters:
            self._replica.between_steps(partial(self._replica.book.apply_counters, reply.counters, reported))
        if idle := self.reporter.idle():
            self._replica.between_steps(partial(self._replica.book.close, idle))
        self._has_news = self._has_news or self.reporter.has_news
        self._give_back()
        self._go_on()

    def _go_on(self) -> None:
        self._is_sending = False
        if self._replica.is_alive:
            self._send_news()

    def _give_back(self) -> None:
        """Ungranted requests that have waited here long enough: the cluster's queue is fairer, and as long as they
        stand here the replica looks full to it."""
        now_s = self._timeline.now_s
        for request_id, (live, at_s) in list(self._kept.items()):
            if at_s <= now_s:
                del self._kept[request_id]
                self._replica.between_steps(partial(self._replica.give_back, live))

    def _beat(self) -> None:
        if not self._replica.is_alive:
            return
        due_s = self._sent_s + self._heartbeat_s
        if not self._is_sending and self._timeline.now_s >= due_s:
            self._send()
            due_s = self._sent_s + self._heartbeat_s
        self._timeline.at(max(due_s, self._timeline.now_s + RETRY_S), self._beat)
