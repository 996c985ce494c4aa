"""What the counter actor tells replicas of its snapshots: only what is saved may be closed there."""

from __future__ import annotations

from pathlib import Path

from fairserve.cluster.counter_service import CounterService
from fairserve.config import FairServeArgs
from fairserve.dispatch.messages import StepReport, Totals


def args(store: Path | None) -> str:
    settings = {"counter": {"store": None if store is None else str(store), "snapshot_s": 60.0}}
    return FairServeArgs.model_validate(settings).model_dump_json()


def report(seq: int) -> StepReport:
    return StepReport("r0", 1, seq, 0, 100, 4, 100, 4, totals={"ann": Totals(seq, 0, 0, float(seq))})


async def test_a_report_counts_as_saved_once_a_snapshot_holds_it(tmp_path: Path) -> None:
    service = CounterService(args(tmp_path / "counters.sqlite"))
    first = await service.report(report(1))
    assert (first.ack, first.saved) == (1, 0)
    store = service.main.upkeep.store
    assert store is not None
    await service.main.upkeep.keep(store)
    second = await service.report(report(2))
    assert (second.ack, second.saved) == (2, 1)
    again = CounterService(args(tmp_path / "counters.sqlite"))
    assert (await again.report(report(3))).saved == 0, "of what it may lose itself, a new life has saved nothing yet"


async def test_a_snapshot_that_cannot_be_written_saves_nothing(tmp_path: Path) -> None:
    service = CounterService(args(tmp_path / "counters.sqlite"))
    await service.report(report(1))
    store = service.main.upkeep.store
    assert store is not None
    store.path = tmp_path / "no folder" / "\0"
    await service.main.upkeep.keep(store)
    assert (await service.report(report(2))).saved == 0


async def test_where_nothing_is_saved_what_is_merged_is_as_good() -> None:
    reply = await CounterService(args(None)).report(report(1))
    assert (reply.ack, reply.saved) == (1, 1)
