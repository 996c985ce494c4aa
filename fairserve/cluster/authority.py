"""The Dispatcher in force, and how another one follows it where settings or counters are exchanged."""

from __future__ import annotations

import time
from collections.abc import Mapping

from fairserve.assembly import make_dispatcher
from fairserve.clock import Clock
from fairserve.cluster.line_file import LineFile
from fairserve.config import FairServeArgs
from fairserve.dispatch.controls import Control, Controls
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.notes import Notes
from fairserve.dispatch.store import Snapshot
from fairserve.dispatch.usage import UsageBook


class Authority:
    """``args``: the settings in force. ``controls``: what is set live for each client; it outlives every Dispatcher,
    as does ``usage``."""

    def __init__(
        self,
        args: FairServeArgs,
        epoch: int,
        clock: Clock,
        controls: Mapping[str, Control],
        usage: UsageBook | None = None,
    ) -> None:
        self.args = args
        self.usage = usage or UsageBook()
        self.log_file: LineFile | None = None
        if args.counter.decision_log_path:
            self.log_file = LineFile(args.counter.decision_log_path, heading=lambda: self._log_heading)
        self._log_heading = ""
        self.is_shared = args.counter.is_in_redis
        self._clock = clock
        self._controls = Controls()
        for client, control in controls.items():
            self._controls.put(client, control)
        self.dispatcher = self._new_dispatcher(args, epoch)

    def take_settings(self, args: FairServeArgs) -> bool:
        """Go on under these settings, with the same counters; True where that began a new epoch."""
        is_changed = (args.fairness, args.dispatch) != (self.args.fairness, self.args.dispatch)
        if is_changed:
            self._follow(args, self.dispatcher.dump())
        self.args = args
        return is_changed

    def try_out(self, snapshot: Snapshot) -> None:
        """Whether a Dispatcher could go on from it; changes nothing.

        Raises:
            ValueError: it could not.
        """
        make_dispatcher(self.args.fairness, self.args.dispatch, epoch=1).load(snapshot)

    def exchange(self, snapshot: Snapshot) -> None:
        """Go on from this snapshot, in a new epoch.

        Raises:
            ValueError: it cannot be loaded; nothing has changed.
        """
        self._follow(self.args, snapshot)

    def begin_level(self) -> None:
        """Forget every counter; in the same epoch, so only before anybody has heard of it."""
        self.dispatcher = self._new_dispatcher(self.args, self.dispatcher.epoch)

    def share(self, is_shared: bool) -> None:
        """Whether other clusters are fair together with this one."""
        self.is_shared = self.dispatcher.ledger.is_shared = is_shared

    def control(self, client: str, control: Control) -> None:
        """See :meth:`Dispatcher.control`."""
        self.dispatcher.control(client, control, self._clock.now_s())

    def _follow(self, args: FairServeArgs, snapshot: Snapshot) -> None:
        epoch = max(time.time_ns(), self.dispatcher.epoch + 1)
        follows = self._new_dispatcher(args, epoch, self.dispatcher.notes)
        try:
            follows.load(snapshot)
        except BaseException:
            self.dispatcher.notes.begins(self.dispatcher.queue.is_waiting)
            raise
        self.dispatcher = follows

    def _new_dispatcher(self, args: FairServeArgs, epoch: int, notes: Notes | None = None) -> Dispatcher:
        log = None
        if self.log_file is not None:
            log = DecisionLog(self.log_file.write)
            log.began(policy=args.fairness.policy, epoch=epoch, now_s=self._clock.now_s())
            self._log_heading = log.heading
        dispatcher = make_dispatcher(
            args.fairness,
            args.dispatch,
            epoch=epoch,
            log=log,
            notes=notes,
            controls=self._controls,
            usage=self.usage,
        )
        dispatcher.ledger.is_shared = self.is_shared
        return dispatcher
