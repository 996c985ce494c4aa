"""The whole configuration as one pydantic model; ``fairserve config`` prints it.

Every field carries its unit and default in its description. Unknown fields are refused with the nearest known name.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EMBEDDED_MODEL = "smollm2-135m-instruct"
GOODBYE_S = 15.0
"""A replica that has nothing left to run may still take this long to end: Serve looks every 2 s, the engine's last step
may take 10 s, and the last report 1 s."""

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
CLIENT_SEGMENT = "[A-Za-z0-9._:@-]{1,64}"
GroupName = Annotated[str, Field(pattern=f"^{CLIENT_SEGMENT}(/{CLIENT_SEGMENT})?$")]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/@-]{1,128}$")]


class Strict(BaseModel):
    """Refuses unknown fields, and names the nearest known one."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # the input may hold an API key
    )

    renamed: ClassVar[dict[str, str]] = {}
    """Former names of fields -> names."""
    holds_secret: ClassVar[bool] = False
    """An unknown field is not named: whoever writes {secret: client} has made the secret a field name."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    former = [cls.renamed[name]] if name in cls.renamed else []
                    near = former or difflib.get_close_matches(str(name), cls.model_fields, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(cls.model_fields)}"
                    shown = "of the given name" if cls.holds_secret else repr(name)
                    raise ValueError(f"{cls.__name__} has no field {shown}: {hint}")
        return data


class CostConfig(Strict):
    """How tokens become service, the unit that clients are compared in (VTC section 3.1)."""

    kind: Literal["weighted_tokens", "profiled_quadratic", "kv_token_time"] = "weighted_tokens"
    """weighted_tokens: input_weight * n_in + output_weight * n_out. profiled_quadratic: VTC's fitted milliseconds
    (appendix B). kv_token_time: n_in * n_out + n_out^2 / 2, the memory held over time."""
    input_weight: PositiveFloat = 1.0
    """Service of one computed input token (w_p)."""
    output_weight: PositiveFloat = 2.0
    """Service of one output token (w_q)."""
    cached_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Service of an input token found in the prefix cache, as a fraction of a computed one."""


class Budget(Strict):
    """Tokens of one window: input (cached input, too) and output, as `usage` counts them, of every sequence."""

    soft: PositiveInt | None = None
    """Past it, requests are served by fairness.soft_budget_weight of the weight. null: none."""
    hard: PositiveInt | None = None
    """A request that it has no room for is refused with 429 and code insufficient_quota. null: none."""

    @model_validator(mode="after")
    def _soft_below_hard(self) -> Self:
        if self.soft is None and self.hard is None:
            raise ValueError("give 'soft', 'hard' or both")
        if self.soft is not None and self.hard is not None and self.soft >= self.hard:
            raise ValueError(f"soft ({self.soft}) must be below hard ({self.hard})")
        return self


class Budgets(Strict):
    """Budgets of tokens, each of a calendar window of UTC."""

    minute: Budget | None = None
    day: Budget | None = None
    month: Budget | None = None

    @property
    def rows(self) -> tuple[tuple[str, int | None, int | None], ...]:
        """(window, soft, hard) of those that are given."""
        windows = (("minute", self.minute), ("day", self.day), ("month", self.month))
        return tuple([(name, one.soft, one.hard) for name, one in windows if one is not None])


class ThrottleConfig(Strict):
    """Throttling of interactions under overload (OIT): while the cluster is overloaded, whoever is past its rate may go
    on with what it has begun, and begins nothing new. Both limits null: nobody is throttled."""

    client_limit: PositiveInt | None = None
    """Requests of one client, per unit of weight, in any 60 s, past which its new interactions are refused under
    overload. A tenant with several keys or users has the limit for each. null: no limit."""
    application_limit: PositiveInt | None = None
    """The same for each registered application of each client."""
    at: Literal["pick", "arrival"] = "pick"
    """When a call that begins an interaction may be refused. pick (as published): when it is its turn and no replica
    has room for it; it may have waited until then, and fewer interactions end. arrival: as soon as it comes, so
    that its caller knows at once."""
    enter_wait_s: PositiveFloat = 2.0
    """Overload begins when requests wait longer than this in the cluster's queue (mean of late, or the one that goes
    next) and the replicas are full."""
    leave_wait_s: PositiveFloat = 0.5
    """Overload ends when they wait less than this, or the replicas are less than half as full."""
    kv_pressure: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Part of the cluster's KV cache, or of its slots, that must be taken for overload to begin."""
    hold_s: NonNegativeFloat = 1.0
    """Seconds for which either must hold before overload begins or ends."""

    @model_validator(mode="after")
    def _leaves_below_entry(self) -> ThrottleConfig:
        if self.leave_wait_s >= self.enter_wait_s:
            raise ValueError(f"leave_wait_s ({self.leave_wait_s}) must be below enter_wait_s ({self.enter_wait_s})")
        return self


class FairnessConfig(Strict):
    """Who goes next."""

    policy: Literal["vtc", "wsc", "drr", "dlpm", "d2lpm", "lcf", "fcfs", "rpm", "round_robin"] = "vtc"
    """vtc: least service first, newcomers lifted. wsc: the same in units of each application's typical request
    (FairServe). drr: a quantum of service to each client in turn. dlpm: within such a round the longest cached prefix
    first. d2lpm: dlpm, and a client stays with the replica that knows its prefixes for a quantum. lcf: vtc without the
    lift. fcfs: order of arrival. rpm: order of arrival, at most rpm_limit requests a minute per client. round_robin:
    one request of each client in turn."""
    prediction: Literal["none", "moving_mean", "foretold"] = "moving_mean"
    """What a request is charged for its output when it is picked, settled as it is generated. none: nothing.
    moving_mean: what its client's (and application's) answers have come to of late. foretold: what the request says;
    for simulations."""
    rpm_limit: PositiveInt = 60
    """Policy rpm only: accepted requests per client in any 60 s."""
    quantum: PositiveFloat = 500.0
    """Policies drr, dlpm, d2lpm: service / weight of one round. wsc: how far behind the least served a client with an
    interaction under way may stand and still go first."""
    replica_quantum: PositiveFloat = 2000.0
    """Policy d2lpm: service that a client receives on one replica before it goes elsewhere."""
    locality_window: PositiveInt = 32
    """Policies dlpm, d2lpm: clients whose first requests are compared by cached prefix."""
    group_weights: dict[GroupName, PositiveFloat] = {}
    """Weight of an organisation among organisations ("acme") or of a team within its organisation ("acme/research"),
    for clients whose names are paths. 1 where nothing is said."""
    group_budgets: dict[GroupName, Budgets] = {}
    """Budgets of tokens of an organisation ("acme") or a team ("acme/research"): for all its clients together."""
    soft_budget_weight: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What the weight of a client, or group, counts while a soft budget of its is passed, as a fraction."""
    expected_service: dict[str, PositiveFloat] = {}
    """Policy wsc: service of a typical request by application, where it is known; the others are learned."""
    cost: CostConfig = CostConfig()
    throttle: ThrottleConfig = ThrottleConfig()


class DispatchConfig(Strict):
    """When and where waiting requests are granted, and how many may wait."""

    lookahead: Annotated[int, Field(ge=0)] = 1
    """Requests granted to a replica beyond its running slots, so that a freed slot is refilled without a round
    trip to the counter actor. `benchmarks.lookahead` measures it: 1 is the smallest that keeps replicas busy."""
    reserve_output_tokens: Annotated[int, Field(ge=0)] | None = 128
    """KV tokens reserved at the grant for the output of a request: min(max_tokens, this). A request that outgrows it
    may be preempted and recomputed (never charged twice). null reserves all of max_tokens: then a replica never runs
    out of KV blocks, at the price of a smaller batch."""
    max_waiting: PositiveInt = 10_000
    """Requests that may wait in the whole cluster; more are refused with 429. A client that has less than an equal
    share of them waiting may still add, up to twice as many in all: a flood does not shut the others out."""
    max_waiting_per_client: PositiveInt = 2_000
    """Requests of one client that may wait; a key may set its own limit."""
    max_clients: PositiveInt = 100_000
    """Idle clients that are remembered, with what they were served. Beyond, they are forgotten, first those whose
    counters are least ahead of the others': what that may forgive, `fairserve/dispatch/forgetting.py` says. Clients
    that wait, run or are set live are never forgotten. Where callers have API keys, keep it above their number."""
    lease_s: PositiveFloat = 5.0
    """Seconds until a grant that no replica has confirmed lapses: charge returned, request back in its place."""
    replica_stale_s: PositiveFloat = 5.0
    """Seconds without a report after which a replica is granted nothing more."""
    replica_dead_s: PositiveFloat = 20.0
    """Seconds without a report after which the grants of a replica are taken back."""
    router_dead_s: PositiveFloat = 20.0
    """Seconds without a call after which the waiting requests of a router are dropped."""
    preempt_gap: PositiveFloat | None = None
    """Service / weight by which a running client must be ahead of the least served waiting one for its youngest request
    to give way: it is put back, recomputed later and never charged twice. null: whoever runs, runs to its end."""
    prefix_block_tokens: PositiveInt = 64
    """Policies dlpm, d2lpm: tokens of a prompt that are compared as one block."""


class CounterConfig(Strict):
    """The counter actor, and how routers and replicas reach it."""

    renamed = {"snapshot_path": "store"}

    name: str = "fairserve-counters"
    """Name of the counter actor in its Ray namespace; two services on one cluster need two names."""
    namespace: str = "fairserve"
    """Ray namespace of the counter actor."""
    call_timeout_s: Annotated[float, Field(gt=0, le=10)] = 0.8
    """Seconds any call to the counter actor may take; then it counts as unreachable."""
    poll_s: Annotated[float, Field(gt=0, le=10)] = 0.4
    """Seconds a long poll for grants stays open when there is nothing to grant; below call_timeout_s."""
    heartbeat_s: Annotated[float, Field(gt=0, le=10)] = 0.5
    """Seconds between reports of an idle replica."""
    reports_per_node: Literal["each", "one"] = "each"
    """each: every replica reports to the counter actor by itself. one: replicas that share a node report together, by
    way of a small actor there, with one call every 20 ms: less CPU of the counter actor, for 1 ms of the node's for a
    report and some 20 ms more until it knows. Only where the nodes have CPUs to spare (`benchmarks.control`)."""
    store: Annotated[str, Field(min_length=1)] | None = "session"
    """Where counters, history, what was changed live and who changed it outlive the actor. A path: SQLite file on the
    node of the actor. session: the same in Ray's session directory, which does not outlive the Ray cluster.
    redis://HOST:PORT/DB or rediss:// (TLS; ?ssl_ca_certs=FILE): Redis, which clusters may share to be fair together;
    its password in FAIRSERVE_REDIS_PASSWORD, or in the file FAIRSERVE_REDIS_PASSWORD_FILE, where the actor runs. null:
    nowhere: a restarted actor still knows what was changed live, counts from the totals of the living replicas, and all
    counters begin level."""
    snapshot_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Seconds between snapshots of the counters, and between exchanges with clusters that share a Redis."""
    usage_days: Annotated[int, Field(ge=31, le=400)] = 93
    """Days for which what each client used is kept, for `fairserve usage export`; a budget of a month needs 31."""
    usage_hour_days: Annotated[int, Field(ge=0, le=31)] = 7
    """Days for which it is kept by hour, too: a row for each client and each hour in which it asked, so 24 times the
    rows of a day where clients ask around the clock, in memory and in the store. At 200,000 rows the hours of the
    oldest day go before their time. 0: by day only."""
    usage_clients: PositiveInt = 10_000
    """Clients of one day that are counted by name; what further ones used is summed, but for those with a budget."""
    decision_log_path: str | None = None
    """File for every decision, one JSON line each, on the node of the actor; `fairserve simulate --replay` reads it.
    It names clients and lengths, no text. At 100 MB it begins anew and the last one is kept as FILE.1. null: none."""
    idle_ttl_s: PositiveFloat = 600.0
    """Seconds without any replica and router after which the actor ends itself (`serve delete` does not end it)."""
    pin_to_head: bool = True
    """Keep the actor on the head node, as Ray Serve keeps its controller. Without effect where `resource` is given."""
    resource: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.:-]{0,62}$")] | None = None
    """Custom Ray resource: the actor runs only on a node that offers it, and waits for one. With Ray's GCS fault
    tolerance an actor off the head node lives through a restart of the head. null: pin_to_head decides."""

    @property
    def is_in_redis(self) -> bool:
        return self.store is not None and "://" in self.store

    def of_slot(self, slot: str) -> CounterConfig:
        """Of one of several models: names and files of its own, but for the first. The actor is the same."""
        if not slot:
            return self
        kept = {"name": f"{self.name}.{slot}"}
        for field in ("store", "decision_log_path"):
            place: str | None = getattr(self, field)
            if place not in (None, "session") and "://" not in place:
                path = Path(place)
                kept[field] = str(path.with_name(f"{path.stem}.{slot}{path.suffix}"))
        return self.model_copy(update=kept)

    @field_validator("store")
    @classmethod
    def _is_place(cls, store: str | None) -> str | None:
        if store is None or "://" not in store:
            return store
        parts = urlsplit(store)
        if parts.scheme not in ("redis", "rediss"):
            raise ValueError("a URL must begin with redis:// or rediss://; anything else is a path, session or null")
        if parts.password is not None:
            raise ValueError("the URL holds a password: give it in FAIRSERVE_REDIS_PASSWORD or a file instead")
        host, _, query = store.partition("?")
        if not re.fullmatch(r"rediss?://([^/@:]+@)?([^/@:\[\]]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[0-9]*)?", host):
            raise ValueError("a Redis URL reads redis://HOST:PORT/DB, where DB is a number")
        if query and (parts.scheme == "redis" or not re.fullmatch(r"ssl_ca_certs=[^&]+", query)):
            raise ValueError("a Redis URL has no options but ?ssl_ca_certs=FILE, of rediss://")
        return store

    @model_validator(mode="after")
    def _poll_below_timeout(self) -> CounterConfig:
        if self.poll_s >= self.call_timeout_s:
            raise ValueError(f"poll_s ({self.poll_s}) must be below call_timeout_s ({self.call_timeout_s})")
        return self


class EngineConfig(Strict):
    """The engine of one replica."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees a GPU, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the model's own type on a GPU, float32 on a CPU."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """auto: xformers on CUDA where it is installed, else torch's scaled dot product attention."""
    cpu_linear: Literal["auto", "eager", "packed", "fused", "int8"] = "auto"
    """CPU only. packed: oneDNN-packed weights, with q, k, v and gate, up fused where the model has them. fused: packed,
    and all between the products in few operations too (Llama, Mistral, Qwen2, Qwen3 in float32). int8: fused, with
    weights of 8 bits: faster, and answers differ. auto: fused where the model is one of these, else packed where it
    works, else eager."""
    tensor_parallel_size: PositiveInt = 1
    """Processes over which one replica spreads its model, each with `num_cpus_per_replica` and `num_gpus_per_replica`,
    all on one node. It must divide the model's attention heads and KV heads. Above 1, cpu_linear is eager."""
    max_model_len: PositiveInt | None = None
    """Tokens of prompt and output together that one request may hold. null: the model's own context length."""
    max_num_seqs: PositiveInt = 16
    """Requests that run at the same time on one replica."""
    max_num_batched_tokens: PositiveInt = 256
    """Tokens one step may compute: every running request's next token first, then prompt chunks."""
    kv_cache_tokens: PositiveInt | None = None
    """Tokens the KV cache of one replica holds; max_model_len is cut to it where it is smaller. null: enough for
    min(max_num_seqs, 8) requests of max_model_len on a CPU, as far as a quarter of the free memory holds them; for
    max_num_seqs of them on a GPU, as far as gpu_memory_fraction leaves room."""
    block_size: PositiveInt = 16
    """Tokens in one KV block; rounded up to what the attention needs (64 with xformers)."""
    prefix_cache: bool = True
    """Keep what finished requests left in the KV cache until its blocks are needed: a request that begins with the same
    tokens (a system prompt, a chat's next turn) does not compute them again. fairness.cost.cached_fraction says what
    they cost."""
    prefix_cache_scope: Literal["client", "team", "organisation", "replica"] = "client"
    """Whose requests may find each other's tokens. Whoever shares can tell from the time to the first token whether a
    text was sent before. team, organisation: clients whose names are paths (organisation/team/user); others share with
    nobody. replica: everybody."""
    pooling: Literal["off", "mean", "last"] = "off"
    """How /v1/embeddings makes one vector of a prompt's last hidden states. mean: of all its tokens. last: its last
    token's, and what the prefix cache holds is not computed again. off: there are no embeddings."""
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """GPU only: part of the memory used for weights and KV cache together."""
    num_threads: PositiveInt | None = None
    """Torch threads of one replica on a CPU. null: cores of the machine / num_replicas, at least 1."""
    cpu_nice: Annotated[int, Field(ge=0, le=19)] = 0
    """CPU only: added to the niceness of the threads that compute, so that proxy, routers and counter actor on the same
    machine need not wait behind them. Linux."""
    max_step_s: PositiveFloat | None = None
    """Seconds that a step with running streams should take at most: fewer prompt tokens are computed beside them where
    measured step times say so, at least 16. Shorter gaps between tokens for a longer wait for the first. null: as many
    as max_num_batched_tokens allows."""
    step_timeout_s: PositiveFloat | None = 300.0
    """Seconds after which a step counts as stuck: the replica fails its health check, Serve replaces it, and its
    requests fail. null: never."""
    seed: int = 0
    """Seed for requests that bring none; the k-th such request of a replica gets seed + k."""
    trust_remote_code: bool = False
    """Run Python code that a model repository brings along. Only for repositories you trust."""
    adapters: dict[AdapterName, Annotated[str, Field(min_length=1)]] = {}
    """LoRA adapters of the model: name -> local folder or hub id, in peft's format (adapter_config.json and
    adapter_model.safetensors). Requests with different ones, and with none, run in one batch; who names an adapter as
    "model" gets it. Names: 1-128 of A-Z a-z 0-9 . _ : / @ -. Not with tensor_parallel_size above 1."""

    @model_validator(mode="after")
    def _adapters_in_one_process(self) -> Self:
        if self.adapters and self.tensor_parallel_size > 1:
            raise ValueError(
                f"adapters are served with tensor_parallel_size 1 only, not {self.tensor_parallel_size}: serve the "
                "model in one process, or merge an adapter into its weights (peft's merge_and_unload)"
            )
        return self

    @field_validator("pooling", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML's own reading of a plain off


def key_digest(secret: str) -> str:
    """SHA-256 of an API key, as 64 hex digits: the only form in which a key is kept."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _check_one_secret(whose: str, key: str | None, key_sha256: str | None) -> None:
    if (key is None) == (key_sha256 is None):
        raise ValueError(f"{whose}: give exactly one of 'key' and 'key_sha256'")


def _digest_of(key: str | None, key_sha256: str | None) -> str:
    if key_sha256 is not None:
        return key_sha256
    assert key is not None, "exactly one of the two is given"
    return key_digest(key)


CLIENT_PATH = f"{CLIENT_SEGMENT}(/{CLIENT_SEGMENT}){{0,2}}"
BATCH_MARK = "+batch"
"""Behind a client's name: the client that its batches run as. No key can name one, because no segment holds a +."""
COUNTED_PATH = rf"{CLIENT_PATH}(\+(batch|flex|priority|scale))?"
"""Whom the counter actor counts: clients, and what their batches and service tiers run as."""
OF_CLIENT = ("weight", "max_waiting", "budgets", "sub_clients")
"""Fields of :class:`ApiKey` that all keys of a client must say alike."""
ServiceTier = Literal["flex", "priority", "scale"]
"""OpenAI's names; "auto" and "default" are every client's."""
CLIENT_RULE = "up to three segments joined by /, each 1-64 of A-Z a-z 0-9 . _ : @ -"


class ApiKey(Strict):
    """One client. Exactly one of ``key`` and ``key_sha256`` is given."""

    holds_secret = True

    client: Annotated[str, Field(pattern=f"^{CLIENT_PATH}$")]
    """The client this key names, flat or a path: user, organisation/user or organisation/team/user, each segment 1-64
    of A-Z a-z 0-9 . _ : @ -. Several keys may name one client. No client may stand above another: with acme/ann there
    is no client acme."""
    key: Annotated[str | None, Field(min_length=8, max_length=512, repr=False)] = None
    """The secret in clear, for development: hashed as soon as it is read. Prefer key_sha256."""
    key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the secret, as 64 hex digits: `fairserve keys hash` prints it."""
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    """The client's share relative to others. Keys of one client must agree."""
    max_waiting: PositiveInt | None = None
    """Requests of this client that may wait. null: max_waiting_per_client."""
    budgets: Budgets = Budgets()
    """Tokens that the client may use, such as {day: {hard: 1000000}}. Keys of one client must agree."""
    applications: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")], ...] = ()
    """Application labels that callers with this key may send (X-Fairserve-Application), each 1-64 of
    A-Z a-z 0-9 . _ : -. A label changes how service is compared under policy wsc, so callers do not choose it freely:
    any other is refused, and the first also holds for callers who send none. With none here, labels are ignored."""

    service_tiers: tuple[ServiceTier, ...] = ()
    """Tiers of api.service_tiers that callers with this key may ask for. Requests of a tier are a client of their own,
    CLIENT+TIER, beside CLIENT, with its weight times the tier's."""
    sub_clients: bool = False
    """The ``user`` of a request becomes the last segment of the client's name, CLIENT/USER, and each user has a fair
    share within CLIENT, and its own counter, weight and max_waiting; the share of CLIENT as a whole is
    fairness.group_weights[CLIENT]. Whoever names no user is CLIENT/no-user. CLIENT has at most two segments. Users are
    believed: they are as many as the callers say, and dispatch.max_clients bounds how many are remembered."""

    @model_validator(mode="after")
    def _has_room_for_users(self) -> ApiKey:
        if self.sub_clients and self.client.count("/") > 1:
            raise ValueError(f"client {self.client!r} has three segments, so its users can have none (sub_clients)")
        return self

    @model_validator(mode="after")
    def _applications_differ(self) -> ApiKey:
        if len(set(self.applications)) < len(self.applications):
            raise ValueError(f"client {self.client!r}: 'applications' names one application twice")
        return self

    @model_validator(mode="after")
    def _one_secret(self) -> ApiKey:
        _check_one_secret(f"client {self.client!r}", self.key, self.key_sha256)
        return self

    @property
    def digest(self) -> str:
        """``key_sha256``, or the same made from ``key``."""
        return _digest_of(self.key, self.key_sha256)


class AdminKey(Strict):
    """Somebody who may look at everything and change it. Exactly one of ``key`` and ``key_sha256`` is given."""

    holds_secret = True

    name: Annotated[str, Field(pattern=f"^{CLIENT_SEGMENT}$")]
    """Who it is, in the audit log: 1-64 of A-Z a-z 0-9 . _ : @ -. One may have several keys."""
    key: Annotated[str | None, Field(min_length=8, max_length=512, repr=False)] = None
    """The secret in clear, for development: hashed as soon as it is read. Prefer key_sha256."""
    key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the secret, as 64 hex digits: `fairserve keys hash` prints it."""

    @model_validator(mode="after")
    def _one_secret(self) -> AdminKey:
        _check_one_secret(f"admin {self.name!r}", self.key, self.key_sha256)
        return self

    @property
    def digest(self) -> str:
        """``key_sha256``, or the same made from ``key``."""
        return _digest_of(self.key, self.key_sha256)


class ApiConfig(Strict):
    """The HTTP door: who may come in, and how much one request may ask for."""

    keys: tuple[ApiKey, ...] = ()
    """API keys. With no key here, in keys_file and in the environment (FAIRSERVE_API_KEYS, the same JSON list),
    the service runs OPEN: anybody may call, and the bearer token, unchecked, names the client. A key that is created
    while the service runs closes it within about a second, and it stays closed."""
    admin_keys: tuple[AdminKey, ...] = ()
    """Keys that open /admin, together with those in the environment (FAIRSERVE_ADMIN_KEYS, the same JSON list). With
    none, everybody may look at an OPEN service and nobody may change it; of a service with API keys nobody sees
    anything."""
    keys_file: str | None = None
    """JSON or YAML file with a list of keys, read at start on every ingress replica."""
    trusted_client_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] | None = None
    """Header in which a gateway in front names the client, such as X-Client-Id. It is believed only from callers
    with a valid key of a client listed in trusted_gateways. null: never."""
    trusted_gateways: tuple[str, ...] = ()
    """Clients (by name) that may name another client in trusted_client_header, and any application:
    what its own callers send in these headers a gateway must take out."""
    max_body_bytes: PositiveInt = 2_000_000
    """Bytes one request body may hold; more is refused with 413."""
    read_timeout_s: PositiveFloat = 30.0
    """Seconds in which a request body must come whole; then the request ends with 408."""
    max_choices: PositiveInt = 128
    """Largest number of sequences one request may ask for: prompts times n."""
    default_max_tokens: PositiveInt | None = None
    """max_tokens of a request that names none. null: 16 for completions (OpenAI's default); for chat what is left
    of the context."""
    tool_format: Literal[
        "auto",
        "glm4",
        "granite",
        "hermes",
        "llama3_json",
        "mistral",
        "nemotron",
        "olmo3",
        "phi4_mini",
        "pythonic",
        "qwen3_coder",
        "seed_oss",
    ] = "auto"
    """How the model writes calls of functions (`fairserve/api/tool_formats.py`). auto: as its chat template shows; a
    model whose template shows none of these has no tools."""
    service_tiers: dict[ServiceTier, PositiveFloat] = {}
    """Tier -> factor on the weight of a client whose key may ask for it, such as {flex: 0.5, priority: 2}. Whatever
    else is asked for is served as "default"."""
    keep_alive_s: PositiveFloat | None = 10.0
    """A stream that has begun and says nothing for so long, or up to twice as long, gets a comment, which clients skip:
    what stands between takes a silent connection for a dead one. null: none."""
    request_timeout_s: PositiveFloat = 3600.0
    """Seconds that a request, once read and tokenized, may wait and run; then it is cancelled."""
    multiplex: bool = True
    """Tokens that one step of a replica makes for all requests of one ingress travel as one message. false: each
    request's as one of its own, which costs several times the CPU at many streams."""
    retry_on_replica_death: bool = False
    """Continue a request whose replica died on another one, behind the tokens that its caller already has: a stream
    pauses, and goes on. Greedy and seeded output are what one replica would have made (as far as two replicas round
    alike); without a seed, another valid sample. The tokens computed again are charged like cached input
    (fairness.cost.cached_fraction), and `usage` counts the prompt once. false: such a stream ends with an error event,
    and a request without a byte sent gets 503. A request that had not started is sent elsewhere in any case."""
    max_replica_deaths: PositiveInt = 1
    """Replicas that may die under one request before its caller is told: 1 allows one more try. What kills the replicas
    that it comes to (a poison request) kills at most one more than this."""

    @model_validator(mode="after")
    def _header_and_gateways_together(self) -> ApiConfig:
        if (self.trusted_client_header is None) != (not self.trusted_gateways):
            raise ValueError(
                "trusted_client_header and trusted_gateways have an effect only together: give both or none"
            )
        return self


class BatchesConfig(Strict):
    """Offline jobs, /v1/files and /v1/batches: kept in a folder, run by the ingress as a client of low weight."""

    directory: Annotated[str, Field(min_length=1)] | None = None
    """Folder for uploaded files, batches and their results. With ingress replicas on several nodes it must be one that
    all of them share, on a file system with hard links (NFS, CephFS, EFS; not a mounted object store). null: /v1/files
    and /v1/batches answer 404."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of a client's batches, as a part of the client's own. They run as CLIENT+batch, beside it: what they get
    is counted apart and leaves the client's own share alone."""
    max_running: PositiveInt = 16
    """Lines of one batch that wait or run at the same time."""
    max_lines: Annotated[int, Field(gt=0, le=1_000_000)] = 50_000
    """Lines of one batch."""
    max_file_bytes: PositiveInt = 200_000_000
    """Bytes of one uploaded file; more is refused with 413."""
    max_client_bytes: PositiveInt = 2_000_000_000
    """Bytes of all files of one client, results included; beyond, uploads are refused."""
    max_client_files: PositiveInt = 1_000
    """Files of one client, results included; beyond, uploads are refused."""
    max_client_batches: PositiveInt = 100
    """Batches of one client that are not finished."""
    keep_s: Annotated[float, Field(ge=3600, le=366 * 86_400)] = 30 * 86_400.0
    """Seconds until a file expires that names no earlier time, and until a finished batch is forgotten."""
    upload_timeout_s: PositiveFloat = 600.0
    """Seconds in which an uploaded file must come whole; then the request ends with 408."""
    lease_s: Annotated[float, Field(ge=3, le=600)] = 15.0
    """Seconds without a sign of life after which another ingress replica goes on with a batch."""


class AutoscalingConfig(Strict):
    """How many model replicas there are, by the work of the whole cluster (``fairserve/dispatch/demand.py``). A
    *batchful* is what one replica can run at once: its slots or its KV cache, whichever is taken first."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """Fewest replicas. 0: with nothing to do the last one ends, and the first request waits for a new one to load."""
    max_replicas: PositiveInt
    """Most replicas."""
    target_use: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Part of the replicas' slots or KV cache that running requests are to take."""
    replicas_per_waiting_batch: PositiveFloat = 0.5
    """Replicas added for each batchful that waits. 1 empties the queue within about one generation."""
    upscale_delay_s: NonNegativeFloat = 5.0
    """Seconds for which more must be wanted before replicas start."""
    downscale_delay_s: NonNegativeFloat = 120.0
    """Seconds for which less must be wanted before replicas end. What they run is finished first."""
    downscale_to_zero_delay_s: NonNegativeFloat | None = None
    """The same for the last replica. null: downscale_delay_s."""

    @model_validator(mode="after")
    def _min_below_max(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) must not be above max_replicas ({self.max_replicas})")
        return self


class MetricsConfig(Strict):
    """Metrics for Prometheus, through Ray's own exporter; `python -m fairserve.observe.metrics` lists them."""

    enabled: bool = True
    """Export metrics."""
    top_clients: Annotated[int, Field(gt=0, le=100)] = 20
    """Clients that have a label of their own at a time: the busiest of late. All others are summed as "other"."""
    interval_s: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Seconds between two updates of what is not measured per request. Ray itself exports every 10 s, and forgets
    what was not updated for 20 s."""


class TracingConfig(Strict):
    """OpenTelemetry spans of single requests. Needs `pip install 'fairserve[otel]'`; where they go and how many are
    kept, the standard OTEL_ environment variables say, on every node."""

    enabled: bool = False
    """Record spans, and take over a caller's traceparent header."""


class ModelArgs(Strict):
    """One served model: its replicas and their engines."""

    model: str = EMBEDDED_MODEL
    """The embedded model's name, a local folder, or a hub id: anything transformers loads as a causal LM."""
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    """Name clients use in "model". null: the last part of model."""
    num_replicas: PositiveInt = 2
    """Model replicas, each with its own engine; with autoscaling, those to begin with."""
    autoscaling: AutoscalingConfig | None = None
    """Let the number of model replicas follow the work. null: always num_replicas."""
    num_cpus_per_replica: NonNegativeFloat = 0.5
    """Ray CPUs that one model replica reserves."""
    num_gpus_per_replica: NonNegativeFloat = 0.0
    """Ray GPUs that one model replica reserves."""
    price: PositiveFloat = 1.0
    """What a unit of service (fairness.cost) of this model counts where models are compared (across_models), such as
    the GPU seconds that it takes: `fairserve profile` measures them."""
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _ranks_have_room(self) -> Self:
        size = self.engine.tensor_parallel_size
        if size > 1 and not (self.num_cpus_per_replica or self.num_gpus_per_replica):
            raise ValueError(
                f"engine.tensor_parallel_size is {size}: each of its processes needs num_cpus_per_replica or "
                "num_gpus_per_replica, or Ray does not know where to put it"
            )
        return self

    @property
    def model_name(self) -> str:
        """The name in /v1/models."""
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def slot(self) -> str:
        """The name where only plain characters may stand: of a deployment, a file, a row of Redis."""
        return re.sub(r"[^A-Za-z0-9_.-]", "-", self.model_name)


class FairServeArgs(ModelArgs):
    """Arguments of ``fairserve.app:build_app`` and of every deployment file."""

    more_models: tuple[ModelArgs, ...] = ()
    """Further models of this service, each with replicas and a fair queue of its own; `model` says which one a request
    is for. Keys, weights, limits, budgets and the settings below hold for all of them."""
    across_models: bool = False
    """Count what a client is served by one model, times its price, towards its turn at the others, too. false: its
    shares of different models are independent of each other."""
    num_ingress_replicas: PositiveInt = 1
    """Replicas of the HTTP ingress; fairness does not depend on their number."""
    max_generation_s: PositiveFloat | None = None
    """Seconds a replica or an ingress that is stopped (scale-down, redeploy) may take to finish what it runs; what runs
    longer is cut. null: api.request_timeout_s, and nothing is cut, because no request may take longer."""
    fairness: FairnessConfig = FairnessConfig()
    dispatch: DispatchConfig = DispatchConfig()
    counter: CounterConfig = CounterConfig()
    api: ApiConfig = ApiConfig()
    batches: BatchesConfig = BatchesConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        models: tuple[ModelArgs, ...] = (self, *self.more_models)
        names = [name for one in models for name in (one.model_name, *one.engine.adapters)]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"two models, or LoRA adapters of models, are served as {name!r}: names must differ")
        return self

    @model_validator(mode="after")
    def _models_differ(self) -> Self:
        slots = [self.slot, *(one.slot for one in self.more_models)]
        for number, slot in enumerate(slots):
            if slot in slots[:number]:
                raise ValueError(
                    f"two models are served as {slot!r}: give one of them another served_model_name, which differs in "
                    "letters, digits or one of _ . -"
                )
        return self

    @property
    def drain_s(self) -> float:
        """Serve's graceful shutdown: the longest generation, and time to say goodbye."""
        return (self.max_generation_s or self.api.request_timeout_s) + GOODBYE_S

    @property
    def slots(self) -> tuple[str, ...]:
        """Of all models. The first one's is "": what its counters, files and deployment are called does not change with
        its name."""
        return ("", *(one.slot for one in self.more_models))

    def of_model(self, slot: str) -> FairServeArgs:
        """The settings of one of the models, as if it were served alone.

        Raises:
            KeyError: there is none of this slot.
        """
        if not slot:
            return self.model_copy(update={"more_models": ()}) if self.more_models else self
        one = {one.slot: one for one in self.more_models}[slot]
        of_model = {name: getattr(one, name) for name in ModelArgs.model_fields}
        return self.model_copy(update={**of_model, "more_models": (), "counter": self.counter.of_slot(slot)})
