"""Organisation > team > user: a client's name is a path, and every step of it is a node with a counter of its own.

``acme/research/ann`` hangs below ``acme/research/``, which hangs below ``acme/``, which stands beside all other
organisations at the top. Siblings are compared with each other only. A client without a slash stands at the top: a flat
system is a tree of one level. A tenant that is split into k keys has k leaves and still one share.

The scheme is hierarchical fair queueing (Bennett and Zhang, "Hierarchical packet fair queueing algorithms", SIGCOMM'96)
with VTC at every node: token-weighted and, because only waiting nodes take part, work-conserving at every level.
"""

from __future__ import annotations

from functools import lru_cache

TOP = ""
"""Name of the group of all organisations."""


def path_of(client: str) -> tuple[str, ...]:
    """The nodes from the top down to the client itself. Groups end with a slash, so that ``acme`` the client and
    ``acme/`` the organisation are two nodes."""
    return _path_of(client) if "/" in client else (client,)


@lru_cache(maxsize=1 << 17)
def _path_of(client: str) -> tuple[str, ...]:
    parts = client.split("/")
    return (*("/".join(parts[:i]) + "/" for i in range(1, len(parts))), client)


def owner_of(client: str) -> str:
    """``acme/ann`` of what its batches and service tiers run as: ``acme/ann+batch``, ``acme/ann+flex``."""
    return client.partition("+")[0]


def group_of(node: str) -> str:
    """The group whose member the node is."""
    return _group_of(node) if "/" in node else TOP


@lru_cache(maxsize=1 << 17)
def _group_of(node: str) -> str:
    head, slash, _ = node.removesuffix("/").rpartition("/")
    return head + slash


def forget_paths() -> None:
    """Empty the caches: for those who measure memory."""
    _path_of.cache_clear()
    _group_of.cache_clear()


def is_group(node: str) -> bool:
    return node.endswith("/")
