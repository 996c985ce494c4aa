"""From decision logs back to workloads: what is read is what happened, and another policy may be tried on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fairserve.assembly import make_dispatcher
from fairserve.clock import VirtualClock
from fairserve.cluster import counter_service
from fairserve.cluster.counter_service import CounterService
from fairserve.config import FairServeArgs
from fairserve.dispatch.decision_log import LOG_VERSION, DecisionLog
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import RouterCall, StepReport, Submit, Totals
from fairserve.errors import ConfigError
from fairserve.simulate import run as run_module
from fairserve.simulate.records import PREFIX_BLOCK, RunRecord
from fairserve.simulate.replay import Recorded, changes, read_decisions
from fairserve.simulate.run import run, with_policy
from fairserve.simulate.scenario import Scenario, read_scenario

SMALL = """
duration_s = 20.0
[workload]
kind = "mix"
parts = [
  { kind = "even", client = "greedy", rate = 5.0, num_input = 128, num_output = 20 },
  { kind = "even", client = "modest", rate = 0.7, num_input = 128, num_output = 20, weight = 2.0 },
]
[cluster]
replicas = 2
max_num_seqs = 4
step_time = { base_s = 0.1, per_prefill_token_s = 0.0001 }
[fairness]
policy = "vtc"
prediction = "none"
"""

Play = Callable[..., tuple[RunRecord, list[str]]]


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[..., Scenario]:
    def make(*overrides: str) -> Scenario:
        path = tmp_path / "small.toml"
        path.write_text(SMALL)
        return read_scenario(path, overrides)

    return make


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs a scenario with a decision log behind the authority, in every one of its lives; the log's lines."""

    def logged(scenario: Scenario) -> tuple[RunRecord, list[str]]:
        lines: list[str] = []

        def make(fairness: Any, dispatch: Any, *, epoch: int) -> Dispatcher:
            log = DecisionLog(lines.append)
            log.began(policy=fairness.policy, epoch=epoch, now_s=json.loads(lines[-1])["t"] if lines else 0.0)
            return make_dispatcher(fairness, dispatch, epoch=epoch, log=log)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "make_dispatcher", make)
            return run(scenario), lines

    return logged


@pytest.fixture
def read(tmp_path: Path) -> Callable[[list[str]], Recorded]:
    def read(lines: list[str], **more: Any) -> Recorded:
        path = tmp_path / "decisions.jsonl"
        path.write_text("".join(line + "\n" for line in lines))
        return read_decisions(path, **more)

    return read


Read = Callable[..., Recorded]
Make = Callable[..., Scenario]


def began(at_s: float = 0.0, **more: Any) -> str:
    return entry("began", at_s, **({"version": LOG_VERSION, "policy": "vtc", "epoch": 1} | more))


def came(request: str = "r", at_s: float = 0.0, event: str = "submit", **more: Any) -> str:
    fields = {"request": request, "client": "ann", "input": 40, "max_output": 20, "weight": 1.0, "waited_s": 0.0}
    return entry(event, at_s, **(fields | {"is_retry": False} | more))


def granted(request: str = "r", at_s: float = 1.0, replica: str = "a") -> str:
    return entry("grant", at_s, request=request, replica=replica)


def finished(request: str = "r", at_s: float = 2.0, output: int = 7, *, started: bool = True) -> str:
    return entry("finish", at_s, request=request, output=output, started=started)


def entry(event: str, at_s: float, **fields: Any) -> str:
    return json.dumps({"t": at_s, "event": event, **fields})


# ------------------------------------------------------------------------------------------------- what really happened
def test_what_is_read_is_what_happened(scenario: Make, play: Play, read: Read) -> None:
    happened, lines = play(scenario())
    live = read(lines).live
    assert (live.scenario, live.policy, live.num_replicas) == ("decisions", "vtc (live)", 2)
    assert live.duration_s == pytest.approx(happened.duration_s, abs=0.5)
    first_s = happened.requests[0].arrival.arrival_s
    told = {request.arrival.request_id: request for request in live.requests}
    assert len(told) == len(happened.requests)
    for request in happened.requests:
        one, twin = request.arrival, told[request.arrival.request_id]
        assert (twin.arrival.client, twin.arrival.weight) == (one.client, one.weight)
        assert (twin.arrival.num_input, twin.arrival.max_output) == (one.num_input, one.max_output)
        assert twin.arrival.arrival_s == pytest.approx(one.arrival_s - first_s, abs=0.002)
        assert (twin.granted_s is None) == (request.granted_s is None)
        if request.granted_s is not None:
            assert twin.granted_s == pytest.approx(request.granted_s - first_s, abs=0.002)
        if request.first_token_s is not None:
            assert twin.replica == request.replica
        if twin.outcome == "finished":
            assert (request.outcome, twin.num_output) == ("finished", request.num_output)
            assert twin.arrival.num_output == one.num_output


def test_the_same_policy_gives_the_same_waits_again_and_fcfs_others(scenario: Make, play: Play, read: Read) -> None:
    base = scenario()
    _, lines = play(base)
    recorded = read(lines)
    cluster = base.model_copy(update={"duration_s": recorded.live.duration_s})
    same, fcfs = (
        changes(recorded.live, run(with_policy(cluster, word), arrivals=recorded.arrivals)) for word in ("vtc", "fcfs")
    )
    assert set(same) == set(fcfs) == {"greedy", "modest"}
    for client in same:
        assert same[client]["num"] > 10
        assert same[client]["wait_simulated_s"] == pytest.approx(same[client]["wait_live_s"], rel=0.15, abs=0.1)
    assert fcfs["modest"]["wait_simulated_s"] > 3 * fcfs["modest"]["wait_live_s"]
    assert fcfs["greedy"]["wait_simulated_s"] < fcfs["greedy"]["wait_live_s"]


def test_a_log_over_a_crash_of_the_authority_holds_every_request_once(scenario: Make, play: Play, read: Read) -> None:
    happened, lines = play(scenario("faults=[{at_s: 8.0, kind: actor_crash}]"))
    submits = [entry["request"] for entry in map(json.loads, lines) if entry["event"] == "submit"]
    assert len(submits) > len(set(submits))  # those that waited came again
    recorded = read(lines)
    ids = sorted(arrival.request_id for arrival in recorded.arrivals)
    assert ids == sorted({*ids}) and set(ids) == set(submits)
    came_s = {request.arrival.request_id: request.arrival.arrival_s for request in happened.requests}
    shift_s = min(came_s[request_id] for request_id in ids)
    for arrival in recorded.arrivals:
        assert arrival.arrival_s == pytest.approx(came_s[arrival.request_id] - shift_s, abs=0.01)


# ------------------------------------------------------------------------------------------------------ line by line
def test_a_request_is_read_with_all_that_it_came_with(read: Read) -> None:
    labels = {"application": "chat", "interaction": "task", "call_index": 2}
    line = came(client="acme/research/ann", input=100, max_output=50, weight=4.0, **labels)
    recorded = read([began(), line, granted(), finished(output=7)])
    (arrival,) = recorded.arrivals
    assert (arrival.client, arrival.num_input, arrival.num_output, arrival.max_output) == (
        "acme/research/ann",
        100,
        7,
        50,
    )
    assert (arrival.weight, arrival.application, arrival.interaction, arrival.call_index) == (4.0, "chat", "task", 2)
    (request,) = recorded.live.requests
    assert (request.outcome, request.granted_s, request.finished_s) == ("finished", 1.0, 2.0)
    assert (request.num_input, request.num_output, recorded.num_unknown) == (100, 7, 0)


def test_time_begins_with_the_first_arrival_and_the_last_event_is_within_it(read: Read) -> None:
    recorded = read([began(500.0), came("r", 510.0, waited_s=4.0), came("s", 530.0)])
    assert [arrival.arrival_s for arrival in recorded.arrivals] == [0.0, 24.0]
    assert 24.0 < recorded.live.duration_s < 24.1


def test_a_request_that_comes_again_came_when_it_came_first_and_waited_until_its_last_grant(read: Read) -> None:
    again = came("r", 9.0, waited_s=8.5, is_retry=True)
    recorded = read([came(), granted("r", 1.0, "a"), began(8.0), again, granted("r", 10.0, "b"), finished("r", 12.0)])
    (request,) = recorded.live.requests
    assert (request.arrival.arrival_s, request.granted_s, request.replica) == (0.0, 10.0, "b")
    assert recorded.live.num_replicas == 1


def test_one_whose_first_coming_is_not_in_the_file_came_before_it_begins(read: Read) -> None:
    recorded = read([came("new", 100.0), came("old", 101.0, waited_s=30.0, is_retry=True)])
    assert [(arrival.request_id, arrival.arrival_s) for arrival in recorded.arrivals] == [("old", 0.0), ("new", 29.0)]


def test_an_epoch_on_a_clock_that_starts_anew_follows_the_one_before(read: Read) -> None:
    recorded = read([began(5_000.0), came("r", 5_001.0), began(3.0, policy="fcfs"), came("s", 4.0), granted("s", 6.0)])
    assert [arrival.arrival_s for arrival in recorded.arrivals] == [0.0, 1.0]
    assert recorded.live.requests[1].granted_s == 3.0
    assert recorded.live.policy == "vtc, fcfs (live)"


def test_a_file_that_does_not_begin_with_a_policy_says_so(read: Read) -> None:
    assert read([came()]).live.policy == "unknown policy (live)"


def test_answers_without_an_end_in_the_log_run_to_max_tokens_and_are_counted(read: Read) -> None:
    waits, runs = came("waits", 0.0), [came("runs", 0.1), granted("runs")]
    refused = came("refused", 0.2, "refuse", reason="rate_limited", retry_after_s=3.0)
    recorded = read([waits, *runs, refused, came("ends", 0.3), granted("ends"), finished("ends", 3.0)])
    assert [arrival.num_output for arrival in recorded.arrivals] == [20, 20, 20, 7]
    assert recorded.num_unknown == 3
    assert [request.outcome for request in recorded.live.requests] == [
        "unfinished",
        "unfinished",
        "refused",
        "finished",
    ]
    assert recorded.live.requests[2].reason == "rate_limited"


@pytest.mark.parametrize("end", [finished(output=0), finished(output=5, started=False)])
def test_a_caller_that_left_before_the_first_token_leaves_there_again(read: Read, end: str) -> None:
    recorded = read([came(), granted(), end])
    (arrival,) = recorded.arrivals
    assert (arrival.cancel_after, arrival.num_output, recorded.num_unknown) == (0, 1, 0)
    assert recorded.live.requests[0].outcome == "cancelled"


def test_a_cancel_before_the_grant_is_one_again_and_changes_by_an_operator_are_passed_over(read: Read) -> None:
    change = entry("change", 0.5, client="ann", set={"weight": 4.0})
    recorded = read(
        [
            came("waits"),
            came("runs"),
            granted("runs"),
            change,
            *(entry("cancel", 2.0, request=r) for r in ("waits", "runs", "gone")),
        ]
    )
    waits, runs = sorted(recorded.live.requests, key=lambda one: one.arrival.request_id, reverse=True)
    assert (waits.outcome, waits.arrival.cancel_after) == ("cancelled", 0)
    assert (runs.outcome, runs.arrival.cancel_after, recorded.num_unknown) == ("cancelled", None, 1)


def test_what_came_before_the_file_begins_is_left_out(read: Read) -> None:
    recorded = read([granted("gone"), finished("gone"), came("here", 3.0)])
    assert [arrival.request_id for arrival in recorded.arrivals] == ["here"]


def test_prefixes_are_as_long_in_the_simulations_blocks_and_share_what_they_shared(read: Read) -> None:
    lines = [came("r", prefix=[11, 12], input=200), came("s", 1.0, prefix=[11, 99], input=200)]
    first, second = (arrival.prefix for arrival in read(lines, prefix_block_tokens=64).arrivals)
    assert len(first) * PREFIX_BLOCK == 128
    assert first[:4] == second[:4] and not {*first[4:]} & {*second[4:]}
    assert read(lines, prefix_block_tokens=PREFIX_BLOCK).arrivals[0].prefix == (11, 12)


# ------------------------------------------------------------------------------------------------------- broken logs
def without(line: str, name: str) -> str:
    return json.dumps({key: value for key, value in json.loads(line).items() if key != name})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"t": 1', "line 3 is not JSON"),
        ("", "line 3 is not JSON"),
        ("[1, 2]", "line 3 is no decision: expected a JSON object"),
        (entry("lunch", 1.0), "line 3 is no decision: unknown event 'lunch', known are began, submit"),
        (entry(["x"], 1.0), "line 3 is no decision: event is"),  # type: ignore[arg-type]
        (began(version=99), "line 3 is no decision: it begins a log of version 99, this fairserve reads 1"),
        *((without(came("s"), name), f"line 3 .*{name}") for name in ("t", "event", "request", "client", "weight")),
        *((without(came("s"), name), f"line 3 .*{name}") for name in ("input", "max_output", "waited_s")),
        *((without(granted(), name), f"line 3 .*{name}") for name in ("request", "replica")),
        *((without(finished(), name), f"line 3 .*{name}") for name in ("request", "output", "started")),
        (came("s", event="refuse"), "line 3 .*'reason'"),
        (came("s", "soon"), "line 3 .*t is 'soon', not a number"),  # type: ignore[arg-type]
        (came("s", float("nan")), "line 3 .*t is nan, not a number"),
        (came("s", waited_s=None), "line 3 .*waited_s is None"),
        (came("s", input=0), "line 3 .*input is 0, not a whole number of at least 1"),
        (came("s", max_output=2.5), "line 3 .*max_output is 2.5"),
        (came("s", weight=0), "line 3 .*weight is 0.0, not above 0"),
        (came("s", client=7), "line 3 .*client is 7, not a text"),
        (came("s", call_index=-1), "line 3 .*call_index is -1"),
        (came("s", prefix=7), "line 3 is no decision"),
        (finished(output=-1), "line 3 .*output is -1"),
    ],
)
def test_a_line_that_is_no_decision_is_named(read: Read, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"decisions\.jsonl, {message}"):
        read([began(), came(), line, finished()])


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(came("r") + "\n" + came("s")[:-9])
    assert [arrival.request_id for arrival in read_decisions(path).arrivals] == ["r"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no request"), (began().encode(), "holds no request"), (b"\xff\xfe\x00", "is not text")],
)
def test_a_file_without_a_request_in_it_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_decisions(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.jsonl: No such file"):
        read_decisions(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_decisions(tmp_path)


# ---------------------------------------------------------------------------------------------------------- the changes
def test_changes_compare_the_waits_of_requests_that_were_granted_in_both(read: Read) -> None:
    lines = [came(name, 0.0) for name in ("r", "s", "t")] + [granted("r", 2.0), granted("s", 4.0)]
    live = read(lines).live
    other = replace(live, requests=[replace(request) for request in live.requests])
    for request, granted_s in zip(other.requests, (1.0, None, 1.0), strict=True):
        request.granted_s = granted_s
    assert changes(live, other) == {"ann": {"num": 1.0, "wait_live_s": 2.0, "wait_simulated_s": 1.0}}


# -------------------------------------------------------------------------------------------------------- the live side
async def test_the_live_counter_service_writes_a_log_that_can_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counter_service, "TICK_S", 0.0)
    path = tmp_path / "logs" / "decisions.jsonl"
    clock = VirtualClock(700.0)
    settings = {"counter": {"decision_log_path": str(path)}, "dispatch": {"lookahead": 0, "max_waiting_per_client": 1}}
    args = FairServeArgs.model_validate(settings)
    service = CounterService(args.model_dump_json(), clock=clock, epoch=1)

    def report(seq: int, **events: Any) -> StepReport:
        return StepReport("a", 1, seq, 1, 1_000, 1, 1_000, 1, **events)

    await service.route(RouterCall("east", 1, 1, 0, (Submit("r", "ann", 40, 20, application="chat"),)))
    clock.advance(2.0)
    refused = await service.route(RouterCall("east", 1, 2, 1, (Submit("s", "ann", 10, 5),)))
    assert refused.refusals
    clock.advance(1.0)
    await service.report(report(1))
    clock.advance(4.0)
    served = {"ann": Totals(40, 0, 6, 52.0)}
    await service.report(report(2, received=("r",), started=("r",), finished=("r",), outputs={"r": 6}, totals=served))
    await service.configure(
        args.model_copy(update={"fairness": args.fairness.model_copy(update={"policy": "fcfs"})}).model_dump_json()
    )
    await service.main.tick()

    recorded = read_decisions(path)
    answered, turned_away = recorded.live.requests
    assert recorded.live.policy == "vtc, fcfs (live)"
    assert (answered.arrival.client, answered.arrival.application) == ("ann", "chat")
    assert (answered.arrival.num_input, answered.arrival.num_output, answered.arrival.max_output) == (40, 6, 20)
    assert (answered.granted_s, answered.finished_s, answered.outcome) == (3.0, 7.0, "finished")
    assert (turned_away.arrival.arrival_s, turned_away.reason) == (2.0, "client_queue_full")
    assert recorded.num_unknown == 1


async def test_without_a_path_the_live_counter_service_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counter_service, "TICK_S", 0.0)
    monkeypatch.chdir(tmp_path)
    service = CounterService(FairServeArgs().model_dump_json(), clock=VirtualClock(), epoch=1)
    await service.route(RouterCall("east", 1, 1, 0, (Submit("r", "ann", 40, 20),)))
    await service.main.tick()
    assert not files_in(tmp_path)


def files_in(folder: Path) -> list[Path]:
    return [*folder.rglob("*")]
