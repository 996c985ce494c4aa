"""Token budgets: hard ones refuse, soft ones weigh less, and a burst cannot overshoot by more than what runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairserve.dispatch.budgets import BudgetSettings, rows_of
from fairserve.dispatch.controls import Control
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import Standing
from fairserve.dispatch.periods import DAY_S
from fairserve.errors import BudgetSpent
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.prediction import Foretold
from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit

NOON = 20_000 * DAY_S + DAY_S / 2
HARD = (("day", None, 100),)


class Scene:
    """A desk at noon with one replica; ``run`` serves a request from its beginning to its end."""

    def __init__(self, desk: Desk, **groups: Any) -> None:
        self.desk = desk
        self.usage = desk.dispatcher.usage
        if groups:
            state = desk.dispatcher.state
            groups_only = BudgetSettings({name: rows_of(plain) for name, plain in groups.items()})
            state.budgets.__init__(self.usage, state.controls, state.predictor, groups_only)  # type: ignore[misc]
        self.usage.turn(NOON)
        self.replica: ReplicaVoice = desk.replica(slots=100, kv=100_000)
        self.router: RouterVoice = desk.router()

    def send(self, request_id: str, client: str = "ann", *, budgets: Any = HARD, **more: Any) -> BudgetSpent | None:
        self.router.call(submit(request_id, client, budgets=budgets, **more))
        error = self.router.refused.get(request_id)
        assert error is None or isinstance(error, BudgetSpent)
        return error

    def run(self, request_id: str, client: str, num_input: int, num_output: int) -> None:
        self.replica.report(received=(request_id,), started=(request_id,), served={client: (num_input, 0)})
        self.replica.report(finished=(request_id,), served={client: (0, num_output)})


@pytest.fixture
def scene(desk: Desk) -> Scene:
    return Scene(desk)


def test_a_request_that_the_budget_has_no_room_for_is_refused_with_every_number(scene: Scene) -> None:
    assert scene.send("r1", num_input=60) is None
    scene.run("r1", "ann", 60, 20)
    error = scene.send("r2", num_input=30)
    assert error is not None and error.reason == "insufficient_quota"
    told = {name: error.fields[name] for name in ("budget", "of", "limit", "used", "promised", "asked")}
    assert told == {"budget": "day", "of": "ann", "limit": 100, "used": 80, "promised": 0, "asked": 31}
    assert error.fields["resets_at"] == "2024-10-05T00:00:00Z"
    assert error.retry_after_s == DAY_S / 2
    assert scene.send("r3", num_input=19) is None, "a smaller one has room"


def test_a_burst_is_promised_its_tokens_before_any_is_served(scene: Scene) -> None:
    answers = [scene.send(f"r{i}", num_input=30) for i in range(5)]
    assert [error is None for error in answers] == [True, True, True, False, False]
    assert answers[3] is not None and answers[3].fields["promised"] == 93
    assert answers[3].retry_after_s == 5, "what is under way may leave room"


@pytest.mark.parametrize("client", ["ann+batch", "ann+flex"])
def test_what_a_clients_batches_and_tiers_take_is_of_its_own_budget(scene: Scene, client: str) -> None:
    assert scene.send("r1", client, num_input=40) is None
    error = scene.send("r2", num_input=70)
    assert error is not None and error.fields["promised"] == 41
    scene.run("r1", client, 40, 20)
    error = scene.send("r3", client, num_input=40)
    assert error is not None and (error.fields["of"], error.fields["used"]) == ("ann", 60)
    scene.usage.check()


@pytest.mark.parametrize("where", ["waiting", "granted"])
def test_who_leaves_gives_back_what_was_promised(scene: Scene, where: str) -> None:
    if where == "waiting":
        scene.desk.dispatcher.control("ann", Control(is_paused=True), scene.desk.now_s)
    assert scene.send("r1", num_input=90) is None
    assert scene.send("r2", num_input=45) is not None
    scene.router.call(cancels=("r1",))
    assert scene.send("r3", num_input=45) is None


def test_the_next_day_begins_with_the_whole_budget(scene: Scene) -> None:
    scene.send("r1", num_input=90)
    scene.run("r1", "ann", 90, 10)
    assert scene.send("r2") is not None
    scene.usage.turn(NOON + DAY_S / 2)
    assert scene.send("r3") is None


def test_the_budget_that_is_free_again_last_says_when_to_come_back(scene: Scene) -> None:
    budgets = (("minute", None, 50), ("month", None, 60), ("day", None, 55))
    scene.send("r1", num_input=49, budgets=budgets)
    scene.run("r1", "ann", 49, 20)
    error = scene.send("r2", budgets=budgets)
    assert error is not None and error.fields["budget"] == "month"


def test_a_groups_budget_holds_for_the_sum_of_its_clients(desk: Desk) -> None:
    scene = Scene(desk, acme={"day": {"hard": 100}})
    assert scene.send("r1", "acme/research/ann", num_input=50, budgets=()) is None
    assert scene.send("r2", "acme/bob", num_input=40, budgets=()) is None
    error = scene.send("r3", "acme/eve", num_input=40, budgets=())
    assert error is not None and error.fields["of"] == "acme"
    assert scene.send("r4", "other", num_input=1_000, budgets=()) is None


def test_a_live_budget_holds_in_place_of_the_keys_and_counts_the_day_so_far(scene: Scene) -> None:
    scene.send("r1", num_input=90)
    scene.run("r1", "ann", 90, 5)
    dispatcher = scene.desk.dispatcher
    dispatcher.control("ann", Control(budgets={"day": {"hard": 1_000}}), scene.desk.now_s)
    assert scene.send("r2", num_input=500) is None
    dispatcher.control("ann", Control(budgets={}), scene.desk.now_s)
    assert scene.send("r3", num_input=5_000) is None, "an empty one is none"
    dispatcher.control("ann", Control(), scene.desk.now_s)
    error = scene.send("r4")
    assert error is not None and error.fields["used"] == 95


def test_budgets_outlive_the_authority(scene: Scene) -> None:
    scene.send("r1", num_input=90)
    scene.run("r1", "ann", 90, 5)
    rows = scene.usage.cut(is_whole=True)
    scene.desk.restart(snapshot=scene.desk.dispatcher.dump())
    usage = scene.desk.dispatcher.usage
    usage.turn(NOON)
    usage.load(rows)
    scene.router = scene.desk.router("west")
    assert scene.send("r2") is not None


def test_grants_say_what_is_left_of_the_nearest_budget_and_which_soft_one_is_passed(scene: Scene) -> None:
    budgets = (("day", 40, 100), ("month", None, 1_000))
    scene.send("r1", num_input=50, budgets=budgets)
    scene.run("r1", "ann", 50, 5)
    reply = scene.router.call(submit("r2", budgets=budgets))
    assert reply.grants[-1].standing is not None
    told = Standing(*reply.grants[-1].standing)
    assert (told.max_tokens, told.tokens_left, told.tokens_reset_s) == (100, 100 - 55 - 11, DAY_S / 2)
    assert (told.budget, told.passed) == ("day ann", "day ann")


# -- soft budgets -----------------------------------------------------------------------------------------------------


def pass_softly(scene: Scene, client: str, budgets: Any) -> None:
    scene.send("first", client, num_input=50, budgets=budgets)
    scene.run("first", client, 50, 5)
    scene.desk.wait(0.1)


def test_past_a_soft_budget_a_client_is_served_by_a_tenth_of_its_weight_until_the_day_ends(scene: Scene) -> None:
    soft = (("day", 40, None),)
    pass_softly(scene, "ann", soft)
    table = scene.desk.dispatcher.queue.table
    assert table.weight("ann") == pytest.approx(0.1)
    assert scene.send("r2", budgets=soft, weight=2.0) is None, "and nothing is refused"
    assert table.weight("ann") == pytest.approx(0.2)
    scene.desk.dispatcher.control("ann", Control(weight=5.0), scene.desk.now_s)
    assert table.weight("ann") == pytest.approx(0.5)
    scene.usage.turn(NOON + DAY_S / 2)
    scene.desk.wait(0.1)
    assert table.weight("ann") == 5.0
    scene.desk.dispatcher.control("ann", Control(), scene.desk.now_s)
    assert table.weight("ann") == 2.0


@pytest.mark.parametrize("group", ["acme", "acme/research"])
def test_past_a_groups_soft_budget_the_group_weighs_less_among_its_siblings(desk: Desk, group: str) -> None:
    scene = Scene(desk, **{group: {"day": {"soft": 40}}})
    scene.send("before", "acme/research/bob", num_input=5, budgets=())  # granted at the old weight
    pass_softly(scene, "acme/research/ann", ())
    table = scene.desk.dispatcher.queue.table
    assert table.weight(group + "/") == pytest.approx(0.1)
    assert table.weight("acme/research/ann") == table.weight("acme/research/bob") == 1.0
    desk.check()
    scene.run("before", "acme/research/bob", 5, 5)
    scene.usage.turn(NOON + DAY_S)
    desk.wait(0.1)
    assert table.weight(group + "/") == 1.0


def test_a_weight_that_counts_less_is_not_what_a_snapshot_keeps(scene: Scene) -> None:
    pass_softly(scene, "ann", (("day", 40, None),))
    assert scene.desk.dispatcher.dump()["counters"]["ann"][1] == 1.0


# -- how far a budget may be overshot ---------------------------------------------------------------------------------


def foretelling() -> Desk:
    """Outputs are as long as each request says."""
    desk = Desk()
    desk.dispatcher = Dispatcher(make_policy("vtc"), desk.cost, desk.limits, epoch=1, predictor=Foretold())
    return desk


def test_what_is_promised_to_a_request_falls_with_every_token_that_is_reported() -> None:
    scene = Scene(foretelling())
    assert scene.send("r1", num_input=30, max_output=60, predicted_output=40) is None
    made = scene.replica.compose(received=("r1",), started=("r1",), served={"ann": (30, 10)})
    scene.replica.send(replace(made, outputs={"r1": 10}))
    error = scene.send("r2", num_input=30, predicted_output=1)
    assert error is not None and (error.fields["used"], error.fields["promised"]) == (40, 30)
    scene.replica.report(finished=("r1",))
    assert scene.send("r3", num_input=30, predicted_output=1) is None
    scene.desk.check()


@dataclass
class Run:
    """A request on the replica."""

    num_input: int
    max_output: int
    foretold: int
    num_made: int = 0
    has_started: bool = False

    @property
    def not_promised(self) -> int:
        return self.max_output - self.foretold


EVENTS = st.lists(st.tuples(st.sampled_from("sssrrrfcq"), st.integers(1, 40), st.integers(1, 30), st.integers(1, 30)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=EVENTS, hard=st.integers(20, 200))
def test_a_budget_is_overshot_by_no_more_than_what_ran_beyond_its_prediction(events: Any, hard: int) -> None:
    """Requests come, run, end early, are cancelled and requeued in any order; those that were let in then run to the
    last token that they may have."""
    desk = foretelling()
    scene = Scene(desk)
    budgets = (("day", None, hard),)
    under_way: dict[str, Run] = {}
    bound = float(hard)

    def step(request_id: str, num: int) -> None:
        run = under_way[request_id]
        served, started = 0, ()
        if not run.has_started:
            run.has_started, served, started = True, run.num_input, (request_id,)
        made = min(num, run.max_output - run.num_made)
        run.num_made += made
        report = scene.replica.compose(started=started, served={"ann": (served, made)})
        scene.replica.send(replace(report, outputs={request_id: run.num_made}))

    def end(request_id: str) -> None:
        del under_way[request_id]
        scene.replica.report(finished=(request_id,))

    for i, (kind, a, b, c) in enumerate(events):
        chosen = list(under_way)[a % len(under_way)] if under_way else None
        if kind == "s":
            run = Run(a, max(b, c), min(b, c))
            sent = {"num_input": a, "max_output": run.max_output, "predicted_output": run.foretold}
            if scene.send(f"r{i}", budgets=budgets, **sent) is None:
                under_way[f"r{i}"] = run
                scene.replica.report(received=(f"r{i}",))
                bound = hard + sum(run.not_promised for run in under_way.values())
        elif chosen is not None and kind == "r":
            step(chosen, b)
        elif chosen is not None and kind == "f":
            end(chosen)
        elif chosen is not None and kind == "c":
            scene.router.call(cancels=(chosen,))
            end(chosen)
        elif chosen is not None and not under_way[chosen].has_started:
            desk.dispatcher._stages.requeue(chosen, desk.now_s)
            desk.dispatcher.dispatch(desk.now_s)
            scene.replica.report(received=(chosen,))
        desk.check()
    for request_id in list(under_way):
        step(request_id, 10**6)
        end(request_id)
    (row,) = scene.usage.rows(20_000).values() or [(0, 0, 0, 0, 0.0)]
    assert row[1] + row[3] <= bound
    assert not desk.dispatcher.budgets._promised, "nothing is under way"


def test_without_any_budget_nothing_is_promised(desk: Desk) -> None:
    Scene(desk).send("r1", budgets=())
    assert not desk.dispatcher.budgets._promises
