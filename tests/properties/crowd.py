"""Clients with habits for a ToyCluster, and a watch on the gaps between them that trusts no code under test."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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

    def is_awake(self, step: int) -> bool:
        period = self.awake_steps + self.sleep_steps
        return not self.sleep_steps or (step + self.phase) % period < self.awake_steps


@dataclass
class Crowd:
    """Lets the clients live on the cluster, step by step."""

    cluster: ToyCluster
    habits: list[Habit]
    rng: random.Random
    live: dict[str, list[str]] = field(default_factory=dict)

    def run(self, num_steps: int) -> None:
        for step in range(num_steps):
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
        num_waiting = sum(self._waits(request_id) for request_id in self.live.get(habit.client, ()))
        for _ in range(habit.depth - num_waiting):
            output = self.rng.randint(1, habit.max_output)
            request = ToyRequest(
                f"{habit.client}-{len(self.cluster.requests)}",
                habit.client,
                self.rng.randint(1, habit.max_input),
                output,
                self.rng.randint(output, habit.max_output),
                habit.weight,
            )
            mine = self.live.setdefault(habit.client, [])
            mine.append(request.request_id)
            self.cluster.submit(request, router=self.rng.randrange(len(self.cluster.routers)))
        self.live[habit.client] = self.live[habit.client][-4 * habit.depth :]

    def _waits(self, request_id: str) -> bool:
        return request_id in self.cluster.dispatcher.queue or request_id in self.cluster.requests[request_id][1]._wanted


@dataclass
class Watch:
    """Takes the GapMonitor's place, so that it sees every change; then compares *delivered* service by brute force.

    ``worst_pair``: over intervals in which both wait throughout. ``worst_lag``: how far a client that waits throughout
    falls behind any other, waiting or not. Both in service / weight.
    """

    cluster: ToyCluster
    weights: Mapping[str, float]
    worst_pair: float = 0.0
    worst_lag: float = 0.0
    num_pair_samples: int = 0
    _waiting: set[str] = field(default_factory=set)
    _span: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    _least: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inner = self.cluster.dispatcher.gaps
        self.cluster.dispatcher.watch.gaps[""] = self  # type: ignore[assignment]
        self.cluster.on_step.append(self.sample)

    def observe(self, service: Mapping[str, float], is_waiting: Callable[[str], bool]) -> None:
        self.inner.observe(service, is_waiting)
        for client in service:
            if is_waiting(client):
                self._waiting.add(client)
            else:
                self._waiting.discard(client)
                self._span = {pair: span for pair, span in self._span.items() if client not in pair}
                self._least = {pair: least for pair, least in self._least.items() if pair[0] != client}
        self.sample()

    def sample(self) -> None:
        delivered = {client: self.cluster.delivered(client) / weight for client, weight in self.weights.items()}
        for one in self._waiting:
            for two in self.weights:
                if one == two:
                    continue
                lead = delivered[two] - delivered[one]
                least = self._least[one, two] = min(self._least.get((one, two), lead), lead)
                self.worst_lag = max(self.worst_lag, lead - least)
                if two in self._waiting and one < two:
                    low, high = self._span.get((one, two), (lead, lead))
                    low, high = self._span[one, two] = min(low, lead), max(high, lead)
                    self.worst_pair = max(self.worst_pair, high - low)
                    self.num_pair_samples += 1

    @property
    def worst(self) -> float:
        return self.inner.worst

    @property
    def worst_pair_of_inner(self) -> tuple[str, str] | None:
        return self.inner.worst_pair
