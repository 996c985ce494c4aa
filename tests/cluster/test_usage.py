"""Usage and budgets through the counter service: kept over lives, told to people, changed live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairserve.clock import SystemClock
from fairserve.cluster.counter_client import RouterClient
from fairserve.cluster.counter_service import CounterService
from fairserve.config import CounterConfig, FairServeArgs
from fairserve.dispatch.messages import StepReport, Submit, Totals
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import BudgetSpent, InvalidRequest
from tests.cluster.scripted import Wire

MODEL = FairServeArgs().model_name

NOON = 20_000 * 86_400 + 43_200.0
CONFIG = CounterConfig(call_timeout_s=1.0, poll_s=0.05)


def service_at(store: Path, **fairness: Any) -> CounterService:
    settings = {"counter": {"store": str(store), "snapshot_s": 60.0}, "fairness": fairness}
    return CounterService(FairServeArgs.model_validate(settings).model_dump_json(), unix_s=lambda: NOON)


def report(seq: int, num_output: int, epoch: int = 0) -> StepReport:
    totals = {"acme/ann": Totals(10, 4, num_output, 10.0 + 2 * num_output)}
    return StepReport("r0", 1, seq, epoch, 1000, 4, 1000, 4, totals=totals, is_full=epoch > 0)


async def saved(service: CounterService) -> None:
    store = service.main.upkeep.store
    assert store is not None
    await service.main.upkeep.keep(store)


async def test_usage_goes_on_in_the_next_life_exactly(tmp_path: Path) -> None:
    first = service_at(tmp_path / "c.sqlite")
    await first.report(report(1, 5))
    await saved(first)
    await first.report(report(2, 7))  # and nobody saves that
    second = service_at(tmp_path / "c.sqlite")
    await second.report(report(3, 8, epoch=first.dispatcher.epoch))
    assert await second.usage(20_000, 20_000) == {
        "rows": [(20_000, "acme/ann", 0, 10, 4, 8, 26.0, MODEL)],
        "next_day": None,
    }


async def test_usage_by_hour_goes_on_in_the_next_life_and_sums_up_to_the_day(tmp_path: Path) -> None:
    first, hour = service_at(tmp_path / "c.sqlite"), int(NOON // 3_600)
    await first.report(report(1, 5))
    await saved(first)
    await first.report(report(2, 7))  # and nobody saves that
    second = service_at(tmp_path / "c.sqlite")
    second.main.usage.turn(NOON + 3_600)
    await second.report(report(3, 8, epoch=first.dispatcher.epoch))
    rows = [(hour, "acme/ann", 0, 10, 4, 5, 20.0, MODEL), (hour + 1, "acme/ann", 0, 0, 0, 3, 6.0, MODEL)]
    assert await second.usage_by_hour(0, hour + 1) == {"rows": rows, "next_hour": None}
    assert (await second.usage(20_000, 20_000))["rows"] == [(20_000, "acme/ann", 0, 10, 4, 8, 26.0, MODEL)]


async def test_usage_by_hour_is_refused_where_none_is_kept(tmp_path: Path) -> None:
    service = service_at(tmp_path / "c.sqlite")
    args = FairServeArgs.model_validate({"counter": {"store": str(tmp_path / "c.sqlite"), "usage_hour_days": 0}})
    await service.configure(args.model_dump_json())
    with pytest.raises(InvalidRequest, match=r"counter\.usage_hour_days is 0"):
        await service.usage_by_hour(0, 10**6)


async def test_a_day_that_fills_a_page_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairserve.cluster.counter_service.USAGE_PAGE", 1)
    service = service_at(tmp_path / "c.sqlite")
    book = service.main.authority.usage
    for day in range(3):
        book.turn(NOON + day * 86_400)
        book.accepted("ann")
        book.accepted("bob")
    page = await service.usage(0, 20_001)
    assert [row[:2] for row in page["rows"]] == [(20_000, "ann"), (20_000, "bob")]
    assert page["next_day"] == 20_001
    assert (await service.usage(20_001, 20_001))["next_day"] is None


async def test_budgets_are_refused_shown_and_changed_while_the_service_runs(tmp_path: Path) -> None:
    service = service_at(tmp_path / "c.sqlite", group_budgets={"acme": {"month": {"hard": 1_000}}})
    await service.report(report(1, 5))
    client = RouterClient(RouterBook("router", 1), Wire(service), CONFIG, SystemClock())
    view = await service.set_client("acme/ann", {"budgets": {"day": {"hard": 20}}}, "root")
    told = [(one["of"], one["window"], one["hard"], one["used"]) for one in view["budgets"]]
    assert told == [("acme", "month", 1_000, 15), ("acme/ann", "day", 20, 15)]
    with pytest.raises(BudgetSpent, match="the day budget of 'acme/ann'"):
        await client.acquire(Submit("r1", "acme/ann", 5, 5))
    await service.set_settings({"fairness.group_budgets": {"acme": {"month": {"hard": 16}}}}, "root")
    await service.set_client("acme/ann", {"budgets": None}, "root")
    with pytest.raises(BudgetSpent, match="the month budget of 'acme'"):
        await client.acquire(Submit("r2", "acme/bob", 5, 5))
    await client.close()
