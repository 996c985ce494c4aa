"""What goes into a simulation and what comes out: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PREFIX_BLOCK = 16
"""Prompt tokens that one entry of ``Arrival.prefix`` stands for, in simulations."""

Outcome = Literal["finished", "refused", "cut", "cancelled", "unfinished"]
"""``refused``: at the door, with 429. ``cut``: never sent, because an earlier call of its interaction was refused.
``cancelled``: its caller left. ``unfinished``: still waiting or running when the run ended."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload, as the world makes it: the scheduler never sees ``num_output``."""

    request_id: str
    arrival_s: float
    """Seconds from the start of the run."""
    client: str
    """May be a path: organisation/team/user."""
    num_input: int
    num_output: int
    """Tokens that it generates unless somebody stops it (>= 1)."""
    max_output: int
    """What it asks for, OpenAI's max_tokens: the output ends there even if ``num_output`` is more."""
    weight: float = 1.0
    application: str = ""
    interaction: str = ""
    """Interaction id; empty for a request that stands alone."""
    call_index: int = 0
    """Position of the call in its interaction, from 0."""
    prefix: tuple[int, ...] = ()
    """Hashes of the prompt's leading blocks of ``PREFIX_BLOCK`` tokens; equal leading hashes mean equal text."""
    cancel_after: int | None = None
    """Its caller leaves after that many output tokens (0: as soon as it is started); None: never."""
    ingress: int | None = None
    """Which ingress it arrives at; None leaves it to the scenario."""

    @property
    def length(self) -> int:
        """Output tokens that it makes when nobody cancels it."""
        return min(self.num_output, self.max_output)


@dataclass(slots=True)
class RequestRecord:
    """What became of one request. Times are seconds from the start of the run; None: it never got there."""

    arrival: Arrival
    outcome: Outcome = "unfinished"
    granted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    """The last token, or when it was refused or cancelled."""
    num_input: int = 0
    """Input tokens charged (an abort in the middle of the prompt gives the rest back)."""
    num_cached: int = 0
    num_output: int = 0
    """Output tokens made."""
    replica: str = ""
    reason: str = ""
    """Of a refusal: ``Refused.reason``."""


@dataclass(slots=True)
class RunRecord:
    """One run: a scenario under one policy with one seed."""

    scenario: str
    policy: str
    seed: int
    duration_s: float
    """Length of the run: measures look at [0, duration_s]."""
    requests: list[RequestRecord] = field(default_factory=list)
    """In order of arrival."""
    worst_gap: float = 0.0
    """Largest difference of delivered service / weight of two clients over an interval in which both wait."""
    bound: float = 0.0
    """2 (U + S) as measured; see fairness/bounds.py. Meaningful under counter policies only."""
    unit: float = 0.0
    staleness: float = 0.0
    busy_s: float = 0.0
    """Replica-seconds spent in steps."""
    idle_while_waiting_s: float = 0.0
    """Replica-seconds without a step while some request waited anywhere: idle capacity."""
    num_replicas: int = 1
    num_steps: int = 0
    num_preempted: int = 0
    num_recomputed: int = 0
    """Tokens computed again after a preemption."""
    num_lifts: int = 0
    num_lapsed: int = 0
    num_wasted_tokens: int = 0
    """Tokens spent on interactions that were cut later."""
    service: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """(time, client -> service / weight delivered since the start), a sample now and then, for charts."""
    wall_s: float = 0.0
    """How long the simulation took."""
