"""Keys that come and go while the service runs: who is let in, what wins, and an ingress without the actor."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.datastructures import Headers

from fairserve.api.identity import Client, Identities
from fairserve.api.live_keys import POLL_S, START_S, LiveKeys
from fairserve.config import ApiKey, key_digest
from fairserve.errors import InvalidRequest, Unauthenticated


def key(client: str, secret: str = "", **more: Any) -> ApiKey:
    return ApiKey(client=client, key_sha256=key_digest(secret or f"fs-{client}"), **more)


def who(identities: Identities, secret: str, **headers: str) -> Client:
    sent = {"authorization": f"Bearer {secret}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return identities.identify(Headers(sent))


# -- the directory -----------------------------------------------------------------------------------------------------


def test_a_live_key_names_its_client_with_weight_limit_and_applications() -> None:
    deployed = Identities([key("ann")])
    live = deployed.with_live([key("bob", weight=3.0, max_waiting=7, applications=("chat",))])
    assert who(live, "fs-bob") == Client("bob", 3.0, 7, ("chat",))
    assert who(live, "fs-ann") == Client("ann")
    with pytest.raises(Unauthenticated):
        who(deployed, "fs-bob")


def test_the_first_live_key_closes_an_open_service_and_revoking_it_does_not_open_it_again() -> None:
    deployed = Identities()
    assert deployed.is_open and who(deployed, "anything").name == "anything"
    for live in (deployed.with_live([key("bob")]), deployed.with_live([])):
        assert not live.is_open
        with pytest.raises(Unauthenticated):
            who(live, "anything")
    with pytest.raises(Unauthenticated):
        deployed.with_live([]).identify(Headers({}))


def test_what_is_deployed_wins(caplog: pytest.LogCaptureFixture) -> None:
    deployed = Identities([key("ann", weight=2.0, max_waiting=5), key("acme/eve")])
    with caplog.at_level(logging.WARNING):
        live = deployed.with_live(
            [
                key("mallory", "fs-ann"),
                key("ann", "fs-ann-2", weight=9.0, applications=("chat",)),
                key("acme", "fs-above"),
                key("acme/eve/x", "fs-below"),
                key("acme/bob", "fs-beside"),
            ]
        )
    assert who(live, "fs-ann") == Client("ann", 2.0, 5)
    assert who(live, "fs-ann-2") == Client("ann", 2.0, 5, ("chat",))
    assert who(live, "fs-beside").name == "acme/bob"
    for secret in ("fs-above", "fs-below"):
        with pytest.raises(Unauthenticated):
            who(live, secret)
    assert caplog.text.count("lets nobody in") == 2 and "which holds" in caplog.text
    assert "fs-" not in caplog.text and key_digest("fs-ann") not in caplog.text


def test_a_gateway_may_name_live_clients_and_the_tree_holds_for_them() -> None:
    deployed = Identities([key("gate")], header="X-Client-Id", gateways=["gate"])
    live = deployed.with_live([key("acme/eve", weight=4.0)])
    assert who(live, "fs-gate", x_client_id="acme/eve").weight == 4.0
    with pytest.raises(InvalidRequest, match="stands above"):
        who(live, "fs-gate", x_client_id="acme")


def test_a_gateway_without_a_key_is_none_once_live_keys_close_the_service() -> None:
    live = Identities(header="X-Client-Id", gateways=["gate"]).with_live([key("bob")])
    assert who(live, "fs-bob", x_client_id="ann").name == "bob"


# -- asking for it -----------------------------------------------------------------------------------------------------


class Actor:
    """Stands for the counter actor's ``key_directory``."""

    def __init__(self) -> None:
        self.version, self.keys = 0, list[ApiKey]()
        self.error: Exception | None = None
        self.asked: list[int] = []

    async def key_directory(self, version: int) -> dict[str, Any] | None:
        self.asked.append(version)
        if self.error is not None:
            raise self.error
        if version == self.version:
            return None
        return {"version": self.version, "keys": [one.model_dump(mode="json", exclude={"key"}) for one in self.keys]}


class Door:
    """Holds what was adopted, and counts it."""

    def __init__(self, deployed: Identities) -> None:
        self.identities = deployed
        self.num_adopted = 0

    def adopt(self, identities: Identities) -> None:
        self.identities = identities
        self.num_adopted += 1


@pytest.fixture
def actor() -> Actor:
    return Actor()


def make(actor: Actor, *keys: ApiKey) -> tuple[LiveKeys, Door, list[float]]:
    deployed, pauses = Identities(keys), list[float]()
    door = Door(deployed)

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    return LiveKeys(deployed, actor.key_directory, door.adopt, pause), door, pauses


async def test_a_key_that_is_created_lets_in_and_one_that_is_revoked_does_not(actor: Actor) -> None:
    live, door, _ = make(actor, key("ann"))
    await live.begin()
    actor.version, actor.keys = 5, [key("bob")]
    assert await live.refresh() and who(door.identities, "fs-bob").name == "bob"
    assert await live.refresh() and door.num_adopted == 2, "unchanged: nothing is exchanged"
    actor.version, actor.keys = 6, []
    await live.refresh()
    with pytest.raises(Unauthenticated):
        who(door.identities, "fs-bob")
    assert actor.asked == [-1, 0, 5, 5]


async def test_while_the_actor_is_away_the_last_directory_holds(actor: Actor, caplog: pytest.LogCaptureFixture) -> None:
    live, door, _ = make(actor, key("ann"))
    actor.version, actor.keys = 5, [key("bob")]
    await live.refresh()
    actor.error = ConnectionError("restarting")
    with caplog.at_level(logging.WARNING):
        assert not await live.refresh() and not await live.refresh()
    assert caplog.text.count("the last ones hold") == 1, "told once"
    assert who(door.identities, "fs-bob").name == "bob"
    actor.error, actor.version, actor.keys = None, 6, []
    assert await live.refresh()


async def test_an_answer_that_makes_no_sense_changes_nothing(actor: Actor) -> None:
    live, door, _ = make(actor, key("ann"))
    actor.version, actor.keys = 5, [key("bob"), key("bob", "fs-2", weight=9.0)]
    assert not await live.refresh()
    assert door.num_adopted == 0 and who(door.identities, "fs-ann").name == "ann"


async def test_an_open_service_closes_and_stays_closed_even_if_the_actor_forgets(
    actor: Actor, caplog: pytest.LogCaptureFixture
) -> None:
    live, door, _ = make(actor)
    await live.begin()
    assert door.identities.is_open
    actor.version, actor.keys = 5, [key("bob")]
    with caplog.at_level(logging.WARNING):
        await live.refresh()
    assert not door.identities.is_open and "no longer OPEN" in caplog.text
    for version in (6, 0):
        actor.version, actor.keys = version, []
        assert await live.refresh() and not door.identities.is_open


async def test_without_deployed_keys_an_ingress_waits_for_the_first_answer(actor: Actor) -> None:
    """It cannot know whether anybody may call."""
    actor.error = ConnectionError("not there yet")
    live, _, pauses = make(actor)
    with pytest.raises(RuntimeError, match="nobody knows who may call"):
        await live.begin()
    assert sum(pauses) == START_S and set(pauses) == {POLL_S}


async def test_with_deployed_keys_an_ingress_starts_without_the_actor(actor: Actor) -> None:
    actor.error = ConnectionError("not there yet")
    live, door, pauses = make(actor, key("ann"))
    await live.begin()
    assert pauses == [] and who(door.identities, "fs-ann").name == "ann"


async def test_it_asks_once_a_second(actor: Actor) -> None:
    live, _, pauses = make(actor, key("ann"))
    actor.error = None
    original = live._pause

    async def pause(seconds: float) -> None:
        await original(seconds)
        if len(pauses) > 3:
            raise KeyboardInterrupt

    live._pause = pause
    with pytest.raises(KeyboardInterrupt):
        await live.run()
    assert set(pauses) == {1.0} and len(actor.asked) == 3
