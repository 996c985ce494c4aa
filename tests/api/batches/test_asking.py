"""As whom a batch runs, and for how long a line of it may take."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers

from fairserve.api.batches.asking import batch_client
from fairserve.api.identity import Client, Identities
from fairserve.cluster.desk import Desk
from fairserve.config import ApiConfig, ApiKey, FairServeArgs
from fairserve.dispatch.controls import Control
from fairserve.errors import InvalidRequest
from fairserve.fairness.hierarchy import group_of, path_of
from tests.api.batches.conftest import IngressMaker, chat_line


@pytest.mark.parametrize("name", ["ann", "acme/ann", "acme/research/" + "x" * 64])
def test_a_batch_stands_beside_its_owner_and_below_nobody(name: str) -> None:
    batch = batch_client(Client(name, 4.0, max_waiting=7), 0.1)
    assert batch == Client(f"{name}+batch", 0.4, max_waiting=7)
    assert group_of(batch.name) == group_of(name) and len(path_of(batch.name)) == len(path_of(name))


def test_nobody_else_can_be_a_clients_batch() -> None:
    with pytest.raises(ValidationError):
        ApiKey(client="ann+batch", key="secret-of-ann")
    anybody = Identities()
    assert anybody.identify(Headers({"authorization": "Bearer ann+batch"})).name.startswith("key-")
    keys = [{"client": "gate", "key": "secret-of-gate"}]
    config = ApiConfig.model_validate({"keys": keys, "trusted_client_header": "X-Client", "trusted_gateways": ["gate"]})
    headers = Headers({"authorization": "Bearer secret-of-gate", "x-client": "ann+batch"})
    with pytest.raises(InvalidRequest, match="must name one client"):
        Identities.from_config(config, {}).identify(headers)


def test_a_batch_can_be_paused_and_weighed_while_it_runs() -> None:
    desk = Desk(FairServeArgs(), lambda: 1_000.0)
    desk.adopt(desk.plan_client("acme/ann+batch", {"is_paused": True, "weight": 3}, "root"))
    assert desk.control("acme/ann+batch") == Control(weight=3.0, is_paused=True)
    for name in ("ann+bath", "+batch", "ann+batch/x", "ann+batch+batch"):
        with pytest.raises(InvalidRequest, match="cannot be a client"):
            desk.plan_client(name, {"weight": 3}, "root")


async def test_no_deadline_of_single_requests_ends_a_line_that_waits_for_its_turn(make_ingress: IngressMaker) -> None:
    def refuse(limit_s: float) -> None:
        raise AssertionError("a deadline was set")

    ingress = make_ingress(api={"timeout": refuse})
    batch = await ingress.batch(chat_line("a"))
    await ingress.work()
    assert (await ingress.client().batches.retrieve(batch.id)).request_counts.completed == 1
