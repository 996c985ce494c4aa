"""Organisation > team > user: one share per node, weights and work conservation at each level, one code path."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairserve.fairness.catalog import POLICIES, make_policy
from fairserve.fairness.hierarchy import TOP, group_of, is_group, path_of
from fairserve.fairness.queue import FairQueue

Item = tuple[str, str]
segments = st.text(alphabet="abc._-", min_size=1, max_size=3)
names = st.lists(segments, min_size=1, max_size=4).map("/".join)


def queue_of(policy: str = "vtc", **group_weights: float) -> FairQueue[Item]:
    """``acme__research=2`` weighs the team research of acme."""
    weights = {name.replace("__", "/"): weight for name, weight in group_weights.items()}
    return FairQueue(make_policy(policy), weights)


class Crowd:
    """Clients that keep two requests waiting while they are awake; each pick is charged ``cost`` at once."""

    def __init__(self, queue: FairQueue[Item], weights: dict[str, float], cost: float = 10.0) -> None:
        self.queue, self.cost = queue, cost
        self.service = dict.fromkeys(weights, 0.0)
        self.awake: set[str] = set()
        self.num = 0
        for client, weight in weights.items():
            queue.register(client, weight)
        self.wake(*weights)

    def wake(self, *clients: str) -> None:
        for client in clients:
            self.awake.add(client)
            self._arrive(client)
            self._arrive(client)

    def sleep(self, *clients: str) -> None:
        for client in clients:
            self.awake.discard(client)
            for _, request_id in list(self.queue.backlog.first_of(client)):
                self.queue.remove(request_id)

    def run(self, num_picks: int) -> dict[str, float]:
        """Service that each client got meanwhile."""
        before = dict(self.service)
        for _ in range(num_picks):
            client, _ = self.queue.pop()
            self.service[client] += self.cost
            self.queue.charge(client, self.cost)
            self._arrive(client)
        self.queue.check()
        return {client: total - before[client] for client, total in self.service.items()}

    def _arrive(self, client: str) -> None:
        self.num += 1
        self.queue.arrive(client, f"r{self.num}", (client, f"r{self.num}"), float(self.num))


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_path_runs_from_the_top_down_and_groups_end_with_a_slash() -> None:
    assert path_of("ann") == ("ann",)
    assert path_of("acme/research/ann") == ("acme/", "acme/research/", "acme/research/ann")
    assert [group_of(node) for node in path_of("acme/research/ann")] == [TOP, "acme/", "acme/research/"]
    assert path_of("acme") == ("acme",), "the client acme is not the organisation acme/"


@given(name=names)
def test_each_step_of_a_path_is_a_member_of_the_step_above(name: str) -> None:
    path = path_of(name)
    assert path[-1] == name and not is_group(name)
    assert all(is_group(node) for node in path[:-1])
    assert [group_of(node) for node in path] == [TOP, *path[:-1]]


# -- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_keys", range(1, 51))
def test_a_tenant_split_into_k_keys_gets_one_share(num_keys: int) -> None:
    keys = [f"acme/key{i}" for i in range(num_keys)]
    crowd = Crowd(queue_of(), dict.fromkeys([*keys, "modest"], 1.0))
    got = crowd.run(400)
    assert got["modest"] == pytest.approx(2_000, abs=crowd.cost)
    assert max(got[key] for key in keys) - min(got[key] for key in keys) <= crowd.cost


def test_without_a_path_k_keys_get_k_shares() -> None:
    """So the test above can fail."""
    got = Crowd(queue_of(), dict.fromkeys([*(f"acme{i}" for i in range(9)), "modest"], 1.0)).run(400)
    assert got["modest"] == 400


def test_new_keys_of_a_tenant_bring_it_nothing_while_they_come() -> None:
    """A fresh key for every request: each newcomer is lifted among its siblings, and the tenant stays where it is."""
    crowd = Crowd(queue_of(), {"acme/key0": 1.0, "modest": 1.0})
    for i in range(1, 200):
        crowd.run(1)
        crowd.sleep(f"acme/key{i - 1}")
        crowd.service[f"acme/key{i}"] = 0.0
        crowd.wake(f"acme/key{i}")
    assert crowd.service["modest"] == pytest.approx(sum(crowd.service.values()) / 2, abs=2 * crowd.cost)


def test_weights_count_at_every_level() -> None:
    queue = queue_of(acme=3, acme__research=2)
    clients = {
        "acme/research/ann": 1.0,
        "acme/research/bob": 4.0,
        "acme/sales/cyd": 1.0,
        "zeta/dan": 7.0,  # alone in its organisation: its own weight changes nothing
        "eve": 2.0,
    }
    got = Crowd(queue, clients).run(6_000)
    total = sum(got.values())
    share = {
        "acme/research/ann": 3 / 6 * 2 / 3 * 1 / 5,
        "acme/research/bob": 3 / 6 * 2 / 3 * 4 / 5,
        "acme/sales/cyd": 3 / 6 * 1 / 3,
        "zeta/dan": 1 / 6,
        "eve": 2 / 6,
    }
    assert {client: got[client] / total for client in clients} == pytest.approx(share, abs=0.002)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_tree_of_busy_clients_shares_by_the_product_of_its_weights(data: st.DataObject) -> None:
    clients = data.draw(st.lists(names, min_size=1, max_size=6, unique=True))
    clients = [c for c in clients if not any(other.startswith(c + "/") for other in clients)]
    weight = st.sampled_from([0.5, 1.0, 2.0, 3.0])
    weights = {client: data.draw(weight) for client in clients}
    group_weights = {g[:-1]: data.draw(weight) for g in sorted({g for c in clients for g in path_of(c)[:-1]})}
    queue: FairQueue[Item] = FairQueue(make_policy("vtc"), group_weights)
    num_picks = 1_000
    crowd = Crowd(queue, weights, cost=1.0)
    got = crowd.run(num_picks)
    nodes = {node for client in clients for node in path_of(client)}
    share = dict.fromkeys(nodes, 1.0)
    for client in clients:
        for depth, node in enumerate(path_of(client)):
            siblings = [n for n in nodes if group_of(n) == group_of(node)]
            above = share[path_of(client)[depth - 1]] if depth else 1.0
            share[node] = above * queue.table.weight(node) / sum(queue.table.weight(n) for n in siblings)
    for client in clients:
        # Each level is off by at most a charge of its own, over the weights.
        assert got[client] == pytest.approx(num_picks * share[client], abs=4 * 6 * 3 / 0.5)


# -- work conservation -------------------------------------------------------------------------------------------------

STAFF = dict.fromkeys(
    ["acme/research/ann", "acme/research/bob", "acme/sales/cyd", "zeta/ops/dan", "zeta/ops/eve", "zeta/law/flo"], 1.0
)


def test_what_an_idle_user_leaves_goes_to_the_team_first() -> None:
    crowd = Crowd(queue_of(), STAFF)
    crowd.sleep("acme/research/bob")
    got = crowd.run(800)
    assert got["acme/research/ann"] == pytest.approx(2_000, abs=20)
    assert got["acme/sales/cyd"] == pytest.approx(2_000, abs=20)


def test_what_an_idle_team_leaves_goes_to_the_organisation_first() -> None:
    crowd = Crowd(queue_of(), STAFF)
    crowd.sleep("acme/research/ann", "acme/research/bob")
    got = crowd.run(800)
    assert got["acme/sales/cyd"] == pytest.approx(4_000, abs=20), "all of acme's half"
    assert got["zeta/law/flo"] == pytest.approx(2_000, abs=20)


def test_what_an_idle_organisation_leaves_goes_to_the_others() -> None:
    crowd = Crowd(queue_of(), STAFF)
    crowd.sleep("acme/research/ann", "acme/research/bob", "acme/sales/cyd")
    got = crowd.run(800)
    assert got["zeta/law/flo"] == pytest.approx(4_000, abs=20)
    assert got["zeta/ops/dan"] == pytest.approx(2_000, abs=20)


def test_somebody_is_picked_as_long_as_anybody_waits() -> None:
    crowd = Crowd(queue_of(), STAFF)
    asleep = sorted(STAFF)
    while len(asleep) > 1:
        crowd.sleep(asleep.pop())
        assert sum(crowd.run(100).values()) == 1_000


# -- the lift, at each level -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("away", "sleepers"),
    [
        ("a user", ["acme/research/bob"]),
        ("a team", ["acme/research/ann", "acme/research/bob"]),
        ("an organisation", ["acme/research/ann", "acme/research/bob", "acme/sales/cyd"]),
    ],
)
def test_who_was_away_comes_back_level_not_ahead(away: str, sleepers: list[str]) -> None:
    crowd = Crowd(queue_of(), STAFF)
    crowd.run(60)
    crowd.sleep(*sleepers)
    crowd.run(600)
    crowd.wake(*sleepers)
    got = crowd.run(600)
    ideal = 6_000 / 2 / 2  # of each team
    teams = {path_of(client)[1] for client in STAFF}
    for team in teams:
        members = [client for client in STAFF if client.startswith(team)]
        assert sum(got[client] for client in members) == pytest.approx(ideal, abs=2 * crowd.cost), (away, team)
        assert all(got[client] == pytest.approx(ideal / len(members), abs=2 * crowd.cost) for client in members)


def test_the_lift_raises_only_the_nodes_that_were_away() -> None:
    crowd = Crowd(queue_of(), STAFF)
    crowd.sleep("acme/research/bob")
    crowd.run(600)
    queue = crowd.queue
    before = {node: queue.counter(node) for node in queue.table}
    crowd.wake("acme/research/bob")
    changed = {node for node in queue.table if queue.counter(node) != before[node]}
    assert changed == {"acme/research/bob"}
    assert queue.counter("acme/research/bob") == queue.counter("acme/research/ann")


def test_when_nobody_of_a_group_waits_the_reference_is_its_own_last_to_leave() -> None:
    queue = queue_of()
    for client, counter in (("acme/ann", 70.0), ("acme/bob", 10.0), ("zeta/eve", 500.0)):
        queue.arrive(client, client, (client, client), 0.0)
        queue.set_counter(client, counter)
    queue.set_counter("acme/", 40.0)
    queue.set_counter("zeta/", 30.0)
    for client in ("acme/bob", "acme/ann", "zeta/eve"):
        queue.remove(client)
    assert (queue.groups["acme/"].last_to_leave, queue.groups[TOP].last_to_leave) == ("acme/ann", "zeta/")
    queue.arrive("acme/new", "n", ("acme/new", "n"), 0.0)
    assert queue.counter("acme/new") == 70.0
    assert queue.counter("acme/") == 40.0, "ahead of zeta's 30: a lift forgives no debt"


def test_a_debt_within_the_team_survives_the_teams_idling() -> None:
    crowd = Crowd(queue_of(), STAFF)
    crowd.queue.charge("acme/research/ann", 500)
    crowd.sleep("acme/research/ann", "acme/research/bob")
    crowd.run(600)
    crowd.wake("acme/research/bob", "acme/research/ann")
    got = crowd.run(100)
    assert got["acme/research/ann"] == 0
    assert got["acme/research/bob"] > 0


def test_a_groups_counter_may_come_before_its_first_client() -> None:
    """A replica hears the authority's counters of groups; the order in which it hears of things is not up to it."""
    queue = queue_of(acme=4)
    queue.set_counter("acme/", 12.0)
    queue.arrive("acme/ann", "a", ("acme/ann", "a"), 0.0)
    assert queue.counter("acme/") == 12.0
    assert queue.table.weight("acme/") == 4.0
    queue.check()


def test_standing_and_lead_compare_where_the_paths_part() -> None:
    queue = queue_of()
    for client in ("acme/ann", "acme/bob", "zeta/eve", "solo"):
        queue.register(client)
    queue.charge("acme/ann", 30)
    queue.charge("acme/bob", 10)
    queue.charge("zeta/eve", 25)
    queue.charge("solo", 5)
    assert queue.lead("acme/ann", "acme/bob") == 20
    assert queue.lead("acme/bob", "zeta/eve") == 15, "of the organisations, 40 to 25"
    assert queue.lead("solo", "acme/ann") == -35
    assert queue.lead("acme/ann", "acme/ann") == 0
    assert max(queue.table, key=lambda c: queue.standing(c) if not is_group(c) else ()) == "acme/ann"


# -- against a tree that is too plain to be wrong ----------------------------------------------------------------------


@dataclass
class Tree:
    """The same queue by brute force: nothing is kept in order, every answer is looked for anew."""

    group_weights: dict[str, float]
    lifts: bool = True
    counters: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    waiting: list[tuple[float, int, str, str]] = field(default_factory=list)
    """place, sequence number, client, request id."""
    left: dict[str, str] = field(default_factory=dict)
    num: int = 0

    def nodes(self, client: str) -> list[str]:
        parts = client.split("/")
        return [*("/".join(parts[:i]) + "/" for i in range(1, len(parts))), client]

    def parent(self, node: str) -> str:
        return "".join(part + "/" for part in node.strip("/").split("/")[:-1])

    def register(self, client: str, weight: float) -> None:
        for node in self.nodes(client):
            self.counters.setdefault(node, 0.0)
            self.weights.setdefault(node, self.group_weights.get(node.strip("/"), 1.0))
        self.weights[client] = weight

    def waits(self, node: str) -> bool:
        return any(node in self.nodes(client) for _, _, client, _ in self.waiting)

    def first(self, group: str) -> str | None:
        members = {n for _, _, client, _ in self.waiting for n in self.nodes(client) if self.parent(n) == group}
        return min(members, key=lambda member: (self.counters[member], member), default=None)

    def arrive(self, client: str, request_id: str, place: float) -> None:
        for node in self.nodes(client):
            group = self.parent(node)
            if self.lifts and not self.waits(node):
                reference = self.first(group) or self.left.get(group)
                if reference is not None:
                    self.counters[node] = max(self.counters[node], self.counters[reference])
        self.num += 1
        self.waiting.append((place, self.num, client, request_id))

    def leave(self, entry: tuple[float, int, str, str]) -> None:
        self.waiting.remove(entry)
        for node in reversed(self.nodes(entry[2])):
            if not self.waits(node):
                self.left[self.parent(node)] = node

    def peek(self) -> tuple[float, int, str, str] | None:
        node = self.first("")
        while node is not None and node.endswith("/"):
            node = self.first(node)
        return min((entry for entry in self.waiting if entry[2] == node), default=None)

    def charge(self, client: str, service: float) -> None:
        for node in self.nodes(client):
            self.counters[node] += service / self.weights[node]


NESTED = ["ann", "bob", "acme/ann", "acme/r/ann", "acme/r/bob", "acme/s/ann", "zeta/ann", "zeta/r/ann"]
FLAT = ["ann", "bob", "cyd", "dan", "eve"]


def compare(clients: list[str], policy: str, seed: int, num_events: int) -> None:
    rng = random.Random(seed)
    group_weights = {"acme": 2.0, "acme/r": 0.5, "zeta": 3.0}
    queue: FairQueue[Item] = FairQueue(make_policy(policy), group_weights)
    tree = Tree(group_weights, lifts=policy == "vtc")
    for i in range(num_events):
        client = rng.choice(clients)
        if client not in tree.counters:
            weight = rng.choice([0.5, 1.0, 2.0])
            queue.register(client, weight)
            tree.register(client, weight)
        match rng.randrange(8):
            case 0 | 1 | 2:
                place = rng.randrange(20)
                queue.arrive(client, f"r{i}", (client, f"r{i}"), place)
                tree.arrive(client, f"r{i}", place)
            case 3 | 4 if tree.waiting:
                entry = tree.peek()
                assert entry is not None
                assert queue.pop() == (entry[2], entry[3])
                tree.leave(entry)
            case 5 if tree.waiting:
                entry = rng.choice(tree.waiting)
                assert queue.remove(entry[3]) == (entry[2], entry[3])
                tree.leave(entry)
            case 6:
                amount = rng.choice([-8.0, 4.0, 16.0, 64.0])  # exact in floats, whatever the order of additions
                queue.charge(client, amount)
                tree.charge(client, amount)
            case 7:
                node = rng.choice(tree.nodes(client))
                value = float(rng.randrange(100))
                queue.set_counter(node, value)
                tree.counters[node] = value
        queue.check()
        head = tree.peek()
        assert queue.peek() == (None if head is None else (head[2], head[3]))
        assert {node: queue.counter(node) for node in tree.counters} == tree.counters
        for group in {tree.parent(node) for node in tree.counters}:
            reference = tree.first(group) or tree.left.get(group)
            assert queue.level(group) == (tree.counters[reference] if reference else 0.0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(["vtc", "lcf"]))
@example(seed=0, policy="vtc")
def test_a_tree_under_any_history_decides_as_brute_force_does(seed: int, policy: str) -> None:
    compare(NESTED, policy, seed, 120)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(["vtc", "lcf"]))
def test_a_flat_system_is_a_tree_of_one_level(seed: int, policy: str) -> None:
    """The reference, on names without a slash, is the paper's VTC: one list of clients, both branches of the lift."""
    compare(FLAT, policy, seed, 150)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_one_organisation_decides_among_its_members_as_a_flat_system_does(seed: int) -> None:
    """Adding a level over everybody changes nothing."""
    rng = random.Random(seed)
    flat, deep = queue_of(), queue_of()
    for i in range(150):
        client = rng.choice(FLAT)
        match rng.randrange(4):
            case 0 | 1:
                place = rng.randrange(9)
                flat.arrive(client, f"r{i}", (client, f"r{i}"), place)
                deep.arrive(f"org/{client}", f"r{i}", (client, f"r{i}"), place)
            case 2 if len(flat):
                assert flat.pop() == deep.pop()
            case 3 if client in flat.table:
                flat.charge(client, 16.0)
                deep.charge(f"org/{client}", 16.0)
        assert flat.peek() == deep.peek()
        assert [flat.counter(c) for c in FLAT] == [deep.counter(f"org/{c}") for c in FLAT]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(3))
def test_every_policy_keeps_its_order_true_in_a_tree(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    queue: FairQueue[Item] = FairQueue(make_policy(policy), {"acme": 2.0})
    waiting: set[str] = set()
    for i in range(300):
        client = rng.choice(NESTED)
        match rng.randrange(8):
            case 0 | 1 | 2:
                queue.arrive(client, f"r{i}", (client, f"r{i}"), rng.randrange(20))
                waiting.add(f"r{i}")
            case 3 if waiting:
                waiting.discard(queue.pop()[1])
            case 4 if waiting:
                front = queue.front(3, 2)
                assert front[0] == queue.peek()
                assert len({client for client, _ in front}) <= 3 and len(front) == len(set(front))
                taken = rng.choice(front)
                queue.pick(*taken, rng.randrange(400), queue.rates(taken[0]))
                waiting.discard(taken[1])
            case 5 if waiting:
                gone = rng.choice(sorted(waiting))
                queue.remove(gone)
                waiting.discard(gone)
            case 6 if client in queue.table:
                queue.charge(client, rng.randrange(-50, 400))
            case 7:
                queue.register(client)
                queue.set_under_way(client, rng.random() < 0.5)
        queue.check()
        assert len(queue) == len(waiting)
