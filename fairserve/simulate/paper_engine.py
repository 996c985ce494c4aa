"""The engine of the VTC paper as a simulation, with this project's Dispatcher in place of its scheduler.

The published numbers were made with S-LoRA (artifact Ying1123/VTC-artifact at 192c2e2) on one A10G with Llama-2-7B.
What decides them is taken over as it stands in ``slora/server/router``:

- after a prefill the batch decodes ``DECODE_STEPS`` steps; then, before each further step, requests may be added
  (``manager.py``, ``_step``). When nothing runs they may be added at once;
- requests added together are prefilled together while the others stand still, and make their first token there;
- a request is added while the memory suffices even if every running request makes all that it asked for
  (``req_queue.py``, ``_can_add_new_req``): ``paper_memory.py``;
- the first request in the scheduler's order that does not fit ends the round.

Which request is next, and what it is charged, is decided by the real ``Dispatcher``: it hears of arrivals through a
router's calls and of tokens through a replica's reports, and asks the engine only whether a request fits. There is no
network and no second replica.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fairserve.dispatch.capacity import Capacity
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import NOTHING, Grant, StepReport, Submit, Totals
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import ConfigError, Refused
from fairserve.fairness.accounts import account_of
from fairserve.simulate.paper_memory import MAX_RUNNING, PaperCapacity
from fairserve.simulate.records import Arrival, RequestRecord, RunRecord
from fairserve.simulate.setup import StepSeconds
from fairserve.simulate.step_time import PRESETS
from fairserve.simulate.step_time import jitter as step_factor

DECODE_STEPS = 10
"""Steps after a prefill before anything may be added: ``max_wait_tokens`` there."""
SAMPLE_S = 5.0
"""Seconds between samples of ``RunRecord.service``."""
REPLICA, ROUTER = "a10g", "door"

STEP_TIME = PRESETS["a10g-slora-llama2-7b"]

MakeDispatcher = Callable[[Capacity], Dispatcher]
"""A new dispatcher, at epoch 1, that asks the given capacity."""
Foretell = Callable[[Arrival], int | None]


@dataclass(slots=True)
class Running:
    record: RequestRecord
    joined: int
    """Decode steps that the engine had done when it was prefilled: after as many more it has made one token more."""
    account: str
    service: float = 0.0
    """Charged so far, for the record's ``num_input`` and ``num_output``."""


def simulate_paper(
    arrivals: Sequence[Arrival],
    make_dispatcher: MakeDispatcher,
    *,
    scenario: str = "",
    kv_tokens: int = 10_000,
    step_time: StepSeconds = STEP_TIME,
    jitter: float = 0.05,
    seed: int = 0,
    duration_s: float | None = None,
    foretell: Foretell = lambda arrival: None,
    tracks_outputs: bool = True,
) -> RunRecord:
    """Serve all arrivals to the end on the paper's engine. It has no prefix cache: ``Arrival.prefix`` is ignored.

    Args:
        kv_tokens: M, tokens of KV cache.
        jitter: every step takes its time times a factor drawn from [1 - jitter, 1 + jitter] with ``seed``.
        duration_s: length that the record states; None for the moment at which the last request ended.
        foretell: ``Submit.predicted_output`` of a request.
        tracks_outputs: reports tell how far each running request is. Only a dispatcher that predicts looks at it, and
            without it a run is a third shorter.

    Raises:
        ConfigError: a request that could never be added, one with a cancellation or an interaction (the paper's engine
            knows neither), or a dispatcher that was not given the capacity.
    """
    began_s = time.perf_counter()
    engine = _PaperEngine(arrivals, make_dispatcher, kv_tokens, step_time, jitter, seed, foretell, tracks_outputs)
    engine.run()
    dispatcher = engine.dispatcher
    return RunRecord(
        scenario=scenario,
        policy=dispatcher.queue.policy.name,
        seed=seed,
        duration_s=engine.now_s if duration_s is None else duration_s,
        requests=list(engine.records.values()),
        worst_gap=dispatcher.gaps.worst,
        bound=dispatcher.bounds.bound,
        unit=dispatcher.bounds.unit,
        staleness=dispatcher.bounds.staleness,
        busy_s=engine.busy_s,
        num_steps=engine.num_steps,
        num_lifts=dispatcher.num_lifts,
        service=engine.samples,
        wall_s=time.perf_counter() - began_s,
    )


class _PaperEngine:
    """The loop of ``manager.py``: arrivals, rounds of admission, prefills and decode steps on a virtual clock."""

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        make_dispatcher: MakeDispatcher,
        kv_tokens: int,
        step_time: StepSeconds,
        jitter: float,
        seed: int,
        foretell: Foretell,
        tracks_outputs: bool,
    ) -> None:
        self.records = {one.request_id: RequestRecord(one) for one in sorted(arrivals, key=lambda one: one.arrival_s)}
        self.capacity = PaperCapacity({name: record.arrival for name, record in self.records.items()}, kv_tokens)
        self._check_arrivals(len(arrivals))
        self.dispatcher = make_dispatcher(self.capacity)
        if self.dispatcher.capacity is not self.capacity:
            raise ConfigError("make_dispatcher must hand the capacity that it is given to the Dispatcher")
        self.capacity.next_id = self._next_id
        self.now_s = self.busy_s = 0.0
        self.num_steps = 0
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._step_time, self._jitter, self._rng = step_time, jitter, random.Random(seed)
        self._foretell, self._tracks_outputs = foretell, tracks_outputs
        self._to_come = list(self.records.values())[::-1]
        self._router = RouterBook(ROUTER, 1)
        self._running: list[Running] = []
        self._ending: dict[int, list[Running]] = {}
        """By the decode step that makes their last token."""
        self._context = 0
        self._num_decodes = 0
        self._since_prefill = 0
        self._granted: list[RequestRecord] = []
        self._seq = 0
        self._totals: dict[str, Totals] = {}
        self._changed: dict[str, None] = {}
        self._weights: dict[str, float] = {}
        self._service: dict[str, float] = {}
        self._started: list[str] = []
        self._finished: list[str] = []
        self._outputs: dict[str, int] = {}

    def _check_arrivals(self, num_arrivals: int) -> None:
        if len(self.records) < num_arrivals:
            raise ConfigError(
                f"{num_arrivals - len(self.records)} of {num_arrivals} arrivals have another's request_id"
            )
        for record in self.records.values():
            one = record.arrival
            if one.cancel_after is not None or one.interaction:
                what = "cancelled" if one.cancel_after is not None else "part of an interaction"
                raise ConfigError(f"request {one.request_id} is {what}: the paper's engine knows no such thing")
            if not self.capacity.fits(one, 0):
                room = f"{self.capacity.kv_tokens} tokens of memory, {self.capacity.prefill_tokens} of a prefill"
                raise ConfigError(
                    f"request {one.request_id} ({one.num_input} tokens in, {one.max_output} out) does not fit into "
                    f"{room} even when alone"
                )

    def _next_id(self) -> str | None:
        waiting = self.dispatcher.queue.peek()
        return None if waiting is None else waiting.submit.request_id

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while True:
            if not self._running:
                self._begin_round()
                if not self._running:  # nobody waits whom the policy would let in
                    if not self._to_come:
                        break
                    self.now_s = self._to_come[-1].arrival.arrival_s
                    self._take_arrivals()
                continue
            if self._since_prefill >= DECODE_STEPS and self._is_round_due():
                self._begin_round()
                if self._since_prefill == 0:
                    continue
            self._decode()

    def _is_round_due(self) -> bool:
        """Every ``DECODE_STEPS`` steps, and whenever the request that was next at the last report would fit. The
        artifact asks before every step; a round in which nothing is added would only cost time here."""
        if self._since_prefill % DECODE_STEPS == 0:
            return True
        request_id = self._next_id()
        return request_id is not None and self.capacity.fits(self.records[request_id].arrival, self._num_decodes)

    def _take_arrivals(self) -> None:
        """Submit all that came up to now, each at its own time."""
        while self._to_come and self._to_come[-1].arrival.arrival_s <= self.now_s:
            record = self._to_come.pop()
            one = record.arrival
            submit = Submit(
                one.request_id,
                one.client,
                one.num_input,
                one.max_output,
                one.weight,
                application=one.application,
                predicted_output=self._foretell(one),
            )
            self._router.want(submit, one.arrival_s, self._on_grant, partial(self._on_refusal, record))
            call = self._router.compose(one.arrival_s)
            self._router.replied(self.dispatcher.route(call, one.arrival_s), to_poll=False)

    def _on_grant(self, grant: Grant) -> None:
        self._granted.append(self.records[grant.request_id])

    def _on_refusal(self, record: RequestRecord, error: Refused) -> None:
        record.outcome, record.reason, record.finished_s = "refused", error.reason, record.arrival.arrival_s

    def _begin_round(self) -> None:
        """Report, let the dispatcher grant what fits, and prefill that."""
        self.capacity.open(self._num_decodes)
        self._report()
        self.capacity.close()
        self._router.replied(self.dispatcher.poll(self._router.compose_poll(), self.now_s), to_poll=True)
        if self._granted:
            self._prefill()

    def _prefill(self) -> None:
        started, self._granted = self._granted, []
        granted_s = self.now_s
        self._since_prefill = 0
        self._pass(self._step_time.seconds(0, 0, sum(record.arrival.num_input for record in started)))
        for record in started:
            one = record.arrival
            item = Running(record, self._num_decodes, account_of(one.client, one.application))
            record.granted_s, record.first_token_s, record.replica = granted_s, self.now_s, REPLICA
            record.num_input = one.num_input
            self._context += record.num_input + 1
            self._started.append(one.request_id)
            self._running.append(item)
            self._ending.setdefault(self._num_decodes + one.length - 1, []).append(item)
        self._end_finished()
        self.capacity.watch((item.record.arrival, item.joined) for item in self._running)
        self._take_arrivals()

    def _decode(self) -> None:
        self._num_decodes += 1
        self._since_prefill += 1
        self._context += len(self._running)
        self._pass(self._step_time.seconds(len(self._running), self._context, 0))
        if self._end_finished():
            self.capacity.watch((item.record.arrival, item.joined) for item in self._running)
        self._take_arrivals()

    def _pass(self, seconds: float) -> None:
        seconds *= step_factor(self._rng, self._jitter)
        self.now_s += seconds
        self.busy_s += seconds
        self.num_steps += 1

    def _end_finished(self) -> bool:
        ended = self._ending.pop(self._num_decodes, [])
        for item in ended:
            record = item.record
            self._charge(item)
            record.outcome, record.finished_s = "finished", self.now_s
            self._context -= record.num_input + record.num_output
            self._finished.append(record.arrival.request_id)
            self._outputs[record.arrival.request_id] = record.num_output
            self._running.remove(item)
        return bool(ended)

    # -- the replica's side of the protocol ---------------------------------------------------------------------------

    def _charge(self, item: Running) -> None:
        """Into the totals go the tokens that the request has made since it was charged last."""
        record, one = item.record, item.record.arrival
        num_input = 0 if record.num_output else record.num_input
        num_output = self._num_decodes - item.joined + 1 - record.num_output
        record.num_output += num_output
        service = self.dispatcher.cost.service(record.num_input, record.num_output)
        added, item.service = service - item.service, service
        totals = self._totals.get(item.account, NOTHING)
        self._totals[item.account] = Totals(
            totals.num_input + num_input, 0, totals.num_output + num_output, totals.service + added
        )
        self._changed[item.account] = None
        self._weights[one.client] = one.weight
        self._service[one.client] = self._service.get(one.client, 0.0) + added / one.weight
        if self._tracks_outputs:
            self._outputs[one.request_id] = record.num_output

    def _report(self) -> None:
        """All tokens since the last report; the dispatcher then grants whatever fits."""
        for item in self._running:
            self._charge(item)
        self._seq += 1
        report = StepReport(
            replica=REPLICA,
            incarnation=1,
            seq=self._seq,
            epoch=self.dispatcher.epoch,
            free_kv_tokens=self.capacity.kv_tokens - self._context,
            free_slots=MAX_RUNNING - len(self._running),
            kv_capacity_tokens=self.capacity.kv_tokens,
            max_slots=MAX_RUNNING,
            totals={account: self._totals[account] for account in self._changed},
            received=tuple(self._started),
            started=tuple(self._started),
            finished=tuple(self._finished),
            num_running=len(self._running),
            weights=self._weights,
            outputs=self._outputs,
        )
        self._changed, self._weights, self._outputs = {}, {}, {}
        self._started, self._finished = [], []
        self.dispatcher.report(report, self.now_s)
        if not self.samples or self.now_s - self.samples[-1][0] >= SAMPLE_S:
            self.samples.append((self.now_s, dict(self._service)))
