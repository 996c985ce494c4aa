"""How long Serve lets a replica and an ingress finish what they run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fairserve.config import GOODBYE_S, FairServeArgs


@pytest.mark.parametrize(
    ("settings", "longest_s"),
    [
        ({}, 3600.0),
        ({"api": {"request_timeout_s": 120}}, 120.0),
        ({"max_generation_s": 30}, 30.0),
    ],
)
def test_what_is_stopped_may_finish_the_longest_request_that_the_settings_allow(
    settings: dict[str, object], longest_s: float
) -> None:
    from fairserve.app import build_ingress, build_model

    args = FairServeArgs.model_validate(settings)
    model = build_model(args)
    for application in (model, build_ingress(args, model)):
        deployment = application._bound_deployment
        assert deployment._deployment_config.graceful_shutdown_timeout_s == longest_s + GOODBYE_S


async def test_an_ingress_gives_its_batches_back_when_serve_ends_it() -> None:
    """As Serve does it, by the destructor of the class that it makes of ours."""
    from ray import serve

    from fairserve.app import Ingress

    released = []

    class Keeper:
        async def release(self) -> None:
            released.append(self)

    keeper = Keeper()
    end = serve.ingress()(Ingress).__del__
    await end(SimpleNamespace(_batches=SimpleNamespace(keeper=keeper)))
    await end(SimpleNamespace(_batches=None))  # nothing is kept
    await end(SimpleNamespace())  # its start failed half-way
    assert released == [keeper]
