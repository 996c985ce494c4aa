"""Several models of one service: their counters apart, or compared in a common price; what they share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fairserve.clock import VirtualClock
from fairserve.cluster.counter_service import CounterService
from fairserve.config import FairServeArgs
from fairserve.dispatch.messages import NOTHING, RouterCall, StepReport, Submit, Totals
from fairserve.dispatch.status import status
from fairserve.errors import BudgetSpent, UnknownModel

NOON = 20_000 * 86_400 + 43_200.0
ROOM = (1_000, 1, 1_000, 1)
"""One slot."""


def settings(**more: Any) -> dict[str, Any]:
    models = [{"served_model_name": "big", "price": 4.0}]
    return (
        {"served_model_name": "small", "more_models": models, "counter": {"store": None}}
        | {"dispatch": {"lookahead": 0}}
        | more
    )


class Scene:
    """One replica of one slot for each model, one router, requests of 10 input and 10 output tokens."""

    def __init__(self, **more: Any) -> None:
        self.args = FairServeArgs.model_validate(settings(**more))
        self.clock = VirtualClock(1_000.0)
        self.seq = 0
        self.served: dict[str, dict[str, Totals]] = {}
        self.service = self.begin()

    def begin(self, epoch: int = 1) -> CounterService:
        """A life of the authority."""
        json = self.args.model_dump_json()
        self.service = CounterService(json, clock=self.clock, epoch=epoch, unix_s=lambda: NOON)
        return self.service

    def counters(self, model: str) -> Any:
        return self.service._of(model).dispatcher

    async def wait(self, model: str, *clients: str, **more: Any) -> Any:
        """A request of each."""
        self.seq += 1
        submits = tuple([Submit(f"{model}-{self.seq}-{one}", one, 10, 10, **more) for one in clients])
        return await self.service.route(RouterCall(f"router-{model}", 1, self.seq, 0, submits), model)

    async def report(
        self, model: str, *, free: bool = True, is_full: bool = False, ran: tuple[str, ...] = (), **served: float
    ) -> None:
        """``served``: client -> output tokens since the last report; ``ran``: requests that came, began and ended."""
        self.seq += 1
        totals = self.served.setdefault(model, {})
        for client, tokens in served.items():
            had = totals.get(client, NOTHING)
            totals[client] = had + Totals(0, 0, int(tokens), 2.0 * tokens)
        told = totals if is_full else {client: totals[client] for client in served}
        epoch = self.counters(model).epoch
        room = ROOM if free else (1_000, 0, 1_000, 1)
        await self.service.report(
            StepReport(
                f"replica-{model}",
                1,
                self.seq,
                epoch,
                *room,
                totals=dict(told),
                is_full=is_full,
                received=ran,
                started=ran,
                finished=ran,
            ),
            model,
        )

    async def exchange(self) -> None:
        await self.service._across.exchange()

    def counter(self, model: str, client: str) -> float:
        return float(self.counters(model).queue.table.counter(client))


def test_the_settings_of_one_of_several_models_are_those_of_one_served_alone() -> None:
    paths = {"store": "/kept/c.sqlite", "decision_log_path": "/kept/log.jsonl"}
    engine = {"max_num_seqs": 3}
    models = [{"served_model_name": "org/big one", "num_replicas": 5, "engine": engine}]
    whole = FairServeArgs.model_validate(settings(more_models=models, counter=paths, num_replicas=7))
    big, small = whole.of_model("org-big-one"), whole.of_model("")
    assert (big.model_name, big.num_replicas, big.engine.max_num_seqs) == ("org/big one", 5, 3)
    assert (big.counter.store, big.counter.decision_log_path) == (
        "/kept/c.org-big-one.sqlite",
        "/kept/log.org-big-one.jsonl",
    )
    assert big.counter.name == "fairserve-counters.org-big-one"
    assert small == whole.model_copy(update={"more_models": ()})
    assert (big.dispatch, big.slots) == (whole.dispatch, ("",))
    alone = FairServeArgs(num_replicas=2)
    assert alone.of_model("") is alone
    with pytest.raises(KeyError):
        whole.of_model("org/big one")


@pytest.mark.parametrize("other", ["small", "sm/all", "sm all"])
def test_two_models_of_one_name_or_slot_are_refused(other: str) -> None:
    first = "small" if other == "small" else "sm-all"
    with pytest.raises(ValidationError, match="two models"):
        FairServeArgs.model_validate(settings(served_model_name=first, more_models=[{"served_model_name": other}]))


@pytest.mark.parametrize("name", ["small", "big", "twice"])
def test_an_adapter_takes_no_name_that_is_taken(name: str) -> None:
    models = [{"served_model_name": "big", "engine": {"adapters": {"twice": "/a"}}}]
    with pytest.raises(ValidationError, match=f"served as '{name}': names must differ"):
        FairServeArgs.model_validate(settings(more_models=models, engine={"adapters": {name: "/b"}}))


async def test_each_model_has_counters_and_a_queue_of_its_own() -> None:
    scene = Scene()
    for model in ("", "big"):
        await scene.wait(model, "ann", "bob")
    await scene.report("", free=False, ann=5)
    await scene.exchange()
    assert scene.counter("", "ann") - scene.counter("", "bob") == 10.0
    assert scene.counter("big", "ann") == scene.counter("big", "bob")
    assert scene.counters("big").room.num_waiting("ann") == 1
    assert (await scene.service.overview(model="big"))["model"] == "big"
    assert (await scene.service.client("ann", model="small"))["num_output"] == 5
    scene.service.end()


async def test_a_model_that_is_not_served_is_named_with_those_that_are() -> None:
    scene = Scene()
    with pytest.raises(UnknownModel, match=r"huge.*available: small, big"):
        await scene.service.overview(model="huge")
    scene.service.end()


@pytest.mark.parametrize(("across", "lead"), [(True, 10.0 / 4), (False, 0.0)])
async def test_service_by_one_model_counts_at_the_other_by_their_prices(across: bool, lead: float) -> None:
    scene = Scene(across_models=across)
    await scene.exchange()
    for model in ("", "big"):
        await scene.wait(model, "ann", "bob")
    await scene.report("", free=False, ann=5)
    await scene.report("", free=False)
    for _ in range(2):
        await scene.exchange()  # the same once more adds nothing
    assert scene.counter("big", "ann") - scene.counter("big", "bob") == lead
    await scene.report("big", free=False, bob=5)
    await scene.exchange()
    ahead = scene.counter("", "ann") - scene.counter("", "bob")
    assert ahead == (10.0 - 4 * 10.0 if across else 10.0)
    used = [(row[1], *row[5:]) for row in (await scene.service.usage(0, 30_000))["rows"] if row[6]]
    assert used == [("ann", 5, 10.0, "small"), ("bob", 5, 10.0, "big")], "usage is told where it was served"
    scene.service.end()


@pytest.mark.parametrize("across", [True, False])
async def test_whoever_is_served_by_a_dear_model_waits_behind_the_others_at_a_cheap_one(across: bool) -> None:
    scene = Scene(across_models=across)
    await scene.exchange()
    got = {("", "ann"): 0, ("", "bob"): 0, ("big", "ann"): 0}
    for model, client in got:
        await scene.wait(model, client)
    for turn in range(60):
        for model, clients in (("", ("ann", "bob")), ("big", ("ann",))):
            await scene.wait(model, *(one for one in clients if scene.counters(model).room.num_waiting(one) < 2))
            await scene.report(model)  # one slot is free
            scene.seq += 1
            grants = (
                await scene.service.route(RouterCall(f"router-{model}", 1, scene.seq, 1, grants_ack=turn), model)
            ).grants
            request_id = grants[-1].request_id
            got[model, client := request_id.rsplit("-", 1)[1]] += 1
            await scene.report(model, free=False, ran=(request_id,), **{client: 10})
            await scene.exchange()
    assert got["big", "ann"] == 60
    if across:
        assert got["", "ann"] <= 1, "a request of the big model counts more than one of the small one"
    else:
        assert got["", "ann"] == 30
    scene.service.end()


@pytest.mark.parametrize("seed", range(4))
async def test_gaps_stay_within_the_bound_whatever_the_other_model_serves(seed: int) -> None:
    rng = random.Random(seed)
    scene = Scene(across_models=True)
    await scene.exchange()
    clients, turns = ("ann", "bob", "cat"), {"": 0, "big": 0}
    for _ in range(150):
        model = rng.choice(("", "big"))
        dispatcher = scene.counters(model)
        await scene.wait(model, *(one for one in clients if dispatcher.room.num_waiting(one) < rng.choice((1, 2))))
        await scene.report(model)
        scene.seq += 1
        call = RouterCall(f"router-{model}", 1, scene.seq, 1, grants_ack=turns[model])
        for grant in (await scene.service.route(call, model)).grants:
            turns[model] += 1
            client = grant.request_id.rsplit("-", 1)[1]
            await scene.report(model, free=False, ran=(grant.request_id,), **{client: rng.randint(1, 10)})
        if rng.random() < 0.5:
            await scene.exchange()
        for each in ("", "big"):
            found = status(scene.counters(each), scene.clock.now_s())
            assert found["worst_gap"] <= found["bound"], (each, found["worst_gap"], found["bound"])
    assert min(turns.values()) > 40
    scene.service.end()


async def test_after_a_restart_nothing_counts_twice_and_nothing_is_lost(tmp_path: Path) -> None:
    scene = Scene(across_models=True, counter={"store": str(tmp_path / "c.sqlite")})
    await scene.exchange()
    for model in ("", "big"):
        await scene.wait(model, "ann", "bob")
        await scene.report(model, free=False, bob=1)
    await scene.report("", free=False, ann=5)
    await scene.exchange()
    for model in ("", "big"):
        upkeep = scene.service._of(model).upkeep
        assert upkeep.store is not None
        await upkeep.keep(upkeep.store)
        if not model:  # the first model's snapshot is older than the other's
            await scene.report("", free=False, ann=3)
            await scene.exchange()
    before = {name: scene.counter("big", name) - scene.counter("big", "bob") for name in ("ann",)}
    scene.service.end()
    scene.begin(epoch=2)
    for model in ("", "big"):
        await scene.wait(model, "bob", "ann")  # as a router would, the least served first
        await scene.report(model, free=False, is_full=True)
    await scene.exchange()
    assert scene.counter("big", "ann") - scene.counter("big", "bob") == pytest.approx(before["ann"])
    assert before["ann"] == pytest.approx(16.0 / 4 + (2.0 / 4 - 2.0 / 4) - 2.0 - 2.0 / 4)
    assert {path.name for path in tmp_path.iterdir()} >= {"c.big.sqlite", "c.sqlite"}  # noqa: ASYNC240
    scene.service.end()


async def test_switched_on_late_it_begins_from_then_on() -> None:
    scene = Scene()
    for model in ("", "big"):
        await scene.wait(model, "ann", "bob")
    await scene.report("", free=False, ann=50)
    await scene.service.configure(scene.args.model_copy(update={"across_models": True}).model_dump_json())
    await scene.exchange()
    assert scene.counter("big", "ann") == scene.counter("big", "bob")
    await scene.report("", free=False, ann=5)
    await scene.exchange()
    assert scene.counter("big", "ann") - scene.counter("big", "bob") == 10.0 / 4
    scene.service.end()


async def test_a_weight_a_pause_and_a_setting_hold_for_all_models() -> None:
    scene = Scene()
    await scene.service.set_client("ann", {"weight": 3.0, "is_paused": True}, "root")
    await scene.service.set_settings({"dispatch.lookahead": 0}, "root")
    for model in ("", "big"):
        view = await scene.service.client("ann", model=model)
        assert (view["weight"], view["is_paused"]) == (3.0, True)
        assert scene.counters(model).limits.lookahead == 0
    scene.service.end()


async def test_a_budget_is_of_all_models_together() -> None:
    scene = Scene()
    budgets = (("day", 100, 200),)
    await scene.wait("", "ann", budgets=budgets)
    await scene.wait("big", "ann", budgets=budgets)
    await scene.report("", free=False, ann=60)
    scene.counters("").tick(scene.clock.now_s())
    await scene.report("big", free=False, ann=60)
    for model in ("", "big"):
        scene.counters(model).tick(scene.clock.now_s())
        assert scene.counters(model).queue.table.weight("ann") == 0.1, "the soft one is passed by both together"
    told = (await scene.service.client("ann", model="big"))["budgets"]
    assert (told[0]["used"], told[0]["promised"]) == (120, 2 * 11)
    await scene.report("", free=False, ann=60)
    reply = await scene.wait("big", "ann", budgets=budgets)
    assert isinstance(reply.refusals[0].error, BudgetSpent)
    assert reply.refusals[0].error.fields["used"] == 180
    rows = (await scene.service.usage(0, 30_000))["rows"]
    assert [(row[5], row[-1]) for row in rows] == [(60, "big"), (120, "small")], "and usage is told by model"
    assert (await scene.service.usage(0, 30_000, model="big"))["rows"] == rows[:1]
    scene.service.end()


async def test_a_model_comes_with_a_deployment_and_goes_when_it_is_idle() -> None:
    scene = Scene()
    models = [*scene.args.more_models, scene.args.more_models[0].model_copy(update={"served_model_name": "new"})]
    await scene.service.configure(scene.args.model_copy(update={"more_models": tuple(models)}).model_dump_json())
    await scene.wait("new", "ann")
    await scene.service.configure(scene.args.model_copy(update={"more_models": ()}).model_dump_json())
    await scene.service._tick()
    assert [one["name"] for one in await scene.service.models()] == ["small", "new"], "somebody still waits there"
    scene.clock.advance(100.0)
    scene.counters("new").tick(scene.clock.now_s())
    await scene.service._tick()
    assert [one["name"] for one in await scene.service.models()] == ["small"]
    scene.service.end()
