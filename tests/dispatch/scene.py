"""One router, one replica with one slot, and overload on demand: for what is throttled."""

from __future__ import annotations

from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.throttle import ThrottleSettings
from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit

LIMIT = 3


class Scene:
    """One router, one replica with one slot; time passes in quarters of a second."""

    def __init__(self, desk: Desk, throttle: ThrottleSettings) -> None:
        self.desk = desk
        self.throttle = throttle
        self.new_authority()
        self.router: RouterVoice = desk.router()
        self.replica: ReplicaVoice = desk.replica("r0", slots=1)
        self.router.call()
        self.wait(100.0)  # an authority this old takes nobody's word for where an interaction stands
        self.call("nobody", "warm-up")
        self.run_all()
        self.wait(61.0)

    def new_authority(self) -> None:
        epoch = self.desk.dispatcher.epoch + 1
        self.desk.dispatcher = Dispatcher(
            make_policy(self.desk.policy), self.desk.cost, self.desk.limits, epoch=epoch, throttle=self.throttle
        )

    @property
    def is_overloaded(self) -> bool:
        return self.desk.dispatcher.throttle.overload.is_on

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.desk.clock.advance(0.25)
            self.router.poll()
            self.replica.report(free_slots=1 - len(self.desk.dispatcher.leases))
            self.desk.dispatcher.tick(self.desk.now_s)

    def run_all(self) -> None:
        """Everything that waits or runs is granted, runs and ends, one after the other."""
        while leases := tuple(self.desk.dispatcher.leases):
            self.finish(*leases)

    def finish(self, *requests: str, num_output: int = 5) -> None:
        for request_id in requests:
            lease = self.desk.dispatcher.leases.get(request_id)
            assert lease is not None
            one = lease.waiting.submit
            served = {f"{one.client}|{one.application}" if one.application else one.client: (one.num_input, num_output)}
            report = self.replica.compose(
                received=(request_id,), started=(request_id,), finished=(request_id,), served=served
            )
            report.outputs[request_id] = num_output  # type: ignore[index]
            self.replica.send(report)

    def call(self, client: str, request_id: str, interaction: str = "", index: int = 0, **more: object) -> bool:
        """Send one call; whether it was accepted."""
        self.router.call(submit(request_id, client, interaction=interaction, call_index=index, **more))
        return request_id not in self.router.refused

    def overload(self) -> None:
        """A flood of another client's, for longer than the hold."""
        for i in range(30):
            self.call("flood", f"flood-{self.desk.now_s}-{i}", "flood", i)
        self.wait(4.0)
        assert self.is_overloaded
