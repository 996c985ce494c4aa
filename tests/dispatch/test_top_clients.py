"""Labels of clients in metrics are few, and stay where they are."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.dispatch.top_clients import TopClients


def test_the_busiest_have_a_label_and_the_rest_is_other() -> None:
    top = TopClients(2, "other")
    top.update({"ann": 5.0, "bob": 3.0, "cid": 1.0}, 0.0)
    assert [top.label(client) for client in ("ann", "bob", "cid", "new")] == ["ann", "bob", "other", "other"]


def test_free_labels_are_given_at_once() -> None:
    top = TopClients(3, "other")
    top.update({"ann": 1.0}, 0.0)
    top.update({"bob": 0.01}, 1.0)
    assert top.labelled == ("ann", "bob")


def test_clients_that_are_about_equally_busy_do_not_take_labels_from_each_other() -> None:
    top, changes = TopClients(2, "other"), 0
    for second in range(300):
        # Around the same mean, out of step: a plain top 2 changes every few seconds.
        activity = {c: 1.0 + 0.4 * ((second // 5 + i) % 2) for i, c in enumerate(("ann", "bob", "cid", "dot"))}
        changes += len(top.update(activity, float(second)))
    assert changes == 0


def test_a_client_that_became_much_busier_takes_over_the_label_of_the_least_busy() -> None:
    top = TopClients(2, "other")
    for second in range(60):
        top.update({"ann": 4.0, "bob": 2.0, "cid": 1.0}, float(second))
    left: set[str] = set()
    for second in range(60, 120):
        left |= top.update({"ann": 4.0, "bob": 2.0, "cid": 8.0}, float(second))
    assert (set(top.labelled), left) == ({"ann", "cid"}, {"bob"})


def test_chance_at_the_start_moves_no_labels() -> None:
    """Forty equals that take turns, as a closed loop of callers does: in the first seconds sums differ by far."""
    rng, top, seen = random.Random(3), TopClients(20, "other"), set[str]()
    for second in range(30):
        top.update({f"c{rng.randrange(40)}": 1.0 for _ in range(4)}, float(second))
        seen |= set(top.labelled)
    assert len(seen) == 20


def test_somebody_idle_keeps_its_label_until_somebody_needs_it() -> None:
    top = TopClients(1, "other")
    top.update({"ann": 1.0}, 0.0)
    top.update({}, 600.0)
    assert top.label("ann") == "ann"
    assert top.update({"bob": 1.0}, 601.0) == {"ann"}
    assert top.label("bob") == "bob"


def test_a_client_that_is_called_other_has_no_label_of_its_own() -> None:
    top = TopClients(2, "other")
    top.update({"other": 9.0, "ann": 1.0}, 0.0)
    assert top.labelled == ("ann",)


def test_names_that_change_all_the_time_run_out_of_new_labels() -> None:
    top, seen = TopClients(2, "other", max_names=5), set[str]()
    for second in range(0, 5000, 50):
        top.update({f"client-{second}": 1.0}, float(second))
        seen |= set(top.labelled)
    assert len(seen) == 5


def test_a_name_that_had_a_label_may_have_it_again_after_new_ones_ran_out() -> None:
    top = TopClients(1, "other", max_names=2)
    for second, client in enumerate(["ann", "bob", "cid", "ann"]):
        top.update({client: 1.0}, second * 300.0)
    assert top.labelled == ("ann",)


def test_labels_are_given_among_very_many_equals_and_memory_stays_bounded() -> None:
    top = TopClients(2, "other")
    for second in range(3):
        top.update({f"client-{i}": 1.0 for i in range(1000 * second, 1000 * second + 1000)}, float(second))
    assert len(top.labelled) == 2
    assert len(top._busy) <= 102


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 100)), max_size=30))
def test_there_are_never_more_labels_than_allowed(rounds: list[dict[str, float]]) -> None:
    top, names = TopClients(3, "other", max_names=5), set[str]()
    for second, activity in enumerate(rounds):
        before = set(top.labelled)
        left = top.update(activity, float(second))
        now = set(top.labelled)
        names |= now
        assert len(now) <= 3 and left == before - now
    assert len(names) <= 5
