"""A batch runs beside its owner at a tenth of the weight: it fills what is free, and nobody waits for its lines."""

from __future__ import annotations

import random

import pytest

from fairserve.config import BatchesConfig, DispatchConfig, FairnessConfig
from fairserve.dispatch.status import status
from tests.dispatch.batch_cluster import BLOCK, BatchCluster, Job

SHARE = BatchesConfig().weight
LINES = 16
"""Of the batch, that wait or run at a time."""


class Office:
    """A cluster on which ``ann`` has a batch that never ends. ``weights`` of clients that are no batch: 1."""

    def __init__(self, seed: int, prediction: str = "none", num_replicas: int = 1) -> None:
        self.rng = random.Random(seed)
        self.cluster = BatchCluster(
            FairnessConfig.model_validate({"prediction": prediction}),
            DispatchConfig(lookahead=0, reserve_output_tokens=None, prefix_block_tokens=BLOCK),
            num_replicas=num_replicas,
            kv_tokens=400,
        )

    def want(self, client: str, depth: int, weight: float = 1.0) -> None:
        """``depth`` requests of the client are under way."""
        cluster = self.cluster
        running = sum(s.request.client == client for r in cluster.replicas for s in r.batcher.running.values())
        for _ in range(depth - running - cluster.dispatcher.queue.backlog.num_waiting(client)):
            self.send(client, weight)

    def send(self, client: str, weight: float = 1.0) -> str:
        request_id = f"{client}-{len(self.cluster.jobs)}"
        num_output = self.rng.randint(5, 20)
        self.cluster.submit(Job(request_id, client, self.rng.randint(5, 30), num_output, num_output, weight))
        return request_id

    def live(self, num_steps: int, *, busy: tuple[str, ...] = (), batch: str = "ann+batch") -> None:
        for _ in range(num_steps):
            self.want(batch, LINES, SHARE)
            for client in busy:
                self.want(client, LINES)
            self.cluster.step()


@pytest.mark.parametrize("prediction", ["none", "moving_mean"])
@pytest.mark.parametrize("batch", ["ann+batch", "acme/ann+batch"])
def test_a_batch_gets_a_tenth_of_what_its_owner_gets_and_takes_it_from_its_own_siblings(
    prediction: str, batch: str
) -> None:
    office = Office(1, prediction, num_replicas=2)
    owner = batch.removesuffix("+batch")
    office.live(400, busy=(owner, "bob"), batch=batch)
    made = {client: office.cluster.made(client) for client in (owner, batch, "bob")}
    assert made[batch] / made[owner] == pytest.approx(SHARE, rel=0.15)
    # At the top the batch is one more client of a tenth; within an organisation its tenth is the organisation's.
    others = made[owner] + made[batch] if "/" in owner else made[owner]
    assert made["bob"] == pytest.approx(others, rel=0.07)
    now = status(office.cluster.dispatcher, office.cluster.now_s)
    assert now["worst_gap"] <= now["bound"] + 1e-6


@pytest.mark.parametrize("client", ["ann", "bob"])
@pytest.mark.parametrize("seed", range(5))
def test_who_comes_while_a_batch_runs_goes_next(client: str, seed: int) -> None:
    office = Office(seed)
    cluster = office.cluster
    office.live(100 + seed)
    running = cluster.replicas[0].batcher.running.values()
    first, second, *_ = sorted(cluster.jobs[s.request.request_id].num_output - len(s.output) for s in running)
    before = set(cluster.grants)
    sent = office.send(client)
    num_steps = 0
    while sent not in cluster.grants:
        office.want("ann+batch", LINES, SHARE)
        cluster.step()
        num_steps += 1
    lines = set(cluster.grants) - before - {sent}
    assert len(lines) <= 1, "no more than the one that was granted in the moment before it came"
    assert num_steps <= (second if lines else first) + 3, "it waited for longer than for a slot"


def test_a_batch_alone_has_the_whole_cluster() -> None:
    office = Office(3)
    office.live(50)
    assert len(office.cluster.replicas[0].batcher.running) == office.cluster.slots
