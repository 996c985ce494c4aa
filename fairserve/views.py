"""What people and programs get to see of a running service: the answers of the counter actor, typed.

The same values everywhere: ``fairserve.connect()`` returns them, ``/admin/v1`` sends them as JSON, the dashboard and
``fairserve top`` draw them. Times are Unix seconds (``time_s``), ages and waits seconds, amounts of service in units of
the cost function; a *lead* is service / weight above the least counter among clients that wait or run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fairserve.config import Budgets


class View(BaseModel):
    """A frozen answer. Unknown fields are ignored, so that an older client can read a newer service."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class BudgetView(View):
    """One budget of tokens, and what is used of it."""

    of: str
    """The client, or a group above it."""
    is_group: bool = False
    window: Literal["minute", "day", "month"]
    soft: int | None = None
    hard: int | None = None
    used: int
    promised: int
    """To requests under way."""
    resets_s: float
    """Unix time at which the window ends."""


class ModelView(View):
    """One of the models that a service serves, each with a queue and counters of its own."""

    name: str
    slot: str
    """What it is called in the names of its deployment, files and metrics; "" for the first."""
    price: float
    """What a unit of its service counts where models are compared."""
    is_compared: bool = False
    """Service by the other models counts at it, too (across_models)."""


class ClientView(View):
    """One client."""

    name: str
    weight: float
    """In force: as set live, else as its key says."""
    is_paused: bool = False
    """Its requests wait and none is granted."""
    max_waiting: int | None = None
    """Set live; null: as its key or the configuration says."""
    requests_per_min: int | None = None
    """Set live: requests accepted in any 60 s; null: no such limit."""
    counter: float
    lead: float
    """Counter above the least counter among clients that wait or run; 0 when nobody does."""
    waiting: int
    """Requests in the cluster's queue."""
    running: int
    """Requests granted and not finished."""
    oldest_wait_s: float
    """How long its oldest waiting request has waited; 0 without one."""
    mean_wait_s: float
    """Mean wait from arrival to grant, of late (time constant 30 s)."""
    service: float
    """Service received since counting began, not divided by weight."""
    service_per_s: float
    """Over the last 10 s."""
    num_input: int
    num_cached: int
    num_output: int
    num_refused: int = 0
    last_active_s: float | None = None
    """Unix time at which it last had a request; null: not since this actor began."""
    budgets: tuple[BudgetView, ...] = ()
    """That hold for it, its groups' too."""


class CounterView(View):
    """One client's counter and what it is compared by."""

    name: str
    weight: float
    counter: float
    lead: float


class ReplicaView(View):
    """One model replica."""

    name: str
    state: Literal["live", "stale", "draining"]
    """stale: no report for ``dispatch.replica_stale_s``. draining: it is being stopped: it
    finishes what it runs and is granted nothing more."""
    report_age_s: float
    running: int
    waiting: int
    """In its own queue."""
    max_slots: int
    free_kv_tokens: int
    kv_capacity_tokens: int
    granted_unconfirmed: int
    tokens_per_s: float
    """Input and output tokens merged from it, over the last 10 s."""


class RouterView(View):
    """One router: an ingress process that submits requests."""

    name: str
    requests: int
    """Of this router, waiting or granted and not finished."""
    call_age_s: float


EventKind = Literal[
    "started",  # the counter actor began; text says with what it restored
    "joined",  # a replica's first report
    "lost",  # a replica is gone, or a router
    "draining",  # a replica is being stopped, or has finished what it had
    "lifted",  # an idle client came back and was raised to the level
    "throttled",  # an interaction was refused under overload
    "refused",  # a request was refused for another reason
    "preempted",  # a request was granted over a full replica, so that another gives way
    "lapsed",  # a grant that no replica confirmed
    "overload",  # overload began or ended
    "changed",  # somebody changed weights, limits, keys or settings
]


class EventView(View):
    """Something worth telling. Equal ones close together are told once, with ``count``."""

    seq: int
    """Rises; ask for those after the last one seen."""
    time_s: float
    kind: EventKind
    text: str
    """One sentence, for people."""
    client: str | None = None
    replica: str | None = None
    count: int = 1


class Verdict(View):
    """Is the service fair now?"""

    is_fair: bool
    """The gap lies within the bound."""
    text: str
    """One sentence that says so, with the numbers."""
    gap: float
    """Widest difference of service / weight among clients that wait now, since both wait (at most 64 are compared)."""
    gap_pair: tuple[str, str] | None = None
    """Who is ahead, who is behind."""
    worst_gap: float
    """The widest that it has been since the actor began, or settings changed."""
    bound: float
    """What the proof allows it to be."""
    jain: float
    """Jain's index of service / weight over the last 60 s among clients that waited throughout: 1 is even."""
    num_backlogged: int
    """Clients that wait now."""


class Overview(View):
    """The service at a glance, rebuilt at most once a second."""

    time_s: float
    built_in_s: float
    """CPU seconds that building it took inside the actor."""
    epoch: int
    started_s: float
    """When this life of the actor began."""
    policy: str
    prediction: str
    model: str
    is_overloaded: bool
    verdict: Verdict
    waiting: int
    running: int
    routers: tuple[RouterView, ...]
    replicas: tuple[ReplicaView, ...]
    tokens_per_s: float
    service_per_s: float
    num_clients: int
    """All that are known."""
    num_granted: int
    num_refused: int
    num_throttled: int
    num_lifts: int
    num_preempted: int
    num_lapsed: int
    clients: tuple[ClientView, ...]
    """The busiest, by service of the last 10 s, then by waiting requests."""
    others: ClientView | None
    """All further clients summed, named "other"; null when there is none."""
    events: tuple[EventView, ...]
    """The newest 50, newest first."""


class ClientPage(View):
    """Some of the clients."""

    total: int
    """That match."""
    offset: int
    clients: tuple[ClientView, ...]


ClientOrder = Literal["name", "service", "service_per_s", "waiting", "running", "lead", "weight"]


class Series(View):
    """One client over time; the lists are as long as ``History.times_s``, null where nothing is known."""

    service: tuple[float | None, ...]
    """Received since counting began, not divided by weight: differences are rates."""
    waiting: tuple[float | None, ...]
    lead: tuple[float | None, ...]


class History(View):
    """Clients over time."""

    resolution_s: Literal[1, 60]
    times_s: tuple[float, ...]
    clients: dict[str, Series]


class KeyView(View):
    """One API key, without its secret."""

    id: str
    """First 12 hex digits of its SHA-256: names the key in logs and commands."""
    client: str
    weight: float
    max_waiting: int | None = None
    applications: tuple[str, ...] = ()
    budgets: Budgets = Budgets()
    source: Literal["live", "deployed"] = "live"
    """live: created through the admin API or the CLI. deployed: of the configuration, and revoked by taking it out."""
    created_s: float | None = None


class NewKey(View):
    """A key that was just made."""

    model_config = ConfigDict(hide_input_in_errors=True)

    secret: Annotated[str, Field(repr=False)]
    """Shown this once and kept nowhere."""
    key: KeyView


class SettingView(View):
    """One setting that can be changed live."""

    path: str
    """Such as fairness.quantum."""
    value: Any
    """In force."""
    deployed: Any
    """What the deployment says."""
    is_live: bool
    """It was changed live."""


class AuditView(View):
    """One change: who, when, what, before, after."""

    seq: int
    time_s: float
    who: str
    action: Literal["client", "settings", "key.create", "key.revoke", "counters.import"]
    target: str
    before: dict[str, Any]
    after: dict[str, Any]


class ClientChange(BaseModel):
    """Fields that are left out stay; null takes a live setting back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    is_paused: bool = False
    max_waiting: Annotated[int, Field(gt=0, lt=2**63)] | None = None
    requests_per_min: Annotated[int, Field(gt=0, lt=2**63)] | None = None
    budgets: Budgets | None = None
    """In place of those of its key, all of them; an empty object: none."""


UsagePeriod = Literal["day", "hour"]


class UsageView(View):
    """What one client used on one day, UTC, or in one hour."""

    client: str
    """"" for clients beyond the number that is kept."""
    period_start: str
    """Such as 2026-11-21T00:00:00Z."""
    requests: int
    """Sequences accepted: a request with n = 3 is three."""
    input_tokens: int
    cached_tokens: int
    """Part of input_tokens that came from the prefix cache."""
    output_tokens: int
    service: float
    """In units of the cost function."""
    model: str = ""
