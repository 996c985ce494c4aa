"""Fair, multi-tenant LLM serving on Ray Serve."""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {"connect": "fairserve.client", "Connection": "fairserve.client"}
"""Public names -> where they are; ``__init__.pyi`` tells type checkers. ``import fairserve`` stays light."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
