"""The attacks: each asks for what the honest client asks for; what is measured of a run, and what is said of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import attacks
from benchmarks.attack_cases import ATTACKER, ATTACKS, BURST_S, BUSY, MODEST, Attack, is_attacker, useful_input
from benchmarks.attack_runs import COLUMNS, OURS, Seen, lead, received, waits_since
from benchmarks.attacks import Cell, table, verdicts
from benchmarks.published import FirstTokenFree, PublishedVtc, PublishedVtcBook, PublishedWsc, PublishedWscBook
from fairserve.engine.request import GenerateRequest
from fairserve.engine.sampling import SamplingParams
from fairserve.fairness.policy import Policy
from fairserve.fairness.queue import FairQueue
from fairserve.fairness.vtc import Vtc
from fairserve.simulate.records import Arrival, RequestRecord, RunRecord

SEED = 3
FLOOD = "flood: four times as much"


def sent(name: str, *, honest: bool) -> list[Arrival]:
    """The attacker's requests."""
    return [one for one in ATTACKS[name].arrivals(SEED, honest=honest) if is_attacker(one.client)]


def tokens(requests: list[Arrival]) -> tuple[int, int]:
    return sum(one.num_input for one in requests), sum(one.num_output for one in requests)


# -- the attacks -------------------------------------------------------------------------------------------------------

SAME_TOKENS = [
    name
    for name in ATTACKS
    if not name.startswith(("flood", "50 long", "abort", "max_tokens far too low", "four requests", "the same four"))
]


@pytest.mark.parametrize("name", SAME_TOKENS)
def test_an_attack_asks_for_the_same_tokens_as_the_honest_client(name: str) -> None:
    assert tokens(sent(name, honest=False)) == tokens(sent(name, honest=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_victims_send_the_same_whatever_the_attacker_does(name: str) -> None:
    honest, attacked = (
        [one for one in ATTACKS[name].arrivals(SEED, honest=is_honest) if not is_attacker(one.client)]
        for is_honest in (True, False)
    )
    assert honest == attacked
    assert {one.client for one in honest} == {*MODEST, *BUSY}


@pytest.mark.parametrize("name", ATTACKS)
def test_requests_come_in_order_under_names_of_their_own(name: str) -> None:
    arrivals = ATTACKS[name].arrivals(SEED, honest=False)
    assert [one.arrival_s for one in arrivals] == sorted(one.arrival_s for one in arrivals)
    assert len({one.request_id for one in arrivals}) == len(arrivals)


@pytest.mark.parametrize("name", [name for name in ATTACKS if "four requests" in name or "same four" in name])
def test_four_in_one_carry_the_tokens_of_all_four(name: str) -> None:
    merged, single = sent(name, honest=False), sent(name, honest=True)
    assert tokens(merged) == tokens(single) and len(merged) == -(-len(single) // 4)


def test_only_the_flood_wants_more() -> None:
    assert tokens(sent(FLOOD, honest=False)) == tuple(4 * n for n in tokens(sent(FLOOD, honest=True)))


def test_fifty_at_once_are_fifty_at_once() -> None:
    assert [one.arrival_s for one in sent("50 long requests at once", honest=False)] == [BURST_S] * 50


@pytest.mark.parametrize("num_keys", [2, 5, 20])
def test_a_sybils_keys_are_of_one_tenant_only_where_tenants_are_known(num_keys: int) -> None:
    attack = ATTACKS[f"sybil: {num_keys} keys"]
    for knows, separator in ((True, "/"), (False, ".")):
        arrivals = attack.arrivals(SEED, honest=False, knows_tenants=knows)
        names = {one.client for one in arrivals if is_attacker(one.client)}
        assert len(names) == num_keys and all(name.startswith(ATTACKER + separator) for name in names)


def test_pieces_of_an_answer_make_the_whole_and_what_is_sent_again_is_not_useful() -> None:
    pieces, whole = (sent("max_tokens far too low", honest=is_honest) for is_honest in (False, True))
    assert tokens(pieces)[1] == tokens(whole)[1] and max(one.max_output for one in pieces) == 32
    assert sum(useful_input(RequestRecord(one, num_input=one.num_input)) for one in pieces) == tokens(whole)[0]


def test_a_false_index_is_a_new_task_each_time_and_claims_to_be_in_the_middle() -> None:
    late = [one for one in sent("false call_index", honest=False) if one.arrival_s >= BURST_S]
    assert {one.call_index for one in late} == {7}
    assert max(Counter(one.interaction for one in late).values()) == 1


# -- what is seen of a run ---------------------------------------------------------------------------------------------


def a_run(*service: tuple[float, float, float]) -> RunRecord:
    """(at_s, service of the attacker, of busy-0), where busy-0 waits from 2 s on without end."""
    record = RunRecord("s", "vtc", 0, 10.0)
    record.service = [(at_s, {ATTACKER: mine, "busy-0": theirs}) for at_s, mine, theirs in service]
    record.requests = [
        RequestRecord(Arrival("early", 0.0, "busy-0", 1, 1, 1), first_token_s=1.0, granted_s=1.0),
        RequestRecord(Arrival("waits", 2.0, "busy-0", 1, 1, 1)),
    ]
    return record


def test_service_is_of_all_names_within_the_window() -> None:
    record = a_run((0.0, 0.0, 0.0), (2.0, 50.0, 5.0), (6.0, 80.0, 10.0), (10.0, 90.0, 30.0))
    assert received(record, {ATTACKER, "busy-0"}, (2.0, 10.0)) == 40.0 + 25.0
    assert received(record, {ATTACKER}, (0.0, 6.0)) == 80.0


def test_the_lead_counts_only_while_the_victim_waits() -> None:
    record = a_run((0.0, 0.0, 0.0), (2.0, 500.0, 0.0), (4.0, 500.0, 40.0), (6.0, 560.0, 50.0), (10.0, 560.0, 90.0))
    assert waits_since(record, "busy-0", 0.0) == 2.0
    assert lead(record, {ATTACKER}, "busy-0", 0.0) == 50.0
    assert lead(record, {ATTACKER}, "busy-0", 6.0) == 0.0


def test_nobody_leads_whom_nobody_waits_behind() -> None:
    assert lead(a_run((0.0, 0.0, 0.0), (9.0, 900.0, 0.0)), {ATTACKER}, "busy-1", 0.0) == 0.0


# -- verdicts ----------------------------------------------------------------------------------------------------------

LEVEL = Seen(100.0, 400.0, 200.0, 1.0, 10.0, 100.0, 5.0, 1_000.0, 0)


def cell(**attacked: float) -> Cell:
    return Cell.of([LEVEL, LEVEL], [replace(LEVEL, **attacked)] * 2)


@pytest.mark.parametrize(
    ("attacked", "holds"),
    [
        ({}, True),
        ({"attacker": 105.0}, True),
        ({"attacker": 106.0, "victims": 399.0}, False),
        ({"attacker": 120.0, "rivals": 240.0}, True),  # the cluster did more work, and everybody had some of it
        ({"attacker": 120.0, "rivals": 200.0}, False),
    ],
)
def test_a_share_is_kept_unless_the_gain_is_anothers_loss(attacked: dict[str, float], holds: bool) -> None:
    assert cell(**attacked).keeps_its_share is holds


def test_a_gain_is_the_mean_of_ratios_seed_by_seed() -> None:
    made = Cell.of([LEVEL, replace(LEVEL, attacker=50.0)], [replace(LEVEL, attacker=200.0), LEVEL])
    assert made.gain.mean == 2.0 and made.gain.num == 2


def made(name: str, **attacked: float) -> attacks.Verdict:
    attack = ATTACKS[name]
    (verdict,) = verdicts([attack], {(name, column): cell(**attacked) for column in attack.columns})
    return verdict


def test_an_attack_that_can_be_made_once_is_judged_by_the_bound_not_by_its_gain() -> None:
    assert made("idle, then burst", attacker=200.0, lead=99.0).holds
    assert not made("idle, then burst", lead=101.0).holds
    assert not made("sybil: 2 keys", attacker=200.0, lead=0.0).holds


def test_what_does_not_hold_is_broken_unless_the_reason_is_known() -> None:
    assert str(made(FLOOD, attacker=200.0)).startswith("BROKEN")
    told = str(made("forged label", attacker=200.0))
    assert told.startswith("known ") and "learned from all its requests" in told
    assert str(made("forged label")).startswith("holds ")


def test_a_policy_that_cannot_tell_the_attack_from_honest_behaviour_has_a_dash() -> None:
    attack = ATTACKS["forged label"]
    text = table([ATTACKS[FLOOD], attack], {(attack.name, column): cell() for column in attack.columns})
    assert "fcfs" in text.splitlines()[0] and " - " in text.splitlines()[-1]
    assert "1.00±0.00 / 1.00 / 1.0" in text.splitlines()[-1]


def test_every_attack_is_made_on_ours_and_every_policy_is_known() -> None:
    for attack in ATTACKS.values():
        assert set(attack.columns) <= set(COLUMNS) and set(attack.columns) & set(OURS)


# -- what the authors' code does ---------------------------------------------------------------------------------------


def idle_then_back(policy: Policy) -> float:
    """How far behind a client comes back that idled while another was served, and finds it waiting nowhere."""
    queue: FairQueue[str] = FairQueue(policy)
    queue.arrive("ann", "a0", "a0", 0.0)
    queue.pop()
    queue.charge("ann", 500.0)
    queue.arrive("bob", "b0", "b0", 1.0)
    return queue.counter("ann") - queue.counter("bob")


def test_published_vtc_forgets_the_lift_when_the_queue_is_empty_and_ours_does_not() -> None:
    assert idle_then_back(PublishedVtc()) == 500.0
    assert idle_then_back(Vtc()) == 0.0


def test_published_vtc_gives_the_first_token_away() -> None:
    assert [FirstTokenFree().service(10, num_output) for num_output in (0, 1, 2)] == [10, 10, 12]


def request(name: str) -> GenerateRequest:
    return GenerateRequest(name, name, [1] * 10, SamplingParams(max_tokens=8))


def test_under_published_vtc_everybody_pays_when_somebody_ends() -> None:
    book = PublishedVtcBook()
    for name in ("ends", "stays"):
        book.received(request(name))
        book.push(request(name))
        book.pop()
        book.started(name, 10, 0)
        book.output(name, 2)
    before = book.counter("stays")
    book.finished("ends")
    assert book.counter("stays") == before + 2.0


def test_under_published_wsc_nothing_is_charged_before_the_end() -> None:
    book = PublishedWscBook()
    book.received(request("ann"))
    book.push(request("ann"))
    book.pop()
    book.started("ann", 10, 0)
    book.output("ann", 3)
    assert book.counter("ann") == 0.0
    book.finished("ann")
    assert book.counter("ann") == 10 + 2 * 3


def test_under_published_wsc_a_large_label_makes_a_small_request_cheap() -> None:
    policy = PublishedWsc()
    for application, service in (("report", 2_000.0), ("chat", 1_000.0)):
        policy.finished("victim", application, "r0", 0.0, service)
    assert policy.price("mallory", "report") < policy.price("mallory", "chat")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_its_table_writes_its_data_and_exits_as_the_verdicts_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--seeds", "1", "--jobs", "1", "--only", "the same, expected", "--out", str(tmp_path / "out")]
    code = attacks.main(words)
    printed = capsys.readouterr().out
    assert code == ("BROKEN" in printed)
    data = json.loads((tmp_path / "out" / "attacks.json").read_text())
    (row,), (verdict,) = data["rows"], data["verdicts"]
    assert (row["attack"], row["policy"]) == (verdict["attack"], "wsc") == ("the same, expected_service given", "wsc")
    assert f"{row['gain']['mean']:.2f} / {row['victims']:.2f} / {row['ttft']:.1f}" in printed
    assert verdict["holds"] and row["attacked"][0]["bound"] > 0


@pytest.mark.parametrize("words", [["--only", "nothing like it"], ["--seeds", "0"], ["--jobs", "0"]])
def test_nothing_to_run_is_said_with_the_names_there_are(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attacks.main(words)
    assert "flood: four times as much" in capsys.readouterr().err


def test_attacks_that_share_their_surroundings_share_the_honest_run() -> None:
    def worlds(*names: str) -> set[object]:
        return {ATTACKS[name].surroundings for name in names}

    assert len(worlds(FLOOD, "sybil: 2 keys", "many tiny requests")) == 1
    assert len(worlds("one endless interaction", "the same, limit below the share")) == 2
    assert isinstance(ATTACKS[FLOOD], Attack)
