"""What the dispatcher tells for people's sake: every happening is one call here, and no decision reads any of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fairserve.dispatch.events import IDLE_S, Events
from fairserve.dispatch.recent import Recent
from fairserve.errors import InteractionThrottled, Refused


class Notes:
    """Outlives the dispatcher that writes it: its successor goes on with the same one."""

    def __init__(self) -> None:
        self.events = Events()
        self.recent = Recent()
        self._is_waiting: Callable[[str], bool] = _nobody
        self._was_overloaded = False

    def begins(self, is_waiting: Callable[[str], bool]) -> None:
        """A dispatcher begins to write here; ``is_waiting`` says who waits in its queue."""
        self._is_waiting = is_waiting
        self.recent.begins()

    # -- requests -----------------------------------------------------------------------------------------------------

    def entered(self, client: str, rise: float, now_s: float) -> None:
        """A request waits; its client was lifted by ``rise``."""
        if rise:
            seen_s = self.recent.seen_s(client)
            if seen_s is None or now_s - seen_s >= IDLE_S:
                self.events.note("lifted", now_s, LIFTED, client, rise, client=client)
        self.recent.seen(client, now_s)
        self.recent.moved(client, self._is_waiting, now_s)

    def moved(self, client: str, now_s: float) -> None:
        """A request of the client waits no more, or its client was paused or resumed."""
        self.recent.moved(client, self._is_waiting, now_s)

    def granted(self, waits: Iterable[tuple[str, float]], now_s: float) -> None:
        """Requests of these clients were granted, after so many seconds."""
        self.recent.granted(waits, now_s)

    def granted_over(self, client: str, replica: str, now_s: float) -> None:
        """A request was granted where there is no room: another gives way."""
        self.events.note("preempted", now_s, PREEMPTED, replica, client, client=client, replica=replica)

    def refused(self, client: str, error: Refused, now_s: float) -> None:
        self.recent.refused(client, now_s)
        kind = "throttled" if isinstance(error, InteractionThrottled) else "refused"
        self.events.note(kind, now_s, "{}", error, client=client)

    def lapsed(self, client: str, replica: str, now_s: float) -> None:
        self.events.note("lapsed", now_s, LAPSED, replica, client, client=client, replica=replica)

    def forgot(self, client: str) -> None:
        """The client is not known any more."""
        self.recent.forget(client)

    # -- replicas and routers -----------------------------------------------------------------------------------------

    def served(self, replica: str, shares: Iterable[tuple[str, float, float]], num_tokens: int) -> None:
        """See :meth:`Recent.served`."""
        self.recent.served(replica, shares, num_tokens)

    def joined(self, replica: str, now_s: float) -> None:
        self.events.note("joined", now_s, "Replica {} reports for the first time.", replica, replica=replica)

    def restarted(self, replica: str, now_s: float) -> None:
        self.events.note("lost", now_s, "Replica {} began anew: what it ran is lost.", replica, replica=replica)

    def lost_replica(self, replica: str, silent_s: float, now_s: float) -> None:
        self.events.note("lost", now_s, LOST_REPLICA, replica, silent_s, replica=replica)

    def died(self, replica: str, now_s: float) -> None:
        self.events.note("lost", now_s, "Replica {} has died: what it ran is lost.", replica, replica=replica)

    def draining(self, replica: str, now_s: float) -> None:
        self.events.note("draining", now_s, DRAINING, replica, replica=replica)

    def drained(self, replica: str, now_s: float) -> None:
        self.events.note("draining", now_s, "Replica {} has finished what it had, and ended.", replica, replica=replica)

    def lost_router(self, router: str, silent_s: float, now_s: float) -> None:
        self.events.note("lost", now_s, LOST_ROUTER, router, silent_s)

    # -- the service --------------------------------------------------------------------------------------------------

    def started(self, num_restored: int, now_s: float, why: str = "") -> None:
        """The authority's process began; ``num_restored``: clients that it knows from a snapshot; ``why`` it knows
        none although there may be one."""
        restored = f"with {num_restored:,} clients restored" if num_restored else "with nothing restored"
        restored += f" ({why})" if why else ""
        self.events.note("started", now_s, "The counter actor began, {}.", restored)

    def changed(self, who: str, what: str, now_s: float, client: str | None = None) -> None:
        self.events.note("changed", now_s, "{} changed {}.", who, what, client=client)

    # -- time ---------------------------------------------------------------------------------------------------------

    def tick(self, is_overloaded: bool, now_s: float) -> None:
        if is_overloaded != self._was_overloaded:
            self._was_overloaded = is_overloaded
            self.events.note("overload", now_s, "Overload began." if is_overloaded else "Overload ended.")
        self.recent.tick(now_s)


LIFTED = "{} had nothing to do until now: raised by {:,.0f} to the level of those that wait."
PREEMPTED = "Replica {} is full: somebody gives way there for {}."
LAPSED = "Replica {} never confirmed a request of {}: it waits again, its charge returned."
LOST_REPLICA = "Replica {} has been silent for {:.0f} s: what it was granted is taken back."
DRAINING = "Replica {} is being stopped: it finishes what it runs and is granted nothing more."
LOST_ROUTER = "Router {} has been silent for {:.0f} s: its waiting requests are dropped."


def _nobody(node: str) -> bool:
    return False
