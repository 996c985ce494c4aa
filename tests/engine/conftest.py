"""The tiny models, built once; torch on one thread, because the machine is shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fairserve.engine.loading import LoadedModel
from tests.engine.support import prepare, tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama() -> LoadedModel:
    """A tiny random Llama; engines may be built on it one after another."""
    return prepare(tiny("llama"))
