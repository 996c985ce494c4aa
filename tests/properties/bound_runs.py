"""Random runs of a whole cluster, each of which puts one or more fairness bounds to the test.

A *family* is a kind of run; :data:`FAMILIES` names them. ``FAMILIES[name](seed)`` lives one short random life on a
``ToyCluster`` and returns one :class:`Check` per bound: the worst gap in *delivered* service / weight, and what it may
be. Everything follows from the seed. In every run some clients sleep and come back: always-busy clients alone share
evenly even without the lift.

What is asserted where something dies:

- *A replica* takes with it what it had delivered and not reported. No counter ever learns of that, so the limit is
  wider by the most that each death cost one client. Requests that had started there are over; the others go back.
- *The authority*: the limit of a life is its own measured bound. Over an interval that spans crashes, the limit is the
  sum of the bounds of all lives, plus, for each crash and at either end, the most that one client had received without
  having been merged, or receives later from requests that the new authority never granted or could not yet account
  for: those that a replica took before its full report was in.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fairserve.dispatch.limits import DispatchLimits
from fairserve.fairness.hierarchy import TOP, group_of, path_of
from tests.properties.crowd import Crowd, Habit, Watch, random_request
from tests.toy_cluster import Lossy, Perfect, Shape, ToyCluster, ToyReplica, ToyRequest

W_P, W_Q = 1, 2
STEPS = 100
TOLERANCE = 1e-6
CLIENTS = ("ann", "bob", "sleeper", "visitor")
TREE = ("acme/lab/ann", "acme/lab/bob", "acme/web/sleeper", "corp/visitor", "solo")
GROUPS = ("acme", "corp", "acme/lab", "acme/web")


@dataclass(frozen=True, slots=True)
class Check:
    """One bound in one run. Amounts are service / weight."""

    bound: str
    gap: float
    limit: float

    @property
    def ratio(self) -> float:
        return self.gap / self.limit if self.limit else 0.0

    @property
    def holds(self) -> bool:
        return self.gap <= self.limit + TOLERANCE


class Family(Protocol):
    def __call__(self, seed: int, steps: int = STEPS) -> list[Check]: ...


def habits(rng: random.Random, weights: Mapping[str, float], kv_tokens: int, cancels: float = 0.0) -> list[Habit]:
    """In most runs two clients always wait and the others sleep long or come by often. In some the two sleep at the
    same time, so that the queue drains, and a newcomer finds it empty just before they are back. Lengths differ by
    client, in some runs all answers are short, and one request may need all of the smallest replica's KV cache."""
    crowd = []
    drains, is_terse = rng.random() < 0.4, rng.random() < 0.3
    awake, asleep = rng.randint(30, 60), rng.randint(15, 40)
    for i, (client, weight) in enumerate(weights.items()):
        max_output = rng.randint(1, 3 if is_terse else max(1, kv_tokens // 2))
        habit = Habit(client, weight, rng.randint(1, kv_tokens - max_output), max_output)
        if i < 2:
            habit.awake_steps, habit.sleep_steps = awake, asleep if drains else 0
        elif drains and i == len(weights) - 1:
            habit.first_step = awake + asleep - rng.randint(1, 5)
        else:
            habit.awake_steps, habit.sleep_steps = rng.randint(5, 40), rng.randint(5, 70)
            habit.depth, habit.phase = rng.randint(1, 3), rng.randrange(110)
        habit.is_monotonous = rng.random() < 0.4
        habit.cancels = cancels if rng.random() < 0.5 else 0.0
        crowd.append(habit)
    return crowd


def random_weights(rng: random.Random, clients: Sequence[str]) -> dict[str, float]:
    return {client: rng.choice((0.5, 1.0, 1.0, 2.0, 4.0)) for client in clients}


@dataclass
class Life:
    """A crowd on a cluster, watched, in which replicas and the authority may die."""

    cluster: ToyCluster
    crowd: Crowd
    watches: list[Watch]
    rng: random.Random
    replica_deaths: float = 0.0
    """Chance per step."""
    authority_deaths: float = 0.0
    lost: dict[str, float] = field(default_factory=dict)
    """By group: what the deaths of replicas cost, in all."""
    earlier: list[tuple[float, float]] = field(default_factory=list)
    """U and S of every earlier authority."""
    num_crashes: int = 0
    _restarts: dict[str, int] = field(default_factory=dict)
    _unmerged: list[dict[str, float]] = field(default_factory=list)
    _strangers: list[dict[tuple[str, int, str], float]] = field(default_factory=list)
    """For each crash: what requests had received (then, or when they came) that the new authority did not grant."""
    _is_settled: bool = True

    def run(self, num_steps: int) -> None:
        for step in range(num_steps):
            if self.replica_deaths and self.rng.random() < self.replica_deaths:
                self._kill(step)
            for name in [name for name, at in self._restarts.items() if at <= step]:
                del self._restarts[name]
                self.cluster.restart_replica(name)
            if self.authority_deaths and self._is_settled and self.rng.random() < self.authority_deaths:
                self._crash()
            self.crowd.run(1)
            if not self._is_settled:
                self._settle()
        self.cluster.network = Perfect()
        for replica in self._alive():  # what was delivered last is merged, so that S has seen it
            self.cluster.exchange_report(replica)
        self.cluster.check()

    def _alive(self) -> list[ToyReplica]:
        return [replica for replica in self.cluster.replicas.values() if replica.is_alive]

    # -- a replica dies -----------------------------------------------------------------------------------------------

    def _kill(self, step: int) -> None:
        alive = self._alive()
        if not alive:
            return
        replica = self.rng.choice(alive)
        unmerged = self._unmerged_on(replica)
        for watch in self.watches:
            self.lost[watch.group] = self.lost.get(watch.group, 0.0) + watch.most(unmerged)
        self.cluster.kill_replica(replica.name, resend=self.rng.random() < 0.7)
        if len(alive) == 1 or self.rng.random() < 0.7:
            self._restarts[replica.name] = step + self.rng.randint(1, 50)

    def _unmerged_on(self, replica: ToyReplica) -> dict[str, float]:
        """Service by client that the replica has delivered and the authority has not merged."""
        cost = self.cluster.cost
        delivered = {client: cost.service(*row) for client, row in replica.delivered.items()}
        for name, incarnation, _, totals in self.cluster.dispatcher.ledger.dump()["books"]:
            if (name, incarnation) == (replica.name, replica.incarnation):
                for client, row in totals.items():
                    delivered[client] -= row[-1]
        return delivered

    # -- the authority dies -------------------------------------------------------------------------------------------

    def _crash(self) -> None:
        cluster, bounds = self.cluster, self.cluster.dispatcher.bounds
        self.earlier.append((bounds.unit, bounds.staleness))
        unmerged: dict[str, float] = {}
        for replica in self._alive():
            for client, service in self._unmerged_on(replica).items():
                unmerged[client] = unmerged.get(client, 0.0) + service
        self._unmerged.append(unmerged)
        self._strangers.append({})
        self.num_crashes += 1
        cluster.crash_authority(snapshot=self.rng.random() < 0.5)
        for watch in self.watches:
            watch.attach()
        self._is_settled = False
        self._note_strangers()

    def _note_strangers(self) -> None:
        strangers = self._strangers[-1]
        for replica in self._alive():
            if self._knows(replica):
                continue
            for request_id in replica.needs:
                strangers.setdefault((replica.name, replica.incarnation, request_id), replica.served_of(request_id))

    def _knows(self, replica: ToyReplica) -> bool:
        """The authority has had the replica's full report, and the replica knows that."""
        return replica.reporter.epoch == self.cluster.dispatcher.epoch and not replica.reporter._full_due

    def _settle(self) -> None:
        """Until routers have submitted again, a client waits if one of its requests waits at a router."""
        self._note_strangers()
        cluster = self.cluster
        epoch = cluster.dispatcher.epoch
        told = all(r.epoch == epoch and not r._resubmit_due and r._in_flight is None for r in cluster.routers)
        at_routers = {w.submit.client for router in cluster.routers for w in router._wanted.values()}
        for watch in self.watches:
            for node in watch.waiting:
                if not (watch.waits_in(at_routers, node) or cluster.dispatcher.queue.is_waiting(node)):
                    watch.left(node)
        self._is_settled = told and all(map(self._knows, self._alive()))

    def unaccounted(self) -> float:
        """Over all crashes: the most that one client got, before or after, past the new authority."""
        total = 0.0
        lives = {(r.name, r.incarnation): r for r in (*self.cluster.dead, *self.cluster.replicas.values())}
        for unmerged, strangers in zip(self._unmerged, self._strangers, strict=True):
            got = dict(unmerged)
            for (name, incarnation, request_id), before in strangers.items():
                client = self.cluster.requests[request_id][0].client
                served = lives[name, incarnation].served_of(request_id) - before
                got[client] = got.get(client, 0.0) + served
            total += max(watch.most(got) for watch in self.watches)
        return total

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def measured(self, name: str) -> Iterator[Check]:
        """The bounds made of the dispatcher's own U and S, in every group."""
        for watch in self.watches:
            bounds = self.cluster.dispatcher.watch.bounds.get(watch.group)
            if bounds is None:
                continue
            lost = self.lost.get(watch.group, 0.0)
            yield Check(f"{name}: both wait, 2(U+S)", watch.worst_pair, bounds.bound + lost)
            yield Check(f"{name}: one waits, 3(U+S)", watch.worst_lag, 3 * (bounds.unit + bounds.staleness) + lost)
            # What a cancel leaves running, or a replica's new life took before it had said hello, is merged afterwards.
            is_late = self.replica_deaths or any(habit.cancels for habit in self.crowd.habits)
            limit = bounds.unit + (bounds.staleness if is_late else bounds.returned)
            yield Check(f"{name}: counters of those that wait, U+D or U+S", watch.worst_spread, limit)
            yield Check(f"{name}: the authority's own gap, 2(U+S)", watch.worst, bounds.bound)


# -- families ---------------------------------------------------------------------------------------------------------


def paper(seed: int, steps: int = STEPS) -> list[Check]:
    """VTC theorem 4.4: one replica, lookahead 0, a report every step, all of max_tokens reserved, nobody cancels.

    That the counters are one step old does not matter: what is in flight shares the KV cache with what runs.
    """
    return list(_one_replica(seed, steps, dict.fromkeys(CLIENTS, 1.0), "one replica"))


def weighted(seed: int, steps: int = STEPS) -> list[Check]:
    """The same with weights: in service / weight, U becomes U / least weight."""
    return list(_one_replica(seed, steps, random_weights(random.Random(seed), CLIENTS), "weighted"))


def _one_replica(seed: int, steps: int, weights: dict[str, float], name: str) -> Iterator[Check]:
    rng = random.Random(seed)
    kv_tokens = rng.randint(20, 100)
    cluster = ToyCluster(num_routers=rng.randint(1, 3), slots=rng.randint(2, 6), kv_tokens=kv_tokens)
    life = Life(cluster, Crowd(cluster, habits(rng, weights, kv_tokens), rng), [Watch(cluster, weights)], rng)
    life.run(steps)
    longest = max(request.num_input for request, _ in cluster.requests.values())
    unit = max(W_P * longest, W_Q * kv_tokens) / min(weights.values())
    worst = life.watches[0]
    yield Check(f"{name}: both wait, 2U", worst.worst_pair, 2 * unit)
    yield Check(f"{name}: one waits, 4U", worst.worst_lag, 4 * unit)
    yield Check(f"{name}: counters of those that wait, U", worst.worst_spread, unit)
    yield Check(f"{name}: measured U, U", cluster.dispatcher.bounds.unit, unit)


def whole_cluster(seed: int, steps: int = STEPS) -> list[Check]:
    """Everything at once: unequal replicas that die, lookahead, late and lost reports, lost grants, cancellations."""
    rng = random.Random(seed)
    life = random_life(rng, random_weights(rng, CLIENTS))
    life.run(steps)
    checks = list(life.measured("cluster"))
    if not life.replica_deaths:  # the bound says something: U is what the clients could have at once, at most
        kv_tokens = sum(replica.shape.kv_tokens for replica in life.cluster.replicas.values())
        most = max(W_P, W_Q) * kv_tokens / min(habit.weight for habit in life.crowd.habits)
        checks.append(Check("cluster: measured U, w_q * sum of M", life.cluster.dispatcher.bounds.unit, most))
    return checks


def moving_mean(seed: int, steps: int = STEPS) -> list[Check]:
    """The same, and every grant is charged what the client's answers were long before."""
    rng = random.Random(seed)
    life = random_life(rng, random_weights(rng, CLIENTS), prediction="moving_mean")
    life.run(steps)
    return list(life.measured("moving mean"))


def foretold(seed: int, steps: int = STEPS) -> list[Check]:
    """The same with lengths foretold: rightly, wrongly by up to four times, or not at all, each client its way."""
    rng = random.Random(seed)
    life = random_life(rng, random_weights(rng, CLIENTS), prediction="foretold")
    for habit in life.crowd.habits:
        habit.foretells = rng.choice((None, 1.0, 1.5, 4.0))
    life.run(steps)
    return list(life.measured("foretold"))


def hierarchy(seed: int, steps: int = STEPS) -> list[Check]:
    """Organisations, teams and users, weighted at every level: each group of siblings has its bound."""
    rng = random.Random(seed)
    life = random_life(rng, random_weights(rng, TREE), group_weights=random_weights(rng, GROUPS))
    life.run(steps)
    return list(life.measured("hierarchy"))


def authority_crash(seed: int, steps: int = STEPS) -> list[Check]:
    """The authority dies once or more and comes back with its snapshot or with nothing; see the top of this file."""
    rng = random.Random(seed)
    life = random_life(rng, random_weights(rng, CLIENTS), dies=False)
    life.authority_deaths = 2 / STEPS
    life.run(steps)
    bounds = life.cluster.dispatcher.bounds
    lives = [*life.earlier, (bounds.unit, bounds.staleness)]
    total, past = sum(unit + staleness for unit, staleness in lives), life.unaccounted()
    watch = life.watches[0]
    return [
        Check("crash of the authority: both wait, sum of 2(U+S)", watch.worst_pair, 2 * (total + past)),
        Check("crash of the authority: one waits, sum of 3(U+S)", watch.worst_lag, 3 * (total + past)),
    ]


def random_life(
    rng: random.Random,
    weights: dict[str, float],
    *,
    prediction: str = "none",
    group_weights: dict[str, float] | None = None,
    dies: bool = True,
) -> Life:
    """A cluster of any shape in any weather, and who lives on it."""
    kv_tokens = rng.randint(20, 60)
    shapes = [
        Shape(rng.randint(1, 5), kv_tokens * rng.choice((1, 1, 2, 3)), rng.choice((0.4, 1.0, 1.0, 2.5)))
        for _ in range(rng.randint(1, 3))
    ]
    loss = rng.choice((0.0, 0.0, 0.1, 0.3))
    swallowed = rng.choice((0.0, 0.05)) if not loss else 0.0
    cluster = ToyCluster(
        num_routers=rng.randint(1, 3),
        network=Lossy(rng, loss) if loss else Perfect(),
        report_every=rng.randint(1, 5),
        limits=DispatchLimits(lookahead=rng.randint(0, 2), lease_s=1.0 if swallowed else 5.0, replica_dead_s=4.0),
        shapes=shapes,
        prediction=prediction,
        group_weights=group_weights,
        swallow=lambda: rng.random() < swallowed,
    )
    crowd = Crowd(cluster, habits(rng, weights, kv_tokens, rng.choice((0.0, 0.0, 0.1, 0.3))), rng)
    deaths = rng.choice((0.0, 0.0, 2 / STEPS, 6 / STEPS)) if dies else 0.0
    return Life(cluster, crowd, list(_watches(cluster, weights, group_weights or {})), rng, replica_deaths=deaths)


def _watches(cluster: ToyCluster, weights: dict[str, float], group_weights: dict[str, float]) -> Iterator[Watch]:
    """One for every group of siblings."""
    siblings: dict[str, dict[str, float]] = {TOP: {}}
    leaves: dict[str, list[str]] = {}
    for client, weight in weights.items():
        for node in path_of(client):
            is_leaf = node == client
            siblings.setdefault(group_of(node), {})[node] = weight if is_leaf else group_weights[node.removesuffix("/")]
            leaves.setdefault(node, []).append(client)
    for group, members in siblings.items():
        if len(members) > 1:
            yield Watch(cluster, members, group, leaves)


def late_replies(seed: int, steps: int = STEPS) -> list[Check]:
    """One replica that orders its own queue (routers went around a slow authority): what it delivers to clients that
    all wait differs by U at most, although the authority's counters arrive steps after the report that they answer."""
    rng = random.Random(seed)
    cluster = ToyCluster(slots=rng.randint(1, 6))
    replica, lag = cluster.replicas["replica-0"], rng.randint(1, 20)
    crowd = habits(rng, dict.fromkeys(CLIENTS[:3], 1.0), rng.randint(20, 60))
    requests: dict[str, ToyRequest] = {}
    spread = unit = 0.0
    reply, due_step = None, 0
    for step in range(steps):
        waiting = [requests[request_id].client for request_id in replica.needs if request_id not in replica.running]
        for habit in crowd:
            for _ in range(8 - waiting.count(habit.client)):
                request = random_request(rng, habit, f"r{len(requests)}")
                requests[request.request_id] = request
                replica.accept(request)
        replica.step()
        owed = dict.fromkeys(CLIENTS[:3], 0)
        for request_id, request in replica.running.items():
            owed[request.client] += W_Q * (request.num_output - replica.made[request_id])
        for request_id, request in replica.running.items():
            if not replica.made[request_id]:  # started in this step
                unit = max(unit, W_P * request.num_input + owed[request.client])
        delivered = [cluster.delivered(client) for client in CLIENTS[:3]]
        spread = max(spread, max(delivered) - min(delivered))
        if reply is not None and step >= due_step:
            cluster.deliver_report_reply(replica, reply)
            reply = None
        if reply is None:
            reply, due_step = cluster.dispatcher.report(cluster.compose(replica), step * cluster.step_s), step + lag
    return [Check("late replies: service of those that wait on one replica, U", spread, unit)]


FAMILIES: dict[str, Family] = {
    "paper": paper,
    "weighted": weighted,
    "cluster": whole_cluster,
    "moving_mean": moving_mean,
    "foretold": foretold,
    "hierarchy": hierarchy,
    "authority_crash": authority_crash,
    "late_replies": late_replies,
}


def violations(family: str, seeds: Iterable[int], steps: int = STEPS) -> list[tuple[int, Check]]:
    """Every check that failed, with its seed."""
    return [(seed, check) for seed in seeds for check in FAMILIES[family](seed, steps) if not check.holds]
