"""The map of cached prefixes against brute force, and who is placed where for its sake."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.prefixes import PrefixMap, prefix_hashes
from fairserve.fairness.catalog import PolicySettings, make_policy
from tests.dispatch.kit import Desk, RouterVoice, submit

BLOCK = 16
MakeDesk = Callable[..., Desk]


# -- hashes ------------------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 3), max_size=20)


@given(one=tokens, two=tokens, block=st.integers(1, 5))
def test_two_prompts_share_exactly_the_hashes_of_the_whole_blocks_they_share(
    one: list[int], two: list[int], block: int
) -> None:
    mine, theirs = prefix_hashes("ann", one, block), prefix_hashes("ann", two, block)
    assert len(mine) == len(one) // block
    shared = 0
    while shared < min(len(mine), len(theirs)) and one[: (shared + 1) * block] == two[: (shared + 1) * block]:
        shared += 1
    assert mine[:shared] == theirs[:shared]
    assert not set(mine[shared:]) & set(theirs[shared:])


def test_equal_prompts_of_two_clients_have_nothing_in_common() -> None:
    """Else a client could feel in its time to the first token what another one asks."""
    prompt = list(range(64))
    assert not set(prefix_hashes("ann", prompt, 16)) & set(prefix_hashes("bob", prompt, 16))
    assert prefix_hashes("ann", prompt, 16) == prefix_hashes("ann", tuple(prompt), 16)


def test_equal_prompts_under_two_adapters_have_nothing_in_common() -> None:
    prompt = list(range(64))
    hashes = [prefix_hashes("ann", prompt, 16, adapter) for adapter in ("", "one", "two")]
    assert len({block for one in hashes for block in one}) == sum(map(len, hashes))
    assert prefix_hashes("ann", prompt, 16, "one") != prefix_hashes("annone", prompt, 16)


def test_the_name_of_a_client_and_its_tokens_do_not_run_into_each_other() -> None:
    assert prefix_hashes("a", [1, 2], 1)[0] != prefix_hashes("a" + "\x01" + "\x00" * 7, [2], 1)[0]


# -- the map -----------------------------------------------------------------------------------------------------------


@dataclass
class Plain:
    """Per replica a list of blocks, the one to go first in front; every answer is looked for anew."""

    blocks: dict[str, list[int]] = field(default_factory=dict)

    def granted(self, replica: str, prefix: tuple[int, ...], capacity: int) -> None:
        mine = self.blocks.setdefault(replica, [])
        for block in prefix[::-1]:
            if block in mine:
                mine.remove(block)
            mine.append(block)
        while len(mine) * BLOCK > capacity:
            mine.pop(0)

    def longest(self, prefix: tuple[int, ...]) -> dict[str, int]:
        found = {}
        for replica, mine in self.blocks.items():
            num = next((i for i, block in enumerate(prefix) if block not in mine), len(prefix))
            if num:
                found[replica] = num * BLOCK
        return found


def a_prompt(rng: random.Random) -> tuple[int, ...]:
    """Hashes of a path down a small tree: each covers all before it."""
    path: tuple[int, ...] = ()
    for _ in range(rng.randrange(7)):
        path = (*path, rng.randrange(3))
    return tuple(hash(path[: i + 1]) for i in range(len(path)))


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), capacity_blocks=st.integers(0, 12))
def test_the_map_answers_as_brute_force_does(seed: int, capacity_blocks: int) -> None:
    rng = random.Random(seed)
    found, plain = PrefixMap(BLOCK), Plain()
    for _ in range(60):
        replica = rng.choice("rst")
        if rng.random() < 0.1:
            found.forget(replica)
            plain.blocks.pop(replica, None)
        else:
            prompt = a_prompt(rng)
            capacity = capacity_blocks * BLOCK + rng.randrange(BLOCK)
            found.granted(replica, prompt, capacity)
            plain.granted(replica, prompt, capacity)
        found.check()
        asked = a_prompt(rng)
        expected = plain.longest(asked)
        assert found.longest(asked) == expected
        for replica in "rst":
            num, beyond = expected.get(replica, 0), rng.randrange(-1, 5 * BLOCK)
            assert found.num_known(asked, replica) == num
            assert found.num_known(asked, replica, beyond) == (num if num > beyond else 0)


def test_a_replica_that_holds_less_than_a_prompt_keeps_its_beginning() -> None:
    found = PrefixMap(BLOCK)
    found.granted("r", (1, 2, 3, 4), 2 * BLOCK)
    assert found.longest((1, 2, 3, 4)) == {"r": 2 * BLOCK}


def test_asking_changes_nothing_and_strangers_are_known_nowhere() -> None:
    found = PrefixMap(BLOCK)
    found.granted("r", (1, 2), 100)
    for _ in range(3):
        assert found.longest((1, 2, 9)) == {"r": 32}
        assert found.longest((7,)) == {} and found.longest(()) == {}
        assert found.num_known((), "r") == found.num_known((7, 8), "r") == found.num_known((1,), "s") == 0
    found.forget("nobody")
    found.check()


# -- who goes next, and where ------------------------------------------------------------------------------------------


def blocks(name: str, num: int) -> tuple[int, ...]:
    return tuple(hash((*name.encode(), i)) for i in range(num))


class Scene:
    """Grants happen one by one: the replica's only slot is freed by :meth:`next`."""

    def __init__(self, desk: Desk, **settings: object) -> None:
        self.desk = desk
        desk.dispatcher = Dispatcher(
            make_policy(desk.policy, PolicySettings(**settings)),  # type: ignore[arg-type]
            desk.cost,
            replace(desk.limits, prefix_block_tokens=BLOCK),
            epoch=1,
        )
        self.router: RouterVoice = desk.router()

    def remember(self, replica: str, prefix: tuple[int, ...]) -> None:
        """A prompt with this beginning went to that replica, some time ago."""
        self.desk.dispatcher.state.placement._prefixes.granted(replica, prefix, 10_000)

    def order(self, *submits: object, finish: int = 20) -> list[str]:
        """The order in which one replica with one slot is granted these."""
        replica = self.desk.replica("r0", slots=1)
        replica.report(free_slots=0)
        self.router.call(*submits)  # type: ignore[arg-type]
        order = []
        for _ in range(finish):
            replica.report()
            granted = tuple(self.desk.dispatcher.leases)
            if not granted:
                break
            (request_id,) = granted
            lease = self.desk.dispatcher.leases.get(request_id)
            assert lease is not None
            one = lease.waiting.submit
            order.append(request_id)
            replica.report(
                received=granted,
                started=granted,
                finished=granted,
                served={one.client: (one.num_input, 0)},
                free_slots=0,
            )
        return order

    def where(self, submit: object) -> str:
        self.router.call(submit)  # type: ignore[arg-type]
        return self.router.granted[submit.request_id]  # type: ignore[attr-defined]


@pytest.fixture
def make_scene(make_desk: MakeDesk) -> Callable[..., Scene]:
    def build(policy: str = "dlpm", **settings: object) -> Scene:
        return Scene(make_desk(policy), **settings)

    return build


def test_within_a_round_the_longest_cached_prefix_goes_first(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(quantum=1_000.0)
    scene.remember("r0", blocks("long", 8))
    scene.remember("r0", blocks("short", 2))
    order = scene.order(
        submit("a-none", "ann", prefix=blocks("new", 8)),
        submit("b-short", "bob", prefix=blocks("short", 2)),
        submit("c-long", "cyd", prefix=blocks("long", 8)),
        submit("c-part", "cyd", prefix=(*blocks("long", 4), 99)),
    )
    assert order == ["c-long", "c-part", "b-short", "a-none"]


def test_a_client_past_its_quantum_waits_for_the_others_however_long_its_prefix(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene(quantum=25.0)
    scene.remember("r0", blocks("long", 8))
    loved = [submit(f"c{i}", "cyd", prefix=blocks("long", 8)) for i in range(4)]
    plain = [submit(f"a{i}", "ann") for i in range(4)]
    # Ten tokens each: three of a round, then two that pay the debt and use the second quantum, ...
    assert scene.order(*loved, *plain) == ["c0", "c1", "c2", "a0", "a1", "a2", "c3", "a3"]


def test_only_so_many_clients_are_looked_at(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(quantum=1_000.0, window=2)
    scene.remember("r0", blocks("long", 8))
    order = scene.order(submit("a", "ann"), submit("b", "bob"), submit("c", "cyd", prefix=blocks("long", 8)))
    assert order[0] == "a" and order.index("c") == 1, "cyd comes into the window when ann leaves it"


def test_vtc_looks_at_no_prefix(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("vtc")
    scene.remember("r0", blocks("long", 8))
    assert scene.order(submit("a", "ann"), submit("b", "bob", prefix=blocks("long", 8))) == ["a", "b"]


@pytest.mark.parametrize("policy", ["dlpm", "d2lpm"])
def test_what_is_cached_where_there_is_no_room_makes_nobody_first(
    make_scene: Callable[..., Scene], policy: str
) -> None:
    scene = make_scene(policy, quantum=1_000.0)
    scene.desk.replica("full", slots=1).report(free_slots=0)
    scene.remember("full", blocks("elsewhere", 8))
    scene.remember("r0", blocks("here", 2))
    order = scene.order(
        submit("a", "ann", prefix=blocks("elsewhere", 8)),
        submit("b", "bob", prefix=blocks("here", 8)),
    )
    assert order == ["b", "a"]


def test_of_equals_one_that_fits_goes_before_one_that_does_not(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(quantum=1_000.0)
    scene.desk.replica("r0", kv=100)
    scene.router.call(submit("a-large", "ann", num_input=150), submit("b-small", "bob", num_input=20))
    assert list(scene.router.granted) == ["b-small"]


def test_a_request_that_has_waited_twice_as_long_is_not_passed_over(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(quantum=1_000.0)
    replica = scene.desk.replica("r0", slots=1)
    replica.report(free_slots=0)
    scene.remember("r0", blocks("loved", 8))
    scene.router.call(submit("old", "ann"))
    scene.desk.clock.advance(3.0)
    scene.router.call(submit("young", "ann", prefix=blocks("loved", 8)))
    scene.desk.clock.advance(2.0)
    replica.report()
    assert list(scene.desk.dispatcher.leases) == ["old"]


@pytest.mark.parametrize("policy", ["dlpm", "d2lpm"])
def test_a_request_goes_where_most_of_its_prompt_is_cached(make_scene: Callable[..., Scene], policy: str) -> None:
    scene = make_scene(policy)
    for name, kv in (("r0", 1_000), ("r1", 500), ("r2", 400)):
        scene.desk.replica(name, kv=kv)
    scene.remember("r1", blocks("p", 2))
    scene.remember("r2", blocks("p", 6))
    assert scene.where(submit("known", prefix=blocks("p", 8))) == "r2"
    assert scene.where(submit("unknown", prefix=blocks("q", 8))) == "r0", "the roomiest, or the first of the idle"
    assert scene.where(submit("none")) == ("r1" if policy == "d2lpm" else "r0")


@pytest.mark.parametrize("policy", ["dlpm", "d2lpm"])
@pytest.mark.parametrize("why", ["full", "too small", "silent", "unreachable", "dead", "began anew"])
def test_a_replica_that_cannot_take_it_is_not_waited_for(
    make_scene: Callable[..., Scene], policy: str, why: str
) -> None:
    scene = make_scene(policy)
    desk = scene.desk
    scene.router.call()
    other, knows = desk.replica("r0"), desk.replica("r1", kv=900)
    scene.remember("r1", blocks("p", 6))
    match why:
        case "full":
            knows.report(free_slots=0)
        case "too small":
            knows.report(free_kv=20)
        case "silent":
            desk.clock.advance(6.0)
            other.report()
        case "unreachable":
            scene.router.call(unreachable=("r1",))
        case "dead":
            desk.clock.advance(21.0)
            other.report()
            desk.dispatcher.tick(desk.now_s)
            scene.router.call()
        case "began anew":
            desk.replica("r1", incarnation=2, kv=900)
    assert scene.where(submit("a", prefix=blocks("p", 6))) == "r0"


def test_what_is_granted_is_remembered(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.desk.replica("r0", kv=1_000, slots=9)
    scene.desk.replica("r1", kv=990, slots=9)
    assert scene.where(submit("a", prefix=blocks("p", 6))) == "r0"
    assert scene.where(submit("x", num_input=100)) == "r1", "the roomiest by now"
    assert scene.where(submit("b", prefix=blocks("p", 3))) == "r0"


def test_d2lpm_leaves_a_replica_whose_quantum_it_has_used_up(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("d2lpm", replica_quantum=25.0, quantum=10_000.0)
    scene.desk.replica("r0", slots=50, kv=900)
    scene.desk.replica("r1", slots=50, kv=1_000)
    scene.remember("r0", blocks("p", 6))
    where = [scene.where(submit(f"a{i}", prefix=blocks("p", 6))) for i in range(6)]
    assert where == ["r0"] * 3 + ["r1"] * 3


def test_d2lpm_leaves_it_even_where_it_is_the_roomiest(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("d2lpm", replica_quantum=25.0, quantum=10_000.0)
    scene.desk.replica("r0", slots=50, kv=9_000)
    scene.desk.replica("r1", slots=50, kv=1_000)
    where = [scene.where(submit(f"a{i}", prefix=blocks("p", 6))) for i in range(6)]
    assert where == ["r0"] * 3 + ["r1"] * 3


def test_d2lpm_sends_what_is_cached_nowhere_to_the_shortest_queue(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("d2lpm")
    for name, kv, num_running in (("r0", 9_000, 3), ("r1", 1_000, 1), ("r2", 2_000, 2)):
        voice = scene.desk.replica(name, slots=50, kv=kv)
        voice.send(replace(voice.compose(), num_running=num_running))
    assert scene.where(submit("a", prefix=blocks("p", 6))) == "r1"
