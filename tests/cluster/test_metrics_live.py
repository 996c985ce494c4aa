"""What Prometheus would read of a running service: the node's own metrics page, under load by forty clients."""

from __future__ import annotations

import asyncio
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fairserve.metric_table import BY_NAME, COMMON_LABEL, METRICS, OTHER, RAY_LABELS, SERVE_LABELS
from tests.cluster.conftest import Served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_CLIENTS = 40
PATIENCE_S = 150
"""Ray renews its pages every 10 s, on a machine that may have other things to do."""
ONLY_IN_TROUBLE = {
    "fairserve_refusals",
    "fairserve_throttled",
    "fairserve_lapsed_leases",
    "fairserve_preempting_grants",
    "fairserve_engine_preemptions",
    "fairserve_engine_failed_requests",
    "fairserve_engine_out_of_memory",
    "fairserve_report_call_failures",
    "fairserve_route_call_failures",
    "fairserve_ungranted_requests",
    "fairserve_resent_requests",
    "fairserve_lifts",  # only where somebody comes back while others wait
}
Series = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture
def served(serve_app: Callable[..., Served]) -> Served:
    return serve_app("main", num_replicas=2, num_ingress_replicas=2)


def scrape(counters: str) -> Series:
    """Every series of this service, by name."""
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as page:
        lines = page.read().decode().splitlines(keepends=True)
    # The whole page, of every process on the node, takes seconds to parse.
    text = "".join([line for line in lines if line.startswith("#") or f'"{counters}"' in line])
    found: Series = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get(COMMON_LABEL) == counters:
                found[sample.name].append((sample.labels, sample.value))
    return found


async def scrape_until(served: Served, is_enough: Callable[[Series], Any]) -> Series:
    series: Series = {}
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                series = await asyncio.to_thread(scrape, served.args.counter.name)
                if is_enough(series):
                    return series
                await asyncio.sleep(1.0)  # Ray decides when the page is renewed: there is nothing to wait on
    except TimeoutError:
        return series


async def test_every_metric_of_the_table_is_on_the_node_s_page_with_its_labels(served: Served) -> None:
    """And with forty clients at most twenty in each process have a label of their own."""
    stop = asyncio.Event()

    async def ask(name: str) -> None:
        async with served.client(name) as client:
            while not stop.is_set():
                await client.completions.create(
                    model="tiny", prompt="x" * 20, max_tokens=8, extra_body={"ignore_eos": True}
                )

    load = [asyncio.create_task(ask(f"live-{i}")) for i in range(NUM_CLIENTS)]
    wanted = [metric for metric in METRICS if metric.name not in ONLY_IN_TROUBLE]
    sources = [BY_NAME["fairserve_client_service"], BY_NAME["fairserve_requests"]]

    def has_all(series: Series) -> bool:
        everybody = all(
            any(labels["client"] == OTHER for labels, _ in series.get(one.prometheus, ())) for one in sources
        )
        leads = series.get("ray_fairserve_client_lead", ())
        is_now = any(labels["client"].startswith("live-") for labels, _ in leads)  # not of the tests before
        return everybody and is_now and all(name in series for metric in wanted for name in metric.series)

    try:
        series = await scrape_until(served, has_all)
    finally:
        stop.set()
        await asyncio.gather(*load)
    missing = [name for metric in wanted for name in metric.series if name not in series]
    assert missing == []
    unknown = {name for name in series if name not in {one for metric in METRICS for one in metric.series}}
    assert {name for name in unknown if not name.endswith("_created")} == set(), "exported, but not in the table"
    for metric in METRICS:
        for name in metric.series:
            for labels, _ in series.get(name, ()):
                known = {*metric.all_labels, *RAY_LABELS, *({"le"} if metric.kind == "histogram" else ())}
                assert set(labels) == known - ({"le"} if not name.endswith("_bucket") else set()), (name, labels)
                if metric.source != "counter actor":
                    assert all(labels[label] for label in SERVE_LABELS), (name, labels)

    top = served.args.metrics.top_clients
    for metric in METRICS:
        if "client" not in metric.labels:
            continue
        by_process: dict[str, set[str]] = defaultdict(set)
        for labels, _ in series.get(metric.series[-1], ()):
            by_process[labels["WorkerId"]].add(labels["client"])
        if metric.kind == "gauge":
            # Ray's page remembers for 20 s who had a label; nobody loses one in its first 30 s.
            assert all(len(names - {OTHER}) <= 2 * top for names in by_process.values()), (metric.name, by_process)
        else:  # these never go away again, so the ration is over a process's whole life
            assert all(len(names - {OTHER}) <= 5 * top for names in by_process.values()), (metric.name, by_process)
    live = {labels["client"] for labels, _ in series["ray_fairserve_client_lead"]}
    assert 0 < len(live & {f"live-{i}" for i in range(NUM_CLIENTS)}) < NUM_CLIENTS


def worker_id(actor: Any) -> str:
    import ray

    return str(ray.get_runtime_context().get_worker_id())


async def test_tokens_on_the_page_are_those_that_the_service_counted(served: Served) -> None:
    """Counters grow by what was served, whatever label it stands under."""
    name = BY_NAME["fairserve_client_tokens"].prometheus

    worker = await served.counter_actor().__ray_call__.remote(worker_id)

    def tokens(series: Series) -> float:
        """Of this life of the actor: Ray's page remembers earlier ones for minutes."""
        return sum(value for labels, value in series.get(name, ()) if labels["WorkerId"] == worker)

    async def settled() -> float:
        """What the page says once two renewals in a row said the same of a quiet service."""
        await served.quiet()
        seen: list[float] = []

        def is_level(series: Series) -> bool:
            seen.append(tokens(series))
            return len(seen) > 22 and len(set(seen[-22:])) == 1

        return tokens(await scrape_until(served, is_level))

    before = await settled()
    async with served.client("exact") as client:
        for _ in range(3):
            await client.completions.create(
                model="tiny", prompt="x" * 30, max_tokens=12, extra_body={"ignore_eos": True}
            )
    assert await settled() - before == 3 * (30 + 12)
