"""What the counter actor exports, from overviews made by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from fairserve.cluster.actor_metrics import ActorMetrics
from fairserve.cluster.metrics_sink import RecordedMetrics
from fairserve.metric_table import METRICS
from fairserve.views import ClientView, Overview, ReplicaView, Verdict

KINDS = ("input_computed", "input_cached", "output")


@dataclass
class Client:
    service: float = 0.0
    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0
    waiting: int = 0
    per_s: float = 0.0
    oldest_wait_s: float = 0.0
    is_paused: bool = False

    def view(self, name: str) -> dict[str, Any]:
        return ClientView(
            name=name,
            weight=2.0,
            is_paused=self.is_paused,
            counter=7.0,
            lead=3.0,
            waiting=self.waiting,
            running=1,
            oldest_wait_s=self.oldest_wait_s,
            mean_wait_s=0.0,
            service=self.service,
            service_per_s=self.per_s,
            num_input=self.num_input,
            num_cached=self.num_cached,
            num_output=self.num_output,
        ).model_dump()


@dataclass
class Service:
    """Enough of a running service to make overviews of it."""

    exporter: ActorMetrics
    sink: RecordedMetrics
    clients: dict[str, Client] = field(default_factory=dict)
    replicas: dict[str, float] = field(default_factory=dict)
    num_granted: int = 0
    now_s: float = 0.0

    def serve(self, name: str, num_input: int, num_output: int = 0, num_cached: int = 0) -> None:
        client = self.clients.setdefault(name, Client())
        client.num_input += num_input
        client.num_cached += num_cached
        client.num_output += num_output
        client.service += num_input - num_cached + 2.0 * num_output
        client.per_s = num_input + 2.0 * num_output

    def export(self) -> None:
        self.now_s += 1.0
        overview = self.overview()
        rows = {name: self.row(name) for name in self.exporter.missing(overview)}
        self.exporter.export(overview, rows.get, self.now_s)

    def row(self, name: str) -> dict[str, Any]:
        return self.clients[name].view(name)

    def overview(self) -> dict[str, Any]:
        busiest = sorted(self.clients, key=lambda name: (-self.clients[name].per_s, name))
        top, rest = busiest[: self.exporter.num_rows], busiest[self.exporter.num_rows :]
        others = None
        if rest:
            sums = Client(*(sum(getattr(self.clients[n], f) for n in rest) for f in Client.__dataclass_fields__))
            others = sums.view("other") | {"is_paused": False}
        verdict = Verdict(is_fair=True, text="", gap=5.0, worst_gap=9.0, bound=30.0, jain=0.9, num_backlogged=2)
        return Overview(
            time_s=1e9 + self.now_s,
            built_in_s=0.002,
            epoch=1_700_000_000_000_000_000,
            started_s=1.7e9,
            policy="vtc",
            prediction="none",
            model="tiny",
            is_overloaded=False,
            verdict=verdict,
            waiting=sum(client.waiting for client in self.clients.values()),
            running=len(self.clients),
            routers=(),
            replicas=tuple(replica(name, age_s) for name, age_s in self.replicas.items()),
            tokens_per_s=0.0,
            service_per_s=sum(client.per_s for client in self.clients.values()),
            num_clients=len(self.clients),
            num_granted=self.num_granted,
            num_refused=0,
            num_throttled=0,
            num_lifts=0,
            num_preempted=0,
            num_lapsed=0,
            clients=tuple(ClientView(**self.row(name)) for name in top),
            others=others,
            events=(),
        ).model_dump()

    def label_sum(self, name: str) -> float:
        return sum(value for key, value in self.sink.counters.items() if key[0] == f"fairserve_{name}")


def replica(name: str, age_s: float, free_kv_tokens: int = 9) -> ReplicaView:
    return ReplicaView(
        name=name,
        state="live" if age_s < 5 else "stale",
        report_age_s=age_s,
        running=0,
        waiting=0,
        max_slots=4,
        free_kv_tokens=free_kv_tokens,
        kv_capacity_tokens=9,
        granted_unconfirmed=0,
        tokens_per_s=0.0,
    )


def service_of(top_clients: int, num_rows: int | None = None) -> Service:
    sink = RecordedMetrics()
    exporter = ActorMetrics(sink, top_clients, "first")
    exporter.num_rows = num_rows or exporter.num_rows
    return Service(exporter, sink)


def test_everything_that_the_table_promises_of_the_actor_is_exported() -> None:
    service = service_of(1)
    service.clients["ann"] = service.clients["bob"] = Client()
    service.replicas["m-1"] = 0.1
    service.export()
    service.serve("ann", 10, 5)
    happened = dict.fromkeys(("num_granted", "num_lifts", "num_preempted", "num_lapsed", "num_throttled"), 3)
    service.exporter.export(service.overview() | happened, {}.get, 9.0)
    promised = {metric.name for metric in METRICS if metric.source == "counter actor"}
    assert service.sink.names == promised


def test_service_is_counted_by_client_and_kind_of_token() -> None:
    service = service_of(2)
    service.serve("ann", 0)
    service.serve("bob", 0)
    service.export()
    service.serve("ann", 100, 10, num_cached=64)
    service.serve("bob", 7)
    service.export()
    counters = service.sink.counters
    assert counters["fairserve_client_service", "ann"] == 36 + 20
    assert [counters["fairserve_client_tokens", "ann", kind] for kind in KINDS] == [36, 64, 10]
    assert ("fairserve_client_service", "other") not in counters


def test_what_was_served_before_this_life_is_not_counted_again() -> None:
    service = service_of(2)
    service.serve("ann", 1000)  # from a snapshot
    service.num_granted = 0
    service.export()
    service.serve("ann", 5)
    service.export()
    assert service.sink.counters["fairserve_client_service", "ann"] == 5


def test_a_refund_is_set_against_what_comes_later_since_a_counter_cannot_fall() -> None:
    service = service_of(1)
    service.serve("ann", 0)
    service.export()
    for amount, counted in ((100, 100), (-40, 100), (30, 100), (20, 110)):
        service.serve("ann", amount)
        service.export()
        assert service.sink.counters["fairserve_client_service", "ann"] == counted


@pytest.mark.parametrize("num_rows", [3, 1000])
def test_no_token_is_lost_or_counted_twice_while_labels_move_between_forty_clients(num_rows: int) -> None:
    """Also of clients that fall out of the overview's rows while they have a label."""
    rng, service = random.Random(7), service_of(3, num_rows)
    for i in range(40):
        service.serve(f"c{i}", 0)
    service.export()
    seen = set[str]()
    for second in range(400):
        for client in service.clients.values():
            client.per_s = 0.0
        for _ in range(5):
            service.serve(f"c{(second // 40 * 4 + rng.randrange(5)) % 40}", rng.randrange(1, 500), rng.randrange(9))
        service.export()
        seen |= {key[1] for key in service.sink.counters if key[0] == "fairserve_client_service"}
    assert len(seen) > 6, "labels moved, or this test shows nothing"
    clients = service.clients.values()
    assert service.label_sum("client_service") == pytest.approx(sum(client.service for client in clients))
    assert service.label_sum("client_tokens") == sum(client.num_input + client.num_output for client in clients)


def test_waiting_requests_of_all_labels_are_those_of_the_cluster() -> None:
    service = service_of(2)
    for i in range(10):
        service.clients[f"c{i}"] = Client(waiting=i, per_s=float(i), oldest_wait_s=10.0 - i)
    service.export()
    gauges = service.sink.gauges
    waiting = {key[1]: value for key, value in gauges.items() if key[0] == "fairserve_client_waiting"}
    assert waiting == {"c9": 9, "c8": 8, "other": 28}
    assert gauges["fairserve_client_oldest_wait_seconds", "other"] == 10.0
    assert gauges["fairserve_oldest_wait_seconds",] == 10.0


def test_a_client_that_was_paused_does_not_count_as_starving() -> None:
    service = service_of(2)
    service.clients = {"ann": Client(oldest_wait_s=900.0, is_paused=True), "bob": Client(oldest_wait_s=2.0)}
    service.export()
    assert service.sink.gauges["fairserve_oldest_wait_seconds",] == 2.0


def test_the_gauges_of_a_client_that_lost_its_label_fall_to_zero() -> None:
    service = service_of(1)
    service.clients = {"ann": Client(waiting=5, per_s=1.0)}
    service.export()
    service.clients = {"ann": Client(waiting=5, per_s=0.0), "bob": Client(waiting=500, per_s=100.0)}
    for _ in range(60):
        service.export()
    gauges = service.sink.gauges
    assert gauges["fairserve_client_waiting", "bob"] == 500
    assert gauges["fairserve_client_waiting", "ann"] == 0
    assert gauges["fairserve_client_waiting", "other"] == 5


def test_a_replica_that_is_gone_is_not_stale_for_ever() -> None:
    service = service_of(1)
    service.replicas = {"m-1": 30.0, "m-2": 0.2}
    service.export()
    assert service.sink.gauges["fairserve_report_age_seconds", "m-1"] == 30.0
    assert service.sink.gauges["fairserve_replicas", "stale"] == 1
    service.replicas = {"m-2": 0.2}
    service.export()
    assert service.sink.gauges["fairserve_report_age_seconds", "m-1"] == 0.0
    assert service.sink.gauges["fairserve_replicas", "stale"] == 0


def test_a_replica_that_said_goodbye_drains_and_is_not_stale() -> None:
    service = service_of(1)
    leaving = replica("m-1", 30.0, free_kv_tokens=0).model_dump()
    service.exporter.export(service.overview() | {"replicas": [leaving]}, {}.get, 1.0)
    gauges = service.sink.gauges
    assert [gauges["fairserve_replicas", state] for state in ("live", "stale", "draining")] == [0, 0, 1]
    assert gauges["fairserve_report_age_seconds", "m-1"] == 0.0


def test_counts_that_begin_anew_with_new_settings_go_on_rising() -> None:
    service = service_of(1)
    for num_granted, counted in ((10, 10), (25, 25), (4, 29), (6, 31)):
        service.num_granted = num_granted
        service.export()
        assert service.sink.counters["fairserve_grants",] == counted


async def test_a_counter_service_exports_by_itself_what_it_serves() -> None:
    from fairserve.cluster.counter_service import CounterService
    from fairserve.config import FairServeArgs
    from fairserve.dispatch.messages import RouterCall, StepReport, Submit, Totals
    from tests.cluster.scripted import until

    args = FairServeArgs.model_validate({"metrics": {"interval_s": 0.1, "top_clients": 1}, "counter": {"store": None}})
    sink = RecordedMetrics()
    service = CounterService(args.model_dump_json(), metrics=lambda _: sink, was_restarted=lambda: True)
    await service.ping()
    await until(lambda: bool(sink.gauges))
    assert sink.gauges["fairserve_actor_restored", "scratch"] == 1
    submits = tuple(Submit(f"r{i}", f"c{i % 3}", 10, 5) for i in range(9))
    await service.route(RouterCall("router", 1, 1, 0, submits))
    await service.report(StepReport("m-1", 1, 1, 0, 900, 4, 1000, 4, totals={"c0": Totals(10, 0, 3, 16.0)}))
    await until(lambda: sum(v for k, v in sink.counters.items() if k[0] == "fairserve_client_service") == 16.0)
    waiting = {key[1]: value for key, value in sink.gauges.items() if key[0] == "fairserve_client_waiting"}
    assert set(waiting) >= {"other"} and sum(waiting.values()) == sink.gauges["fairserve_waiting",]
    service.end()
