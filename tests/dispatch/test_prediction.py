"""Predicted output is charged at the grant and settled token by token: a counter is what was served plus what is still
expected of running requests, at every step, and nothing but what was served in the end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.config import CostConfig, DispatchConfig, FairnessConfig
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import StepReport, Totals
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import CostFunction, KvTokenTime, ProfiledQuadratic, WeightedTokens
from fairserve.fairness.hierarchy import path_of
from fairserve.fairness.prediction import Foretold, NoPrediction
from tests.dispatch.batch_cluster import BLOCK, BatchCluster, Job
from tests.dispatch.kit import Desk, ReplicaVoice, submit

MakeDesk = Callable[..., Desk]


class Says(NoPrediction):
    """The same for everybody."""

    def __init__(self, num_output: float) -> None:
        self.num_output = num_output
        self.learned: list[tuple[str, str, int]] = []

    def predict(self, client: str, application: str, hint: int | None) -> float:
        return self.num_output

    def learn(self, client: str, application: str, num_output: int) -> None:
        self.learned.append((client, application, num_output))


@pytest.fixture
def foretelling(make_desk: MakeDesk) -> Callable[..., Desk]:
    """A desk whose dispatcher predicts; checked at the end."""

    def build(num_output: float, *, cost: CostFunction | None = None, policy: str = "vtc", **limits: object) -> Desk:
        desk = make_desk(policy, cost=cost, **limits)
        desk.dispatcher = Dispatcher(make_policy(policy), desk.cost, desk.limits, epoch=1, predictor=Says(num_output))
        return desk

    return build


def progress(voice: ReplicaVoice, outputs: dict[str, int], **what: object) -> StepReport:
    """A report that says how far requests are; sent."""
    report = replace(voice.compose(**what), outputs=outputs)  # type: ignore[arg-type]
    voice.send(report)
    return report


# -- one request -------------------------------------------------------------------------------------------------------


def test_the_prediction_is_charged_when_the_request_is_picked(foretelling: MakeDesk) -> None:
    desk = foretelling(8)
    desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20))
    assert desk.counter("ann") == 10 + 2 * 8


def test_up_to_the_prediction_a_token_costs_nothing_more_and_past_it_each_counts(foretelling: MakeDesk) -> None:
    desk = foretelling(3)
    voice = desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20))
    progress(voice, {}, received=("a",))
    assert desk.counter("ann") == 16
    progress(voice, {"a": 1}, started=("a",), served={"ann": (10, 1)})
    assert desk.counter("ann") == 16
    for num_output, counter in ((2, 16), (3, 16), (4, 18), (5, 20)):
        progress(voice, {"a": num_output}, served={"ann": (0, 1)})
        assert desk.counter("ann") == counter
    progress(voice, {"a": 5}, finished=("a",))
    assert desk.counter("ann") == 20
    assert desk.dispatcher.watch.unserved == {}


def test_what_was_predicted_and_not_made_returns_at_the_end(foretelling: MakeDesk) -> None:
    desk = foretelling(15)
    voice = desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20))
    progress(voice, {"a": 2}, received=("a",), started=("a",), served={"ann": (10, 2)})
    assert desk.counter("ann") == 40
    progress(voice, {"a": 2}, finished=("a",))
    assert desk.counter("ann") == 14


@pytest.mark.parametrize(
    ("says", "charged"), [(0.0, 0), (-5.0, 0), (math.nan, 0), (2.5, 2.5), (20, 20), (10**9, 20), (math.inf, 20)]
)
def test_whatever_is_predicted_the_charge_lies_between_nothing_and_max_output(
    foretelling: MakeDesk, says: float, charged: float
) -> None:
    desk = foretelling(says)
    voice = desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20))
    assert desk.counter("ann") == 10 + 2 * charged
    progress(voice, {"a": 1}, received=("a",), started=("a",), served={"ann": (10, 1)})
    desk.check()
    progress(voice, {"a": 1}, finished=("a",))
    assert desk.counter("ann") == 12


def test_a_repeated_an_overtaken_and_a_lost_report_settle_nothing_twice(foretelling: MakeDesk) -> None:
    desk = foretelling(6)
    voice = desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20))
    first = progress(voice, {"a": 1}, received=("a",), started=("a",), served={"ann": (10, 1)})
    voice.send(first)
    assert desk.counter("ann") == 22
    lost = replace(voice.compose(served={"ann": (0, 2)}), outputs={"a": 3})
    progress(voice, {"a": 4}, served={"ann": (0, 1)})
    assert desk.counter("ann") == 22
    voice.send(lost)
    voice.send(first)
    assert desk.counter("ann") == 22
    desk.check()
    progress(voice, {"a": 4}, finished=("a",))
    assert desk.counter("ann") == 18


def test_a_count_of_outputs_never_goes_back(foretelling: MakeDesk) -> None:
    desk = foretelling(6)
    voice = desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20))
    progress(voice, {"a": 5}, received=("a",), started=("a",), served={"ann": (10, 5)})
    progress(voice, {"a": 2})
    assert desk.counter("ann") == 22


@pytest.mark.parametrize("stage", ["leased", "confirmed", "started", "running"])
def test_a_request_that_leaves_gives_back_what_was_not_made_whatever_its_stage(
    foretelling: MakeDesk, stage: str
) -> None:
    desk = foretelling(9)
    router, voice = desk.router(), desk.replica("r0")
    router.call(submit("a", num_input=10, max_output=20))
    served = 0
    if stage != "leased":
        progress(voice, {}, received=("a",))
    if stage in ("started", "running"):
        progress(voice, {}, started=("a",), served={"ann": (10, 0)})
        served = 10
    if stage == "running":
        progress(voice, {"a": 4}, served={"ann": (0, 4)})
        served = 18
    assert desk.counter("ann") == 28
    router.call(cancels=("a",))
    assert desk.counter("ann") == served
    assert desk.dispatcher.watch.unserved == {}


def test_a_replica_that_dies_gives_back_what_it_has_not_made(foretelling: MakeDesk) -> None:
    desk = foretelling(9)
    voice = desk.replica("r0")
    router = desk.router()
    router.call(submit("runs", num_input=10, max_output=20), submit("sent", num_input=10, max_output=20))
    progress(voice, {"runs": 4}, received=("runs",), started=("runs",), served={"ann": (10, 4)})
    assert desk.counter("ann") == 28 + 28
    for _ in range(5):
        desk.clock.advance(5.0)
        router.poll()
        desk.dispatcher.tick(desk.now_s)
    assert len(desk.dispatcher.capacity) == 0
    assert desk.counter("ann") == 18, "what was merged stays charged; the rest of both has returned"
    assert len(desk.dispatcher.queue) == 1, "what it never confirmed waits again"


def test_a_lapsed_grant_returns_the_prediction_and_charges_it_anew(foretelling: MakeDesk) -> None:
    desk = foretelling(9, lease_s=2.0)
    voice, router = desk.replica("r0"), desk.router()
    router.call(submit("a", num_input=10, max_output=20))
    desk.clock.advance(2.0)
    voice.report()
    desk.dispatcher.tick(desk.now_s)
    assert desk.dispatcher.num_lapsed == 1 and desk.dispatcher.num_granted == 2
    assert desk.counter("ann") == 28


def test_cached_input_is_charged_whole_until_the_replica_says_so(foretelling: MakeDesk) -> None:
    desk = foretelling(5)
    voice = desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20))
    assert desk.counter("ann") == 20
    progress(voice, {"a": 1}, received=("a",), started=("a",), served={"ann": (10, 1)}, cached={"ann": 7})
    assert desk.counter("ann") == 3 + 2 + 2 * 4
    progress(voice, {"a": 1}, finished=("a",))
    assert desk.counter("ann") == 5


def test_weights_divide_the_prediction_like_any_service(foretelling: MakeDesk) -> None:
    desk = foretelling(5)
    voice = desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20, weight=4.0))
    assert desk.counter("ann") == 5
    progress(voice, {"a": 1}, received=("a",), started=("a",), served={"ann": (10, 1)})
    progress(voice, {"a": 1}, finished=("a",))
    assert desk.counter("ann") == 3


def test_every_node_of_the_path_carries_the_prediction_and_loses_it(foretelling: MakeDesk) -> None:
    desk = foretelling(5)
    voice = desk.replica("r0")
    client = "acme/r/ann"
    desk.router().call(submit("a", client, num_input=10, max_output=20))
    assert [desk.counter(node) for node in path_of(client)] == [20, 20, 20]
    progress(voice, {"a": 1}, received=("a",), started=("a",), served={client: (10, 1)})
    progress(voice, {"a": 1}, finished=("a",))
    assert [desk.counter(node) for node in path_of(client)] == [12, 12, 12]


@pytest.mark.parametrize("cost", [ProfiledQuadratic(), KvTokenTime(), WeightedTokens(0.5, 3.0)])
def test_any_cost_function_is_settled_to_what_was_served(foretelling: MakeDesk, cost: CostFunction) -> None:
    desk = foretelling(7.5, cost=cost)
    book = desk.dispatcher
    voice = desk.replica("r0")
    desk.router().call(submit("a", num_input=10, max_output=20))
    assert desk.counter("ann") == pytest.approx(cost.service(10, 7.5))
    made = 0
    for num_output in (1, 2, 7, 8, 13):
        report = voice.compose(received=("a",), started=("a",))
        totals = replace_total(report, "ann", cost, 10, num_output)
        voice.send(replace(totals, outputs={"a": num_output}))
        made = num_output
        assert desk.counter("ann") == pytest.approx(max(cost.service(10, 7.5), cost.service(10, made)))
    progress(voice, {"a": made}, finished=("a",))
    assert desk.counter("ann") == pytest.approx(cost.service(10, made))
    assert book.ledger.totals("ann").service == pytest.approx(cost.service(10, made))


def replace_total(report: StepReport, client: str, cost: CostFunction, num_input: int, num_output: int) -> StepReport:
    """The kit's voice adds up costs of parts; here the cost is not a sum."""
    total = Totals(num_input, 0, num_output, cost.service(num_input, num_output))
    return replace(report, totals={client: total})


def test_the_predictor_learns_what_was_made_of_requests_that_ran_and_of_no_others(foretelling: MakeDesk) -> None:
    desk = foretelling(5)
    router, voice = desk.router(), desk.replica("r0")
    router.call(submit("a", application="chat"), submit("never", max_output=9), submit("scored", max_output=0))
    here = ("a", "never", "scored")
    served = {"ann|chat": (10, 3), "ann": (10, 0)}
    progress(voice, {"a": 3}, received=here, started=("a", "scored"), served=served)
    progress(voice, {"a": 7}, finished=here, served={"ann|chat": (0, 4)})
    predictor = desk.dispatcher.state.predictor
    assert isinstance(predictor, Says) and predictor.learned == [("ann", "chat", 7)]


def test_a_burst_before_the_first_finish_is_not_free_with_prediction(make_desk: MakeDesk) -> None:
    """VTC section 4.4: without prediction, whoever asks for long answers gets the whole batch before it is charged."""
    for predictor, granted in ((NoPrediction(), 4), (Foretold(), 2)):
        desk = make_desk("vtc", lookahead=0)
        desk.dispatcher = Dispatcher(make_policy("vtc"), desk.cost, desk.limits, epoch=1, predictor=predictor)
        voice = desk.replica("r0", slots=6)
        burst = [submit(f"long{i}", "greedy", 1, 100, predicted_output=90) for i in range(5)]
        short = [submit(f"short{i}", "modest", 45, 10, predicted_output=2) for i in range(10)]
        desk.router().call(*burst, *short)
        voice.report(received=tuple(desk.dispatcher.leases), free_slots=0)
        clients = [lease.waiting.submit.client for lease in desk.dispatcher.leases.values()]
        assert clients.count("greedy") >= granted
        assert (clients.count("greedy") <= 2) == isinstance(predictor, Foretold)


# -- whole clusters ----------------------------------------------------------------------------------------------------

COSTS = ["weighted_tokens", "profiled_quadratic", "kv_token_time"]


def random_job(rng: random.Random, i: int, weights: dict[str, float]) -> Job:
    client = rng.choice(sorted(weights))
    num_output = rng.randint(1, 15)
    num_input = rng.randint(1, 30)
    return Job(
        f"r{i}",
        client,
        num_input,
        num_output,
        max_output=rng.randint(num_output, 20),
        weight=weights[client],
        num_cached=rng.choice([0, 0, num_input // 2]),
        foretold=rng.choice([None, 0, num_output, 2 * num_output, 1]),
    )


def expected_held(cluster: BatchCluster) -> dict[str, float]:
    """Service charged at grants and not merged, by client, worked out from what the merged reports said alone."""
    cost = cluster.dispatcher.cost
    held: dict[str, float] = {}
    for lease in cluster.dispatcher.leases.values():
        submit = lease.waiting.submit
        expected = cost.service(submit.num_input, lease.predicted)
        made = cost.service(submit.num_input, lease.num_output) if lease.has_started else 0.0
        held[submit.client] = held.get(submit.client, 0.0) + max(0.0, expected - made)
    return held


def assert_exact(cluster: BatchCluster, weights: dict[str, float]) -> None:
    held = expected_held(cluster)
    for client, weight in weights.items():
        service = cluster.dispatcher.ledger.totals(client).service
        assert cluster.dispatcher.queue.counter(client) * weight == pytest.approx(
            service + held.get(client, 0.0), abs=1e-6
        ), client


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prediction=st.sampled_from(["none", "moving_mean", "foretold"]),
    cost=st.sampled_from(COSTS),
    loss=st.sampled_from([0.0, 0.3]),
    report_every=st.sampled_from([1, 3]),
    num_replicas=st.integers(1, 3),
    reserve=st.sampled_from([None, 2]),
    chaos=st.booleans(),
)
def test_a_counter_is_what_was_served_plus_what_is_still_expected_at_every_step(
    seed: int,
    prediction: str,
    cost: str,
    loss: float,
    report_every: int,
    num_replicas: int,
    reserve: int | None,
    chaos: bool,
) -> None:
    """``lcf`` is VTC without the lift, so that counters hold charges and nothing else."""
    rng = random.Random(seed)
    weights = {"ann": 1.0, "bob": 2.0, "acme/cyd": 0.5}
    cluster = BatchCluster(
        FairnessConfig(policy="lcf", prediction=prediction, cost=CostConfig(kind=cost, cached_fraction=0.25)),
        DispatchConfig(lookahead=1, reserve_output_tokens=reserve, prefix_block_tokens=BLOCK),
        num_replicas=num_replicas,
        loss=loss,
        report_every=report_every,
        rng=rng,
        kv_tokens=80,
        step_tokens=20,
    )
    for i in range(60):
        if i < 40:
            cluster.submit(random_job(rng, i, weights))
        if chaos and rng.random() < 0.1:
            cluster.cancel(rng.choice(sorted(cluster.jobs)))
        if chaos and rng.random() < 0.03:
            cluster.kill(rng.randrange(num_replicas))
        cluster.step()
        assert_exact(cluster, weights)
    cluster.run_to_rest()
    dispatcher = cluster.dispatcher
    assert_exact(cluster, weights)
    assert len(dispatcher.leases) == 0 and dispatcher.watch.unserved == {} and dispatcher.watch.owed == {}
    for client, weight in weights.items():
        service = dispatcher.ledger.totals(client).service
        assert dispatcher.queue.counter(client) * weight == pytest.approx(service)
        if not cluster.dead:
            assert service == pytest.approx(cluster.made(client)), "and that is what the batchers made"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), prediction=st.sampled_from(["moving_mean", "foretold"]))
def test_over_a_network_that_loses_nothing_made_means_made_now(seed: int, prediction: str) -> None:
    """Held against the batchers themselves: after each exchange, service is what their sequences hold."""
    rng = random.Random(seed)
    weights = {"ann": 1.0, "bob": 2.0}
    cluster = BatchCluster(FairnessConfig(policy="lcf", prediction=prediction), num_replicas=2, rng=rng)
    cost = cluster.dispatcher.cost
    for i in range(80):
        if i < 40:
            cluster.submit(random_job(rng, i, weights))
        cluster.step()
        made = {r: s for replica in cluster.replicas for r, s in replica.sequences.items()}
        for client, weight in weights.items():
            counter = cluster.made(client)
            for request_id, lease in cluster.dispatcher.leases.items():
                if lease.waiting.submit.client != client:
                    continue
                num_input = lease.waiting.submit.num_input
                expected = cost.service(num_input, lease.predicted)
                if request_id in made:
                    counter += max(0.0, expected - cost.service(num_input, len(made[request_id].output)))
                else:
                    counter += expected
            assert cluster.dispatcher.queue.counter(client) * weight == pytest.approx(counter)


def test_prediction_costs_no_request_its_end() -> None:
    for prediction in ("none", "moving_mean", "foretold"):
        rng = random.Random(5)
        cluster = BatchCluster(FairnessConfig(prediction=prediction), num_replicas=2, rng=rng)
        jobs = [random_job(rng, i, {"ann": 1.0, "bob": 1.0}) for i in range(50)]
        cluster.submit(*jobs)
        cluster.run_to_rest()
        made = {r: len(s.output) for replica in cluster.replicas for r, s in replica.ended.items()}
        assert made == {job.request_id: job.num_output for job in jobs}
