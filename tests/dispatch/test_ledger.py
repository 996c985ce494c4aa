"""The ledger: cumulative totals in, differences out."""

from __future__ import annotations

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.dispatch.ledger import Ledger
from fairserve.dispatch.messages import NOTHING, StepReport, Totals


def report(seq: int, incarnation: int = 1, replica: str = "r0", **totals: Totals) -> StepReport:
    return StepReport(replica, incarnation, seq, 1, 0, 0, 0, 0, totals=totals)


def served(num_input: int, num_output: int = 0, num_cached: int = 0) -> Totals:
    return Totals(num_input, num_cached, num_output, num_input + 2.0 * num_output)


def test_a_report_adds_what_it_has_more_than_the_last() -> None:
    ledger = Ledger()
    assert ledger.merge(report(1, ann=served(10))) == {"ann": served(10)}
    assert ledger.merge(report(2, ann=served(10, 5), bob=served(3))) == {"ann": served(0, 5), "bob": served(3)}
    assert ledger.totals("ann") == served(10, 5)
    assert dict(ledger.accounts()) == {"ann": served(10, 5), "bob": served(3)}


def test_a_lost_report_is_made_good_by_the_next() -> None:
    ledger = Ledger()
    ledger.merge(report(1, ann=served(10)))
    assert ledger.merge(report(3, ann=served(10, 9))) == {"ann": served(0, 9)}


def test_a_repeated_report_changes_nothing() -> None:
    ledger = Ledger()
    ledger.merge(report(1, ann=served(10)))
    assert ledger.merge(report(1, ann=served(10))) is None
    assert ledger.totals("ann") == served(10)


def test_an_overtaken_report_changes_nothing() -> None:
    ledger = Ledger()
    ledger.merge(report(2, ann=served(10, 5)))
    assert ledger.merge(report(1, ann=served(10))) is None
    assert (ledger.totals("ann"), ledger.ack("r0", 1)) == (served(10, 5), 2)


def test_a_client_that_did_not_change_adds_nothing() -> None:
    ledger = Ledger()
    ledger.merge(report(1, ann=served(10)))
    assert ledger.merge(report(2, ann=served(10))) == {}


def test_a_new_incarnation_begins_at_zero_and_the_old_one_may_still_speak() -> None:
    ledger = Ledger()
    ledger.merge(report(7, ann=served(100)))
    assert ledger.merge(report(1, incarnation=2, ann=served(5))) == {"ann": served(5)}
    assert ledger.merge(report(8, ann=served(101))) == {"ann": served(1)}
    assert ledger.totals("ann") == served(106)


def test_input_that_was_never_computed_is_given_back() -> None:
    ledger = Ledger()
    ledger.merge(report(1, ann=served(100)))
    assert ledger.merge(report(2, ann=served(40))) == {"ann": served(-60)}
    assert ledger.totals("ann") == served(40)


def test_a_baseline_is_taken_over_but_does_not_count_as_added() -> None:
    ledger = Ledger()
    assert ledger.merge(report(5, ann=served(100)), as_baseline=True) == {}
    assert ledger.merge(report(6, ann=served(103), bob=served(50)), as_baseline=True) == {"ann": served(3)}
    assert (ledger.totals("ann"), ledger.totals("bob")) == (served(103), served(50))


def test_an_unknown_client_has_received_nothing_and_an_unknown_replica_is_acknowledged_nothing() -> None:
    assert Ledger().totals("eve") == NOTHING
    assert Ledger().ack("r9", 1) == 0


def test_the_book_that_was_silent_longest_goes_first() -> None:
    ledger = Ledger(max_books=2)
    for seq, replica in [(1, "r0"), (1, "r1"), (2, "r0"), (1, "r2")]:
        ledger.merge(report(seq, replica=replica, ann=served(seq)))
    assert (ledger.ack("r0", 1), ledger.ack("r1", 1), ledger.ack("r2", 1)) == (2, 0, 1)


def test_what_was_dumped_and_loaded_goes_on_where_it_was() -> None:
    ledger = Ledger()
    ledger.merge(report(4, ann=served(10, 3, 2)))
    ledger.merge(report(9, incarnation=2**60, replica="r1", ann=served(1), bob=served(5)))
    loaded = Ledger()
    loaded.load(json.loads(json.dumps(ledger.dump())))
    assert loaded.dump() == ledger.dump()
    assert loaded.merge(report(4, ann=served(99))) is None
    assert loaded.merge(report(5, ann=served(11, 3, 2))) == {"ann": served(1)}
    loaded.check()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), loss=st.floats(0, 0.8), num=st.integers(1, 30))
def test_loss_repeats_and_reordering_change_no_total_once_the_last_report_is_in(
    seed: int, loss: float, num: int
) -> None:
    rng = random.Random(seed)
    sent, totals = [], {"ann": NOTHING, "bob": NOTHING}
    for seq in range(1, num + 1):
        client = rng.choice(sorted(totals))
        totals[client] = totals[client] + served(rng.randrange(5), rng.randrange(5))
        sent.append(report(seq, **totals))
    delivered = [r for r in sent[:-1] for _ in range(rng.randrange(3)) if rng.random() >= loss] + [sent[-1]]
    rng.shuffle(delivered)
    ledger, added = Ledger(), {"ann": NOTHING, "bob": NOTHING}
    for one in delivered:
        for client, difference in (ledger.merge(one) or {}).items():
            added[client] = added[client] + difference
        ledger.check()
    assert added == totals == {client: ledger.totals(client) for client in totals}
