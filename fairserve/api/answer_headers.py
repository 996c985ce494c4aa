"""What the headers of an answer say beside it; ``deployments/README.md`` has the table.

Headers go out with the first byte. What is known at the end only (the whole time, the tokens charged) is in the headers
of an answer that is sent whole; of a stream, the tokens are in its usage chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

from fairserve.clock import Clock
from fairserve.dispatch.messages import Standing
from fairserve.engine.request import RequestOutput
from fairserve.errors import BudgetSpent, ClientQueueFull, ClientRateLimited, RateLimited, Refused

QUEUE_HEADER = "x-fairserve-queue-ms"
POSITION_HEADER = "x-fairserve-counter-position"
CHARGED_HEADER = "x-fairserve-charged-tokens"
BUDGET_HEADER = "x-fairserve-token-budget"
SOFT_HEADER = "x-fairserve-soft-budget-passed"
TIMING_HEADER = "server-timing"
MINUTE_S = 60
MONTH_S = 31 * 24 * 3600
"""The longest time to a reset that is told."""
REQUESTS, TOKENS = "requests", "tokens"
Outputs = Mapping[int, RequestOutput]
"""By choice."""


def duration(seconds: float) -> str:
    """As OpenAI writes times to a reset: 0s, 250ms, 1.5s, 6m0s, 2h3m0s."""
    if not seconds > 0:  # not a number, too
        return "0s"
    if seconds < 1:
        return f"{max(1, round(seconds * 1000))}ms"
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(round(min(seconds, MONTH_S)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


def limit(kind: str, most: int, left: int, reset_s: float) -> dict[str, str]:
    """OpenAI's three headers of one kind of limit."""
    values = {"limit": str(most), "remaining": str(max(0, left)), "reset": duration(reset_s)}
    return {f"x-ratelimit-{name}-{kind}": value for name, value in values.items()}


def of_refusal(error: Refused) -> dict[str, str]:
    """The limit that a refusal speaks of."""
    match error:
        case ClientQueueFull() | ClientRateLimited() | RateLimited():
            return limit(REQUESTS, error.fields["limit"], 0, error.retry_after_s)
        case BudgetSpent():
            numbers = error.fields
            left = numbers["limit"] - numbers["used"] - numbers["promised"]
            told = limit(TOKENS, numbers["limit"], left, numbers["reset_s"])
            name = {BUDGET_HEADER: f"{numbers['budget']} {numbers['of']}"}
            # OpenAI's clients would try a few times within seconds, in vain.
            return told | name | ({"x-should-retry": "false"} if error.retry_after_s > MINUTE_S else {})
    return {}


class AnswerHeaders:
    """Of one request, which begins now."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.now_s()
        self._first_s: float | None = None

    def saw(self, batch: Outputs) -> None:
        """Outputs as they come; the first with a token says how long it took."""
        if self._first_s is None and any(output.usage.num_output for output in batch.values()):
            self._first_s = self._clock.now_s()

    def first(self, batch: Outputs) -> dict[str, str]:
        """What is known with the first output, or later. Of several sequences the longest wait and the nearest limits
        count."""
        headers: dict[str, str] = {}
        waits = [output.waited_s for output in batch.values() if output.waited_s is not None]
        timing = {"queue": max(waits) * 1000} if waits else {}
        if waits:
            headers[QUEUE_HEADER] = f"{timing['queue']:.1f}"
        if self._first_s is not None:
            timing["ttft"] = (self._first_s - self._began_s) * 1000
        if timing:
            headers[TIMING_HEADER] = _timing(timing)
        standings = [output.standing for output in batch.values() if output.standing is not None]
        return headers | (_standing(standings) if standings else {})

    def whole(self, outputs: Outputs) -> dict[str, str]:
        """All that can be said of an answer that is sent whole."""
        headers = self.first(outputs)
        total = _timing({"total": (self._clock.now_s() - self._began_s) * 1000})
        headers[TIMING_HEADER] = ", ".join(filter(None, [headers.get(TIMING_HEADER), total]))
        return headers | {CHARGED_HEADER: str(charged_tokens(outputs))}


def charged_tokens(outputs: Outputs) -> int:
    """Input tokens, those from the prefix cache included, and output tokens of every sequence: each has its own prompt,
    so with n > 1 they are more than OpenAI's ``usage`` counts."""
    return sum(output.usage.num_input + output.usage.num_output for output in outputs.values())


def _timing(durations_ms: Mapping[str, float]) -> str:
    return ", ".join(f"{name};dur={value:.1f}" for name, value in durations_ms.items())


def _standing(standings: list[Standing]) -> dict[str, str]:
    nearest = min(standings, key=lambda one: one.requests_left)
    headers = {POSITION_HEADER: f"{max(one.lead for one in standings):.1f}"}
    headers |= limit(REQUESTS, nearest.max_requests, nearest.requests_left, nearest.requests_reset_s)
    limited = [(one.tokens_left, one.max_tokens, one) for one in standings if one.max_tokens is not None]
    if limited:
        left, most, one = min(limited, key=lambda found: found[0])
        headers |= limit(TOKENS, most, left, one.tokens_reset_s) | {BUDGET_HEADER: one.budget}
    passed = next((one.passed for one in standings if one.passed), "")
    return headers | ({SOFT_HEADER: passed} if passed else {})
