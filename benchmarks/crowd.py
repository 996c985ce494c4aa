"""A Dispatcher under a crowd: many clients that wait, many replicas, and the calls and reports that they send.

Everything is composed beforehand; only the authority's own work is timed, in CPU seconds of this process.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fairserve.assembly import make_dispatcher
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import NOTHING, RouterCall, StepReport, Submit, Totals

SLOTS = 32
"""Running requests of a replica: a step report tells of so many."""
KV_TOKENS = SLOTS * 4_096
BATCH = 32
"""Submits in one call of a router."""
NUM_ROUTERS = 16
USERS_PER_TEAM, TEAMS_PER_ORGANISATION = 20, 10
PREFIX_BLOCKS = 8
"""Of every prompt, where the policy looks at prefixes: 512 tokens by the default ``prefix_block_tokens``."""
MAX_OUTPUT = 256


@dataclass(frozen=True, slots=True)
class Size:
    """One setting. ``policy`` may have ``+moving_mean`` behind it; ``levels`` is 1 (flat names) or 3."""

    num_known: int
    num_waiting: int
    num_replicas: int
    policy: str = "vtc"
    levels: int = 1


@dataclass(slots=True)
class Work:
    """CPU seconds spent on so many of one kind of event."""

    num: int = 0
    cpu_s: float = 0.0
    rounds: list[float] = field(default_factory=list)
    """CPU seconds per event, round by round."""

    @contextmanager
    def of(self, num: Callable[[], int]) -> Iterator[None]:
        """The block is the work; ``num`` counts, before and after it, what was done so far."""
        before, began_s = num(), time.process_time()
        yield
        cpu_s, done = time.process_time() - began_s, num() - before
        self.num, self.cpu_s = self.num + done, self.cpu_s + cpu_s
        if done:
            self.rounds.append(cpu_s / done)

    @property
    def us(self) -> float:
        """Microseconds of CPU per event."""
        return 1e6 * self.cpu_s / self.num if self.num else math.nan

    @property
    def per_s(self) -> float:
        return self.num / self.cpu_s if self.cpu_s else math.nan


def client_name(i: int, levels: int) -> str:
    """``client-7``, or organisation/team/user with ``USERS_PER_TEAM`` and ``TEAMS_PER_ORGANISATION``."""
    if levels == 1:
        return f"client-{i}"
    team = i // USERS_PER_TEAM
    return f"organisation-{team // TEAMS_PER_ORGANISATION}/team-{team}/client-{i}"


class Crowd:
    """``num_waiting`` of ``num_known`` clients always wait, each with requests enough for a round of grants.

    A round: every replica has ``SLOTS`` free slots and the dispatcher grants until all are taken; the replicas report
    what started, then some steps, then that all is finished; the routers submit as many again.
    """

    def __init__(self, size: Size, seed: int = 0) -> None:
        self.size = size
        self.now_s = 1_000.0
        self.grants, self.submits = Work(), Work()
        self.started, self.steps, self.finished = Work(), Work(), Work()
        self._rng = random.Random(seed)
        self.dispatcher = dispatcher_of(size.policy)
        self._seqs: dict[str, int] = {}
        self._acks: dict[str, int] = {}
        self._totals: list[dict[str, Totals]] = [{} for _ in range(size.num_replicas)]
        self._requests: dict[str, Submit] = {}
        self._running: list[list[Submit]] = [[] for _ in range(size.num_replicas)]
        self._num_made = 0
        for i in range(size.num_replicas):
            self._report(i)
        for i in range(size.num_known):
            self.dispatcher.queue.register(client_name(i, size.levels))
        # Where the policy picks by name among equals, one client may get a quantum's worth at a time.
        depth = 2 + math.ceil(2 * size.num_replicas * SLOTS / size.num_waiting)
        self._submit([i for _ in range(depth) for i in range(size.num_waiting)], Work())
        gc.collect()

    # -- the rounds ---------------------------------------------------------------------------------------------------

    def run(self, num_grants: int, num_steps: int = 3, max_rounds: int = 50, num_before: int = 0) -> None:
        """Rounds until so many grants are timed, after one to warm up, or as many as ``num_before`` grants take: as
        long as not everybody had a turn, clients are picked in the order in which they lie in memory."""
        self._round(num_steps)
        while self.grants.num < num_before:
            self._round(num_steps)
        for work in (self.grants, self.submits, self.started, self.steps, self.finished):
            work.num, work.cpu_s, work.rounds = 0, 0.0, []
        for _ in range(max_rounds):
            if self.grants.num >= num_grants:
                break
            self._round(num_steps)

    def _round(self, num_steps: int) -> None:
        self.grant()
        self.start()
        for _ in range(num_steps):
            self.step()
        granted = [request for running in self._running for request in running]
        self.finish()
        self._submit([int(request.client.rpartition("-")[2]) for request in granted], self.submits)

    def grant(self) -> None:
        dispatcher = self.dispatcher
        for i in range(self.size.num_replicas):
            dispatcher.capacity.report(self._compose(i, free_slots=SLOTS), self.now_s)
        with self.grants.of(lambda: dispatcher.num_granted):
            dispatcher.dispatch(self.now_s)
        for session in dispatcher.sessions:  # what the routers would read in their polls
            for grant in session.grants:
                self._running[int(grant.replica)].append(self._requests.pop(grant.request_id))
                self._acks[session.router] = max(self._acks[session.router], grant.seq)

    def start(self) -> None:
        """Every replica has begun all that it was granted: its prompt and the first token."""
        reports = []
        for i, running in enumerate(self._running):
            ids = tuple(request.request_id for request in running)
            changed = self._serve(i, [(request.client, request.num_input, 1) for request in running])
            reports.append(self._compose(i, totals=changed, received=ids, started=ids))
        self._send(reports, self.started)

    def step(self) -> None:
        """A token more for each."""
        reports = [
            self._compose(i, totals=self._serve(i, [(request.client, 0, 1) for request in running]))
            for i, running in enumerate(self._running)
        ]
        self._send(reports, self.steps)

    def finish(self) -> None:
        reports = []
        for i, running in enumerate(self._running):
            ids = tuple(request.request_id for request in running)
            reports.append(self._compose(i, finished=ids, outputs=dict.fromkeys(ids, 4)))
            running.clear()
        self._send(reports, self.finished)

    # -- messages -----------------------------------------------------------------------------------------------------

    def _submit(self, clients: Sequence[int], work: Work) -> None:
        calls = []
        for start in range(0, len(clients), BATCH):
            submits = tuple(self._request(i) for i in clients[start : start + BATCH])
            router = f"router-{start // BATCH % NUM_ROUTERS}"
            seq = self._seqs[router] = self._seqs.get(router, 0) + 1
            calls.append(RouterCall(router, 1, seq, 1, submits, grants_ack=self._acks.setdefault(router, 0)))
        num_done = 0
        with work.of(lambda: num_done):
            for call in calls:
                self.dispatcher.route(call, self.now_s)
            num_done = len(clients)

    def _request(self, i: int) -> Submit:
        self._num_made += 1
        looks_at_prefixes = self.dispatcher.queue.policy.window > 1
        prefix = tuple(range(i * 1_000, i * 1_000 + PREFIX_BLOCKS)) if looks_at_prefixes else ()
        name = client_name(i, self.size.levels)
        num_input = self._rng.randint(500, 1_500)
        request = Submit(f"request-{self._num_made}", name, num_input, MAX_OUTPUT, prefix=prefix)
        self._requests[request.request_id] = request
        return request

    def _serve(self, replica: int, served: Sequence[tuple[str, int, int]]) -> dict[str, Totals]:
        """The new totals of the clients that received something."""
        totals, service = self._totals[replica], self.dispatcher.cost.service
        for client, num_input, num_output in served:
            more = Totals(num_input, 0, num_output, service(num_input, num_output))
            totals[client] = totals.get(client, NOTHING) + more
        return {client: totals[client] for client, _, _ in served}

    def _compose(
        self,
        replica: int,
        *,
        totals: dict[str, Totals] | None = None,
        received: tuple[str, ...] = (),
        started: tuple[str, ...] = (),
        finished: tuple[str, ...] = (),
        outputs: dict[str, int] | None = None,
        free_slots: int = 0,
    ) -> StepReport:
        name = str(replica)
        seq = self._seqs[name] = self._seqs.get(name, 0) + 1
        running = self._running[replica]
        return StepReport(
            replica=name,
            incarnation=1,
            seq=seq,
            epoch=1,
            free_kv_tokens=KV_TOKENS,
            free_slots=free_slots,
            kv_capacity_tokens=KV_TOKENS,
            max_slots=SLOTS,
            totals=totals or {},
            received=received,
            started=started,
            finished=finished,
            clients=tuple({request.client: None for request in running}),
            num_running=len(running),
            outputs=outputs or {},
        )

    def _report(self, replica: int) -> None:
        self.dispatcher.report(self._compose(replica), self.now_s)

    def _send(self, reports: Sequence[StepReport], work: Work) -> None:
        num_done = 0
        with work.of(lambda: num_done):
            for report in reports:
                self.dispatcher.report(report, self.now_s)
            num_done = len(reports)
        self.now_s += 0.03


def dispatcher_of(policy: str) -> Dispatcher:
    """An authority whose queue is never full and whose patience never ends."""
    name, _, prediction = policy.partition("+")
    fairness = FairnessConfig.model_validate({"policy": name, "prediction": prediction or "none"})
    limits = {"lookahead": 0, "max_waiting": 10**8, "max_waiting_per_client": 10**8, "max_clients": 10**8}
    patience = {"replica_stale_s": 10**6, "replica_dead_s": 10**7, "router_dead_s": 10**7, "lease_s": 10**6}
    return make_dispatcher(fairness, DispatchConfig.model_validate(limits | patience), epoch=1)
