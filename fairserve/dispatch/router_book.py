"""The router's side of the protocol, as plain code: what waits, what must be told to the authority, what came back.

One batched call and one long poll are in flight at most; whoever sends them is the shell's business
(``cluster/counter_client.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fairserve.dispatch.messages import Grant, Refusal, RouterCall, RouterReply, Submit
from fairserve.errors import Refused


@dataclass(slots=True)
class _Wanted:
    submit: Submit
    since_s: float
    on_grant: Callable[[Grant], None]
    on_refusal: Callable[[Refused], None]
    was_taken: bool = False
    """The authority has had it in an acknowledged call: queue limits no longer apply to it."""


class RouterBook:
    """Requests that wait for a grant. Each gets exactly one of: a grant, a refusal, :meth:`forget` by its caller."""

    def __init__(self, router: str, incarnation: int) -> None:
        self._router = router
        self._incarnation = incarnation
        self._seq = 0
        self.epoch = 0
        self._grants_ack = 0
        self._wanted: dict[str, _Wanted] = {}
        self._to_submit: dict[str, None] = {}
        self._cancels: dict[str, None] = {}
        self._declined: dict[str, None] = {}
        self._unreachable: dict[str, None] = {}
        self._gone: dict[str, None] = {}
        self._draining: dict[str, None] = {}
        self._in_flight: RouterCall | None = None
        self._resubmit_due = False
        self.num_epochs = 0

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def has_news(self) -> bool:
        """Something to tell: send the next call."""
        return bool(
            self._to_submit
            or self._cancels
            or self._declined
            or self._unreachable
            or self._gone
            or self._draining
            or self._resubmit_due
            or self._in_flight is not None
        )

    # -- events from callers ----------------------------------------------------------------------------------------

    def want(
        self,
        submit: Submit,
        now_s: float,
        on_grant: Callable[[Grant], None],
        on_refusal: Callable[[Refused], None],
    ) -> None:
        """A request waits from now (minus ``submit.waited_s``) on."""
        assert submit.request_id not in self._wanted, f"{submit.request_id} waits already"
        self._wanted[submit.request_id] = _Wanted(submit, now_s - submit.waited_s, on_grant, on_refusal)
        self._to_submit[submit.request_id] = None
        self._cancels.pop(submit.request_id, None)

    def forget(self, request_id: str) -> bool:
        """Nobody waits for it any more (the caller went away, or went ahead without a grant). Returns whether the
        authority had accepted it."""
        wanted = self._wanted.pop(request_id, None)
        was_queued = request_id in self._to_submit
        self._to_submit.pop(request_id, None)
        if wanted is None or wanted.was_taken or not was_queued:
            self._cancels[request_id] = None
        return wanted is not None and (wanted.was_taken or wanted.submit.is_retry)

    def decline(self, grant: Grant, *, is_unreachable: bool) -> None:
        """The grant will not be used."""
        self._declined[grant.request_id] = None
        if is_unreachable:
            self._unreachable[grant.replica] = None

    def gone(self, replica: str) -> None:
        """The replica's process has ended."""
        self._gone[replica] = None

    def draining(self, replica: str) -> None:
        """The replica is being stopped."""
        self._draining[replica] = None

    # -- calls --------------------------------------------------------------------------------------------------------

    def compose(self, now_s: float) -> RouterCall:
        """The next call; the same again, with the waiting times of now, while the last one's reply has not come."""
        if self._in_flight is not None:
            submits = tuple(
                self._submit_of(submit.request_id, now_s) if submit.request_id in self._wanted else submit
                for submit in self._in_flight.submits
            )
            self._in_flight = replace(self._in_flight, epoch=self.epoch, grants_ack=self._grants_ack, submits=submits)
            return self._in_flight
        is_full, self._resubmit_due = self._resubmit_due, False
        if is_full:
            self._to_submit = dict.fromkeys(self._wanted)
        self._seq += 1
        self._in_flight = RouterCall(
            router=self._router,
            incarnation=self._incarnation,
            seq=self._seq,
            epoch=self.epoch,
            submits=tuple(self._submit_of(request_id, now_s) for request_id in self._to_submit),
            cancels=tuple(self._cancels),
            declined=tuple(self._declined),
            unreachable=tuple(self._unreachable),
            gone=tuple(self._gone),
            draining=tuple(self._draining),
            is_full=is_full,
            grants_ack=self._grants_ack,
        )
        self._to_submit, self._cancels, self._declined, self._unreachable = {}, {}, {}, {}
        self._gone, self._draining = {}, {}
        return self._in_flight

    def compose_poll(self) -> RouterCall:
        """A call that only asks for grants."""
        return RouterCall(self._router, self._incarnation, self._seq, self.epoch, grants_ack=self._grants_ack)

    def _submit_of(self, request_id: str, now_s: float) -> Submit:
        wanted = self._wanted[request_id]
        is_retry = wanted.submit.is_retry or wanted.was_taken
        return replace(wanted.submit, waited_s=max(0.0, now_s - wanted.since_s), is_retry=is_retry)

    def replied(self, reply: RouterReply, *, to_poll: bool) -> None:
        """Take a reply in, and pass its grants and refusals on."""
        if reply.epoch < self.epoch:
            return  # from an authority that is no more
        if reply.epoch > self.epoch:
            # Even a poll that left before the first reply may reach a successor, who cannot know that it is one.
            self._resubmit_due = self._resubmit_due or self.epoch != 0
            self.num_epochs += 1
            self._grants_ack = 0
            self.epoch = reply.epoch
        self._resubmit_due = self._resubmit_due or reply.resubmit
        if not to_poll and self._in_flight is not None:
            for submit in self._in_flight.submits:
                if submit.request_id in self._wanted:
                    self._wanted[submit.request_id].was_taken = True
            self._in_flight = None
        all_news: list[Grant | Refusal] = [*reply.grants, *reply.refusals]
        for news in sorted(all_news, key=lambda news: news.seq):
            if 0 < news.seq <= self._grants_ack:
                continue  # delivered before
            self._grants_ack = max(self._grants_ack, news.seq)
            if isinstance(news, Grant):
                self._granted(news)
            else:
                self._refused(news)

    def _granted(self, grant: Grant) -> None:
        wanted = self._wanted.pop(grant.request_id, None)
        if wanted is None:
            self.decline(grant, is_unreachable=False)  # it has gone its way already
        else:
            self._to_submit.pop(grant.request_id, None)
            wanted.on_grant(grant)

    def _refused(self, refusal: Refusal) -> None:
        self._to_submit.pop(refusal.request_id, None)
        wanted = self._wanted.pop(refusal.request_id, None)
        if wanted is not None:
            wanted.on_refusal(refusal.error)
