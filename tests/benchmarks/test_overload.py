"""The parts of `benchmarks.overload` that count; the whole is run by hand."""

from __future__ import annotations

import httpx
import pytest

from benchmarks.load import Record
from benchmarks.overload import CROWD, FLOODING, Memory, Names, Tally, _ttft, flood_plan, polite_think_s


def test_the_plan_asks_for_the_rate_and_the_crowd_never_uses_a_name_twice() -> None:
    plan = flood_plan(rate_rps=50.0, duration_s=100.0, seed=1)
    assert len(plan) == pytest.approx(5_000, rel=0.1)
    assert {one.client for one in plan} >= set(FLOODING)
    crowd = [one.client for one in plan if one.client.startswith(CROWD)]
    assert len(crowd) == len(set(crowd)) > 50
    assert plan == sorted(plan, key=lambda one: one.at_s)
    assert Names()[crowd[0]] == crowd[0]


def test_polite_clients_ask_for_half_of_their_share() -> None:
    capacity_rps = 8.0
    fair_rps = 0.75 * capacity_rps / (3 + len(FLOODING))
    assert 1 / polite_think_s(capacity_rps) == pytest.approx(fair_rps / 2)


async def test_refusals_without_a_usable_retry_after_are_counted() -> None:
    tally = Tally()
    for status, headers in (
        (200, {}),
        (429, {"retry-after": "3"}),
        (429, {"retry-after": "7"}),
        (429, {"retry-after": "0"}),
        (429, {}),
    ):
        await tally.saw(httpx.Response(status, headers=headers))
    assert tally.statuses == {"200": 1, "429": 4}
    assert (tally.without_retry_after, tally.least_retry_after_s, tally.most_retry_after_s) == (2, 3.0, 7.0)


def test_memory_is_compared_between_the_first_and_the_last_third() -> None:
    memory = Memory()
    for t_s, rss in enumerate((900.0, 10.0, 12.0, 11.0, 50.0, 20.0, 22.0)):
        memory.samples.append(
            {"t_s": float(t_s), "rss_mb": {"ray::Model#7": rss} | ({"gone#8": 1.0} if t_s < 3 else {})}
        )
    (row,) = memory.figures(since_s=1.0)
    assert row == {"process": "ray::Model", "first_third": 11.0, "last_third": 21.0, "most": 50.0}


def test_a_request_that_still_waits_for_its_first_token_counts_with_its_age() -> None:
    records = [Record("p", submit_s=0.0, first_s=float(i)) for i in range(1, 101)]
    figures = _ttft([*records, Record("p", submit_s=0.0, error="HTTP 429"), Record("p", submit_s=0.0)], until_s=500.0)
    assert (figures["requests"], figures["errors"]) == (102, {"HTTP 429": 1})
    assert (figures["still_without_first_token"], figures["ttft_max_s"]) == (1, 500.0)
    assert figures["ttft_p50_s"] == pytest.approx(51.0)
