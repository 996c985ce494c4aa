"""A desk whose invariants are checked after every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.dispatch.kit import Desk


@pytest.fixture
def make_desk() -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def build(policy: str = "vtc", **more: object) -> Desk:
        desks.append(Desk(policy, **more))  # type: ignore[arg-type]
        return desks[-1]

    yield build
    for desk in desks:
        desk.check()


@pytest.fixture
def desk(make_desk: Callable[..., Desk]) -> Desk:
    return make_desk()
