"""Clients with habits for a ToyCluster, and a watch on the gaps between them that trusts no code under test."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fairserve.fairness.bounds import GapMonitor
from fairserve.fairness.hierarchy import TOP
from tests.toy_cluster import ToyCluster, ToyRequest


@dataclass
class Habit:
    """How a client behaves. It keeps ``depth`` requests waiting while it is awake; ``sleep_steps`` 0: never sleeps."""

    client: str
    weight: float = 1.0
    max_input: int = 30
    max_output: int = 20
    depth: int = 3
    awake_steps: int = 50
    sleep_steps: int = 0
    cancels: float = 0.0
    """Chance per step that it cancels one of its requests, at whatever stage."""
    phase: int = 0
    first_step: int = 0
    is_monotonous: bool = False
    """All its requests are as long as they may be."""
    foretells: float | None = None
    """It foretells each output as its real length times up to so much or its inverse; 1: right; None: not at all."""

    def is_awake(self, step: int) -> bool:
        period = self.awake_steps + self.sleep_steps
        if step < self.first_step:
            return False
        return not self.sleep_steps or (step + self.phase) % period < self.awake_steps


@dataclass
class Crowd:
    """Lets the clients live on the cluster, step by step."""

    cluster: ToyCluster
    habits: list[Habit]
    rng: random.Random
    live: dict[str, list[str]] = field(default_factory=dict)
    num_steps: int = 0

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            step, self.num_steps = self.num_steps, self.num_steps + 1
            for habit in self.habits:
                if habit.is_awake(step):
                    self._submit(habit)
                if habit.cancels and self.live.get(habit.client) and self.rng.random() < habit.cancels:
                    mine = self.live[habit.client]
                    self.cluster.cancel(mine.pop(self.rng.randrange(len(mine))))
            self.cluster.step()

    def _submit(self, habit: Habit) -> None:
        """Tops the backlog up. The router hears of it before the next report, so a client that is always awake always
        waits."""
        queue, requests = self.cluster.dispatcher.queue, self.cluster.requests
        num_waiting = 0
        for request_id in self.live.get(habit.client, ()):
            num_waiting += request_id in queue or request_id in requests[request_id][1]._wanted
        for _ in range(habit.depth - num_waiting):
            request = random_request(self.rng, habit, f"{habit.client}-{len(requests)}")
            mine = self.live.setdefault(habit.client, [])
            mine.append(request.request_id)
            self.cluster.submit(request, router=self.rng.randrange(len(self.cluster.routers)))
        self.live[habit.client] = self.live[habit.client][-4 * habit.depth :]


def random_request(rng: random.Random, habit: Habit, request_id: str) -> ToyRequest:
    least_input, least_output = (habit.max_input, habit.max_output) if habit.is_monotonous else (1, 1)
    output = rng.randint(least_output, habit.max_output)
    return ToyRequest(
        request_id,
        habit.client,
        rng.randint(least_input, habit.max_input),
        output,
        rng.randint(output, habit.max_output),
        habit.weight,
        foretold=None if habit.foretells is None else round(output * habit.foretells ** rng.uniform(-1, 1)),
    )


class Watch:
    """Takes a GapMonitor's place, so that it sees every change; then compares *delivered* service by brute force, among
    the siblings of one group.

    ``weights``: of the siblings. ``leaves``: the clients below each, itself where names are flat.
    ``worst_pair``: over intervals in which both wait throughout. ``worst_lag``: how far one that waits throughout falls
    behind any other, waiting or not. ``worst_spread``: between counters of those that wait at one moment. All in
    service / weight.
    """

    def __init__(
        self,
        cluster: ToyCluster,
        weights: Mapping[str, float],
        group: str = TOP,
        leaves: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.cluster, self.group = cluster, group
        self._leaves = [(node, weight, (leaves or {}).get(node, (node,))) for node, weight in weights.items()]
        self.worst_pair = self.worst_lag = self.worst_spread = 0.0
        self.num_pair_samples = 0
        self._waiting: set[str] = set()
        self._service = dict.fromkeys(weights, 0.0)
        self._least: dict[str, dict[str, float]] = {}
        """``_least[a][b]``: the least that service of b minus service of a has been since a waits."""
        self._least_both: dict[str, dict[str, float]] = {}
        """The same since both wait."""
        self._sampled_step = -1
        self.attach()
        cluster.on_step.append(self.sample)

    def attach(self) -> None:
        """Watch the authority that there is now."""
        gaps = self.cluster.dispatcher.watch.gaps
        self.inner = gaps.get(self.group) or GapMonitor()
        gaps[self.group] = self  # type: ignore[assignment]

    def observe(self, service: Mapping[str, float], is_waiting: Callable[[str], bool]) -> None:
        self.inner.observe(service, is_waiting)
        self.sample()
        for node in service:
            if not is_waiting(node):
                self.left(node)
            elif node not in self._waiting:
                mine = self._service[node]
                leads = {other: theirs - mine for other, theirs in self._service.items() if other != node}
                self._least[node] = leads
                self._least_both[node] = {other: leads[other] for other in self._waiting}
                for other in self._waiting:
                    self._least_both[other][node] = -leads[other]
                self._waiting.add(node)
        if len(self._waiting) > 1:
            counters = [self.cluster.dispatcher.queue.counter(node) for node in self._waiting]
            self.worst_spread = max(self.worst_spread, max(counters) - min(counters))

    def left(self, node: str) -> None:
        """It stopped waiting: its intervals end."""
        if node in self._waiting:
            self._waiting.discard(node)
            del self._least[node]
            for other in self._least_both.pop(node):
                del self._least_both[other][node]

    def sample(self) -> None:
        """Delivered service changes when replicas step, and only then; backlogs change after that."""
        if self._sampled_step == self.cluster.num_steps:
            return
        self._sampled_step = self.cluster.num_steps
        service = self._service
        for node, weight, leaves in self._leaves:
            service[node] = sum(map(self.cluster.delivered, leaves)) / weight
        for one in self._waiting:
            mine = service[one]
            for rows, both in ((self._least[one], False), (self._least_both[one], True)):
                for other, least in rows.items():
                    lead = service[other] - mine
                    if lead < least:
                        rows[other] = lead
                    elif not both:
                        self.worst_lag = max(self.worst_lag, lead - least)
                    else:
                        self.worst_pair = max(self.worst_pair, lead - least)
            self.num_pair_samples += len(self._waiting) - 1

    def most(self, service: Mapping[str, float]) -> float:
        """The most that one sibling has of this service by client, per weight."""
        return max(sum(service.get(client, 0.0) for client in leaves) / weight for _, weight, leaves in self._leaves)

    def waits_in(self, clients: Collection[str], node: str) -> bool:
        """One of these clients is, or is below, the node."""
        return any(node == name and not set(leaves).isdisjoint(clients) for name, _, leaves in self._leaves)

    @property
    def waiting(self) -> frozenset[str]:
        return frozenset(self._waiting)

    @property
    def worst(self) -> float:
        return self.inner.worst
