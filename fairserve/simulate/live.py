"""A request on its way through the simulated cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from fairserve.dispatch.messages import Grant, Submit
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.simulate.records import Arrival, RequestRecord


class Door(Protocol):
    """The ingress that a request came through: what its replica tells it."""

    def returned(self, live: Live) -> None:
        """The replica gives it back unserved, for the cluster's queue to have it."""
        ...

    def bounced(self, live: Live) -> None:
        """The replica is gone, and the request had not started there."""
        ...

    def ended(self, live: Live) -> None:
        """It is over."""
        ...


@dataclass(slots=True, eq=False)
class Live:
    record: RequestRecord
    request: GenerateRequest
    node: str
    """Among whom its client is compared: the client itself, or the organisation that its path begins with."""
    door: Door
    grant: Grant | None = None
    """The grant that it was sent with; None where there is none."""
    num_returns: int = 0
    num_end: int = 0
    """Output tokens at which it ends; its replica says how many its context has room for."""
    has_started: bool = False
    service: float = 0.0
    """Delivered so far."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def submit(self, now_s: float, predicted_output: int | None, *, is_retry: bool) -> Submit:
        one = self.record.arrival
        return Submit(
            one.request_id,
            one.client,
            one.num_input,
            one.max_output,
            one.weight,
            waited_s=now_s - one.arrival_s if is_retry else 0.0,
            is_retry=is_retry,
            application=one.application,
            interaction=one.interaction,
            call_index=one.call_index,
            prefix=one.prefix,
            predicted_output=predicted_output,
        )


def request_of(arrival: Arrival) -> GenerateRequest:
    """What a replica gets to see. Nobody looks at the token ids: a range of them is cheap to hold and to slice."""
    token_ids: Sequence[int] = range(arrival.num_input)
    return GenerateRequest(
        request_id=arrival.request_id,
        client=arrival.client,
        prompt_token_ids=cast("tuple[int, ...]", token_ids),
        sampling=SamplingParams(max_tokens=arrival.max_output),
        weight=arrival.weight,
        application=arrival.application,
        interaction=arrival.interaction,
        call_index=arrival.call_index,
    )
