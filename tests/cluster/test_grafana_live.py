"""Every panel's query finds data in a real Prometheus that scrapes a real Ray with a served model under load.

Left out are the panels that stay empty until an event that no healthy run has; tests/observe/test_grafana_prometheus.py
shows that those find data too once it has happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairserve.observe.grafana import dashboards
from tests.cluster.conftest import Served
from tests.observe.prometheus_kit import PROGRAM, WHY_NOT, prometheus, wait_until
from tests.observe.promql import filled

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT), pytest.mark.timeout(420)]

NUM_EACH = 8
"""Requests of each client at a time: with four slots, both clients always have some that wait."""
LIMIT_S = 180.0
"""Ray hands metrics on every 10 s, and a rate needs two of them."""


def queries(counters: str) -> dict[str, str]:
    """PromQL by where it stands, of every panel that needs no event, and of every annotation."""
    found = {}
    for dashboard in dashboards():
        for panel in dashboard.panels:
            for number, query in enumerate(panel.queries):
                if not panel.empty_until:
                    found[f"{panel.title} {number}"] = filled(query.expr.text, counters, interval="40s")
        for mark in dashboard.marks:
            found[mark.name] = filled(mark.expr.text, counters)
    return found


async def test_every_panel_shows_something_under_load(serve_app: Callable[..., Served], tmp_path: Path) -> None:
    import ray

    served = serve_app("watched")
    wanted = queries(served.args.counter.name)
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
    over = asyncio.Event()

    async def keep_asking(client: Any) -> None:
        while not over.is_set():
            extra = {"ignore_eos": True}
            await client.completions.create(model="tiny", prompt="x" * 20, max_tokens=60, extra_body=extra)

    with prometheus(tmp_path, targets, interval_s=5) as server:
        missing: list[str] = []

        def is_all_there() -> bool:
            missing[:] = [name for name, expr in wanted.items() if not server.values(expr)]
            return not missing

        async with served.client("ann") as ann, served.client("bob") as bob, asyncio.TaskGroup() as group:
            for client in (ann, bob):
                for _ in range(NUM_EACH):
                    group.create_task(keep_asking(client))
            try:
                await asyncio.to_thread(wait_until, is_all_there, LIMIT_S)
            finally:
                over.set()
    assert missing == []
    await served.quiet()
