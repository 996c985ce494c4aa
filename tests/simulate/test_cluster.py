"""The simulated cluster: that it repeats, that its clock is right, and that fairness looks in it as it should."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fairserve.assembly import make_dispatcher
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import RouterCall, RouterReply, Submit
from fairserve.errors import ConfigError
from fairserve.fairness.bounds import GapMonitor
from fairserve.fairness.catalog import POLICIES
from fairserve.fairness.hierarchy import TOP
from fairserve.simulate.cluster import Fault, ReplicaSetup, SimCluster, simulate
from fairserve.simulate.gaps import PairGaps
from fairserve.simulate.meter import Meter
from fairserve.simulate.prefix_cache import PrefixCache
from fairserve.simulate.records import Arrival, RunRecord
from fairserve.simulate.timeline import Timeline
from tests.simulate.cluster_kit import REPLICA, Plain, at_ingress, cluster, crowd, one, outcomes, served, stream

STORMY = {
    "num_replicas": 3,
    "num_ingress": 2,
    "loss": 0.1,
    "jitter": 0.1,
    "network_delay_s": 0.01,
    "faults": (
        Fault(1.0, "replica_crash", "replica-1"),
        Fault(2.0, "actor_crash"),
        Fault(3.0, "replica_return", "replica-1"),
        Fault(4.0, "partition", "router-0"),
        Fault(6.0, "heal", "router-0"),
    ),
}


def digest(record: RunRecord) -> str:
    return hashlib.sha256(repr(replace(record, wall_s=0.0)).encode()).hexdigest()


# -- it repeats --------------------------------------------------------------------------------------------------------


def test_the_same_setup_arrivals_and_seed_give_the_same_record() -> None:
    first, again = (simulate(cluster(**STORMY), crowd(1)) for _ in range(2))
    assert replace(first, wall_s=0.0) == replace(again, wall_s=0.0)
    assert digest(simulate(cluster(**STORMY, seed=1), crowd(1))) != digest(first)


def test_checking_changes_nothing() -> None:
    """Whenever the run ends, in the middle of whatever step."""
    for duration_s in (0.3, 0.31, 0.32, 0.33):
        setup = cluster(duration_s=duration_s)
        plain, checked = (simulate(setup, crowd(2), check=check) for check in (False, True))
        assert replace(plain, wall_s=0.0) == replace(checked, wall_s=0.0)


def test_the_record_is_the_same_in_every_process() -> None:
    """Sets of strings have another order in each."""
    code = (
        "from tests.simulate.test_cluster import *\n"
        "print(digest(simulate(cluster(**STORMY, max_watched=2), crowd(1, num=80))))"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != ""


# -- its clock ---------------------------------------------------------------------------------------------------------


def test_one_request_alone_takes_its_messages_and_its_steps() -> None:
    setup = cluster(network_delay_s=0.01)
    record = simulate(setup, [one(at_s=1.0)], check=True)
    (request,) = record.requests
    assert request.granted_s == pytest.approx(1.02), "to the authority and back"
    assert request.first_token_s == pytest.approx(1.03 + 0.02 + 40 * 0.0001)
    assert request.finished_s == pytest.approx(request.first_token_s + 19 * 0.02)
    assert (request.outcome, request.replica) == ("finished", "replica-0")
    assert (request.num_input, request.num_output, record.num_steps) == (40, 20, 20)
    assert record.busy_s == pytest.approx(20 * 0.02 + 40 * 0.0001)
    assert record.idle_while_waiting_s == pytest.approx(0.03), "the replica had nothing to do while it was on its way"
    assert served(record, 100.0) == {"ann": 40 + 2 * 20}


def test_a_long_prompt_is_computed_in_chunks() -> None:
    record = simulate(cluster(), [one(num_input=300)])
    (request,) = record.requests
    assert record.num_steps == 3 + 19, "128 tokens a step"
    assert request.first_token_s == pytest.approx(3 * 0.0005 + 3 * 0.02 + 300 * 0.0001)


def test_an_output_ends_where_the_context_does() -> None:
    small = replace(REPLICA, max_model_len=50)
    (request,) = simulate(cluster(replica=small), [one()], check=True).requests
    assert (request.outcome, request.num_output) == ("finished", 10)


def test_what_is_not_done_when_the_run_ends_stays_unfinished() -> None:
    late = [one("a"), one("b", at_s=0.9), one("never", at_s=1.0)]
    record = simulate(cluster(duration_s=1.0), late, check=True)
    assert [request.outcome for request in record.requests] == ["finished", "unfinished"]
    assert record.requests[1].num_input == 40
    assert 0 < record.requests[1].num_output < 20


def test_where_nothing_happens_no_step_is_made() -> None:
    setup = cluster(num_replicas=2, duration_s=600.0, sample_s=100.0)
    record = simulate(setup, stream("ann", 6, 95.0), check=True)
    assert outcomes(record) == {"finished": 6}
    assert record.num_steps == 6 * 20


# -- fairness ----------------------------------------------------------------------------------------------------------


def test_a_weight_of_four_gets_four_times_the_service() -> None:
    arrivals = stream("heavy", 300, 0.02, weight=4.0) + stream("light", 300, 0.02)
    record = simulate(cluster(num_replicas=2, duration_s=12.0, network_delay_s=0.001), arrivals)
    service = served(record, 12.0)
    assert 4.0 * service["heavy"] / service["light"] == pytest.approx(4.0, rel=0.05)


def test_vtc_keeps_the_gap_within_its_bound_and_fcfs_does_not() -> None:
    arrivals = stream("greedy", 400, 0.01) + stream("modest", 100, 0.05)
    vtc, fcfs = (simulate(cluster(policy, duration_s=12.0), arrivals, check=True) for policy in ("vtc", "fcfs"))
    assert 0 < vtc.worst_gap <= vtc.bound
    assert fcfs.worst_gap > 4 * vtc.worst_gap
    assert vtc.bound == 2 * (vtc.unit + vtc.staleness)


def test_skewed_ingress_keeps_fairness_under_central_and_loses_it_under_round_robin() -> None:
    """At one ingress two clients take turns, so that its round robin sends each to a replica of its own; the third has
    the other ingress for itself, and both replicas."""
    arrivals = stream("ann", 200, 0.04) + stream("bob", 200, 0.04) + stream("cyd", 200, 0.04)
    arrivals = at_ingress(arrivals, lambda arrival: int(arrival.client == "cyd"))
    setup = cluster(num_replicas=2, num_ingress=2, duration_s=8.0)
    central = served(simulate(setup, arrivals, check=True), 8.0)
    pushed = served(simulate(replace(setup, placement="round_robin"), arrivals, check=True), 8.0)
    assert max(central.values()) < 1.1 * min(central.values())
    assert pushed["cyd"] > 1.8 * pushed["ann"]
    assert sum(pushed.values()) == pytest.approx(sum(central.values()), rel=0.05), "no more is done for it"


def test_organisations_share_evenly_however_many_users_they_send() -> None:
    arrivals = [a for name in ("big/1", "big/2", "big/3", "small/1") for a in stream(name, 100, 0.04)]
    record = simulate(cluster(duration_s=8.0, num_replicas=2), arrivals, check=True)
    service = served(record, 8.0)
    big = sum(service[f"big/{i}"] for i in (1, 2, 3))
    assert big == pytest.approx(service["small/1"], rel=0.1)
    assert 0 < record.worst_gap <= record.bound


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_keeps_its_accounts_with_preemption_prediction_and_cached_prefixes(policy: str) -> None:
    rng = random.Random(3)
    arrivals = [replace(a, prefix=tuple(range(rng.randrange(13)))) for a in crowd(3, num=100, per_s=40.0)]
    small = replace(REPLICA, kv_tokens=480, prefix_cache_tokens=320)
    setup = cluster(
        policy,
        num_replicas=2,
        replica=small,
        fairness={"prediction": "moving_mean"},
        dispatch={"reserve_output_tokens": 4, "preempt_gap": 50.0},
    )
    record = simulate(setup, arrivals, check=True)
    assert record.num_preempted > 0
    assert any(request.num_cached for request in record.requests)
    assert set(outcomes(record)) <= {"finished", "cancelled", "refused"}


def test_the_gap_is_watched_without_an_authority_too() -> None:
    arrivals = stream("greedy", 200, 0.01) + stream("modest", 50, 0.05)
    setup = cluster("fcfs", duration_s=8.0, placement="least_loaded", num_replicas=2)
    record = simulate(setup, arrivals, check=True)
    assert record.worst_gap > 2_000
    assert record.bound == 0.0


def test_a_client_that_waits_no_more_is_compared_no_more() -> None:
    setup = cluster(duration_s=8.0, placement="least_loaded", num_replicas=2)
    visits = [one(f"visit-{i}", "visitor", 2.0 * i) for i in range(4)]
    record = simulate(setup, stream("greedy", 200, 0.01) + visits, check=True)
    assert served(record, 8.0)["greedy"] > 8_000
    assert record.worst_gap < 1_000


# -- callers -----------------------------------------------------------------------------------------------------------


def test_a_caller_that_leaves_is_charged_what_it_had() -> None:
    setup = cluster(network_delay_s=0.0)
    (request,) = simulate(setup, [one(cancel_after=5)], check=True).requests
    assert (request.outcome, request.num_input, request.num_output) == ("cancelled", 40, 5)


def test_a_caller_that_leaves_in_the_middle_of_its_prompt_gets_the_rest_back() -> None:
    setup = cluster(network_delay_s=0.0)
    record = simulate(setup, [one(num_input=300, cancel_after=0)], check=True)
    (request,) = record.requests
    assert (request.outcome, request.num_input, request.num_output) == ("cancelled", 128, 0)
    assert record.service[-1][1] == {"ann": 128.0}


def test_news_of_a_caller_that_leaves_takes_its_time() -> None:
    """While it travels the replica goes on, and the caller pays."""
    (request,) = simulate(cluster(network_delay_s=0.05), [one(cancel_after=5)], check=True).requests
    assert (request.outcome, request.num_output) == ("cancelled", 10)


def test_after_a_refusal_the_rest_of_an_interaction_is_never_sent() -> None:
    calls = [one(f"call-{i}", at_s=i, interaction="task", call_index=i) for i in range(4)]
    other = [one("other", at_s=3.5, interaction="other")]
    flood = [one(f"flood-{i}", f"flo-{i % 2}", at_s=1.9, num_output=200, max_output=200) for i in range(9)]
    setup = cluster(dispatch={"max_waiting": 1, "lookahead": 0})
    record = simulate(setup, calls + other + flood, check=True)
    by_id = {request.arrival.request_id: request for request in record.requests}
    assert [by_id[f"call-{i}"].outcome for i in range(4)] == ["finished", "finished", "refused", "cut"]
    assert by_id["call-2"].reason == "cluster_queue_full"
    assert by_id["call-3"].finished_s == 3.0
    assert by_id["other"].outcome != "cut"
    assert record.num_wasted_tokens == 2 * 60


def test_a_submit_says_all_that_the_arrival_does() -> None:
    seen: list[Submit] = []

    class Listening(Dispatcher):
        def route(self, call: RouterCall, now_s: float) -> RouterReply:
            seen.extend(call.submits)
            return super().route(call, now_s)

    base = make_dispatcher(FairnessConfig(), DispatchConfig(), epoch=1)
    setup = cluster(
        make_dispatcher=lambda epoch: Listening(base.queue.policy, base.cost, base.limits, epoch=epoch),
        foretell=lambda arrival: arrival.num_output + 1,
    )
    simulate(setup, [one("a", weight=2.0, application="chat", interaction="i", call_index=3, prefix=(7, 8))])
    (submit,) = seen
    assert submit == Submit(
        "a", "ann", 40, 20, 2.0, application="chat", interaction="i", call_index=3, prefix=(7, 8), predicted_output=21
    )


# -- replicas ----------------------------------------------------------------------------------------------------------


def test_outputs_that_outgrow_the_cache_are_preempted_and_computed_again_free_of_charge() -> None:
    small = replace(REPLICA, kv_tokens=160)
    arrivals = stream("ann", 4, 0.0, num_output=60, max_output=60)
    record = simulate(cluster(replica=small, dispatch={"reserve_output_tokens": 0}), arrivals, check=True)
    assert outcomes(record) == {"finished": 4}
    assert record.num_preempted > 0
    assert record.num_recomputed >= 40 * record.num_preempted / 2
    assert record.service[-1][1] == {"ann": 4 * (40 + 2 * 60)}


def test_a_replica_counts_what_outgrew_its_reservation() -> None:
    run = SimCluster(
        cluster(dispatch={"reserve_output_tokens": 0}, duration_s=1.0),
        stream("ann", 2, 0.0, num_output=200, max_output=200),
    )
    run.run()
    replica, _ = run.incarnations[0]
    replica.flush()
    made = [sequence.num_tokens for sequence in replica.batcher.running.values()]
    assert sum(made) > 2 * 80
    assert replica.state.free_kv_tokens == 1_600 - sum(-(-num // 16) * 16 for num in made)


def test_a_cached_prefix_raises_throughput() -> None:
    arrivals = stream("ann", 60, 0.01, num_input=400, num_output=4, prefix=tuple(range(24)))
    setup = cluster(duration_s=30.0)
    with_cache = replace(setup, replicas=(replace(REPLICA, prefix_cache_tokens=1_000),))
    plain, cached = simulate(setup, arrivals, check=True), simulate(with_cache, arrivals, check=True)
    assert cached.busy_s < 0.6 * plain.busy_s
    assert [request.num_cached for request in cached.requests[-3:]] == [384] * 3
    assert {request.num_cached for request in plain.requests} == {0}


def test_d2lpm_keeps_prefixes_where_they_are() -> None:
    """Two conversations, two replicas with room for one of them each."""
    prefixes = {"ann": tuple(range(20)), "bob": tuple(range(100, 120))}
    order = ["ann", "bob", "bob", "ann"]
    arrivals = [
        one(f"r{i}", order[i % 4], i // 2 * 0.5, num_input=330, num_output=2, prefix=prefixes[order[i % 4]])
        for i in range(40)
    ]
    replica = replace(REPLICA, prefix_cache_tokens=320)
    setup = cluster(num_replicas=2, replica=replica, placement="d2lpm", replica_quantum=1e6)
    near, far = (simulate(replace(setup, placement=p), arrivals, check=True) for p in ("d2lpm", "round_robin"))
    hits = {name: sum(r.num_cached > 0 for r in run.requests) for name, run in (("near", near), ("far", far))}
    assert hits["near"] == 38
    assert hits["far"] < 30


def test_a_router_that_looks_at_prefixes_alone_follows_only_what_is_half_of_the_prompt() -> None:
    shared, own = (7,), [tuple(range(100 * i, 100 * i + 19)) for i in range(1, 5)]
    arrivals = [
        one(f"r{i}", "ann", i // 4 * 2.0, num_input=330, num_output=2, prefix=(*shared, *own[i % 4])) for i in range(16)
    ]
    replica = replace(REPLICA, prefix_cache_tokens=1_000)
    setup = cluster(num_replicas=2, replica=replica, placement="longest_prefix")
    run = simulate(setup, arrivals, check=True)
    where = [request.replica for request in run.requests]
    assert sorted(where[:4]) == ["replica-0"] * 2 + ["replica-1"] * 2, "the block that all share draws nobody"
    assert where[4:] == where[:4] * 3, "everybody goes back to where it was"
    assert [request.num_cached for request in run.requests[4:]] == [320] * 12


def test_reporting_seldom_makes_the_counters_stale() -> None:
    arrivals = [a for client in ("ann", "bob") for a in stream(client, 20, 0.1, num_output=100, max_output=100)]
    often, seldom = (
        simulate(cluster(duration_s=9.0, report_every_steps=every), arrivals, check=True) for every in (1, 20)
    )
    assert seldom.staleness > often.staleness + 50
    assert often.worst_gap <= often.bound
    assert seldom.worst_gap <= seldom.bound


def test_jitter_changes_each_step_and_not_the_mean() -> None:
    arrivals = stream("ann", 50, 0.1, num_output=100, max_output=100)
    calm, shaken = (simulate(cluster(jitter=jitter), arrivals) for jitter in (0.0, 0.5))
    per_step = [record.busy_s / record.num_steps for record in (calm, shaken)]
    assert per_step[0] == pytest.approx(per_step[1], rel=0.03)
    assert shaken.requests[0].finished_s != pytest.approx(calm.requests[0].finished_s, rel=0.005)


# -- what is measured --------------------------------------------------------------------------------------------------


class Brute(GapMonitor):
    """In place of the dispatcher's own: hears who waits, and compares what is delivered, pair by pair."""

    worst = 0.0

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.waiting: set[str] = set()
        self.span: dict[tuple[str, str], tuple[float, float]] = {}

    def observe(self, service: Mapping[str, float], is_waiting: Callable[[str], bool]) -> None:
        for client in service:
            if is_waiting(client):
                self.waiting.add(client)
            else:
                self.waiting.discard(client)
                self.span = {pair: span for pair, span in self.span.items() if client not in pair}
        self.sample()

    def sample(self) -> None:
        for pair in itertools.combinations(sorted(self.waiting), 2):
            lead = self.meter.service.get(pair[0], 0.0) - self.meter.service.get(pair[1], 0.0)
            low, high = self.span.get(pair, (lead, lead))
            self.span[pair] = min(low, lead), max(high, lead)
            self.worst = max(self.worst, self.span[pair][1] - self.span[pair][0])


@pytest.mark.parametrize("policy", ["vtc", "fcfs"])
@pytest.mark.parametrize("seed", range(2))
def test_the_worst_gap_is_what_brute_force_finds(policy: str, seed: int) -> None:
    run = SimCluster(cluster(policy, num_replicas=2, num_ingress=2), crowd(seed, num=200, per_s=40.0))
    assert run.authority is not None
    brute = run.authority.dispatcher.watch.gaps[TOP] = Brute(run.meter)
    moved = run.meter.moved
    run.meter.moved = lambda nodes: (moved(nodes), brute.sample())  # type: ignore[method-assign,assignment]
    run.run()
    assert run.record().worst_gap == pytest.approx(brute.worst)
    assert brute.worst > 100


def test_gaps_on_arrays_are_those_of_the_monitor() -> None:
    rng = random.Random(5)
    arrays, monitor = PairGaps(6), GapMonitor(6)
    service = {f"c{i}": 0.0 for i in range(9)}
    waiting: set[str] = set()
    for _ in range(2_000):
        client = rng.choice(list(service))
        if client in waiting:
            waiting.discard(client)
            arrays.leave(client)
        elif not arrays.is_full:
            waiting.add(client)
            arrays.join(client, service[client])
        changed = rng.sample(list(service), 4)
        monitor.observe({client: service[client]}, waiting.__contains__)
        for name in changed:
            service[name] += rng.randrange(100)
        arrays.move({name: service[name] for name in changed})
        monitor.observe({name: service[name] for name in changed if name in waiting}, waiting.__contains__)
        assert arrays.worst == monitor.worst
    assert arrays.worst > 300


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_prefix_cache_forgets_what_was_used_longest_ago_and_last_blocks_first() -> None:
    cache = PrefixCache(capacity_tokens=5 * 16)
    cache.use((1, 2, 3))
    cache.use((1, 12, 13))
    assert (cache.match((1, 2, 3)), len(cache)) == (3 * 16, 5 * 16)
    cache.use((7,))
    assert (cache.match((1, 2, 3)), cache.match((1, 12, 13)), cache.match((7, 8))) == (2 * 16, 3 * 16, 16)
    assert cache.match((2, 3)) == 16, "a hash stands for all before it: whoever brings it has it"
    assert cache.match((9, 1)) == 0


def test_what_happens_at_one_moment_happens_in_the_order_asked_for() -> None:
    timeline, seen = Timeline(), []
    timeline.at(2.0, lambda: seen.append("late"))
    timeline.at(1.0, lambda: (seen.append("a"), timeline.after(0.0, lambda: seen.append("c"))))
    timeline.at(1.0, lambda: seen.append("b"))
    timeline.run(2.0)
    assert (seen, timeline.now_s) == (["a", "b", "c"], 2.0)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"replicas": ()}, "needs replicas"),
        ({"placement": "nearest"}, "known are central, round_robin"),
        ({"make_dispatcher": None}, "needs make_dispatcher"),
        ({"loss": 1.0}, "loss must lie in"),
        ({"network_delay_s": 0.3}, "network_delay_s must lie in"),
        ({"duration_s": 0.0}, "duration_s must be positive"),
        ({"report_every_steps": 0}, "report_every_steps"),
        ({"faults": (Fault(1.0, "replica_crash", "replica-7"),)}, "known are replica-0"),
        ({"faults": (Fault(1.0, "actor_crash", "replica-0"),)}, "known are nothing"),
        ({"faults": (Fault(1.0, "partition", "replica-0"),), "placement": "round_robin"}, "has no authority"),
        ({"faults": (Fault(1.0, "flood"),)}, "unknown fault 'flood'"),
    ],
)
def test_a_setup_that_cannot_be_says_why(more: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cluster(**more)


def test_a_replica_without_room_for_a_block_says_so() -> None:
    with pytest.raises(ConfigError, match="hold no block of 16"):
        ReplicaSetup(Plain(), kv_tokens=15)


@pytest.mark.parametrize(
    ("arrivals", "words"),
    [
        ([one("a"), one("a")], "1 of 2 arrivals have another's request_id"),
        ([one(num_input=1_600)], "smallest replica holds 1600 tokens"),
        ([one(num_output=0)], "at least one of each"),
        ([one(at_s=-1.0)], "a run starts at 0"),
        ([one(ingress=3)], "ingress 3, but there are 1"),
    ],
)
def test_arrivals_that_cannot_be_say_why(arrivals: list[Arrival], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SimCluster(cluster(), arrivals).run()
