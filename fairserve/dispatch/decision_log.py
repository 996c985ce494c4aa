"""What the dispatcher decided, as plain values: one JSON line each.

``fairserve simulate --replay`` turns such a log back into a workload and shows what another policy would have done.
Times are seconds of the authority's clock. No prompt, no text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fairserve.dispatch.controls import Control
from fairserve.dispatch.leases import Lease
from fairserve.dispatch.messages import Submit
from fairserve.errors import Refused

LOG_VERSION = 1


class DecisionLog:
    """Hands each line to ``write``, which must be quick: it is called between pick and grant."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.heading = ""
        """The newest line that began: what a further file of this log has to begin with."""

    def began(self, *, policy: str, epoch: int, now_s: float) -> None:
        """An authority begins, or goes on with other settings."""
        self.heading = self._line(now_s, "began", version=LOG_VERSION, policy=policy, epoch=epoch)

    def submitted(self, submit: Submit, lift: float, now_s: float) -> None:
        self._line(now_s, "submit", lift=lift, **_of(submit))

    def refused(self, submit: Submit, error: Refused, now_s: float) -> None:
        self._line(now_s, "refuse", reason=error.reason, retry_after_s=error.retry_after_s, **_of(submit))

    def granted(self, lease: Lease, counter: float, waited_s: float, now_s: float) -> None:
        """``counter``: the client's, after the charge."""
        submit = lease.waiting.submit
        self._line(
            now_s,
            "grant",
            request=submit.request_id,
            client=submit.client,
            replica=lease.replica,
            predicted=lease.predicted,
            counter=counter,
            waited_s=waited_s,
        )

    def cancelled(self, request_id: str, now_s: float) -> None:
        """Its caller, or its router, went away: it left before its end."""
        self._line(now_s, "cancel", request=request_id)

    def changed(self, client: str, control: Control, now_s: float) -> None:
        """Somebody set these for the client; whatever is not named is as its key says."""
        self._line(now_s, "change", client=client, set=control.dump())

    def finished(self, request_id: str, lease: Lease, now_s: float) -> None:
        self._line(now_s, "finish", request=request_id, output=lease.num_output, started=lease.has_started)

    def _line(self, now_s: float, event: str, **fields: Any) -> str:
        line = json.dumps({"t": round(now_s, 6), "event": event, **fields}, separators=(",", ":"))
        self._write(line)
        return line


def _of(submit: Submit) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "request": submit.request_id,
        "client": submit.client,
        "input": submit.num_input,
        "max_output": submit.max_output,
        "weight": submit.weight,
        "waited_s": round(submit.waited_s, 6),
        "is_retry": submit.is_retry,
    }
    if submit.application:
        fields["application"] = submit.application
    if submit.interaction:
        fields |= {"interaction": submit.interaction, "call_index": submit.call_index}
    if submit.prefix:
        fields["prefix"] = list(submit.prefix)
    return fields
