"""Names of accounts: one per client and application, so that a policy may price applications differently."""

from __future__ import annotations

SEPARATOR = "|"
"""In no client's and no application's name."""


def account_of(client: str, application: str) -> str:
    return f"{client}{SEPARATOR}{application}" if application else client


def client_of(account: str) -> str:
    return account.partition(SEPARATOR)[0]


def application_of(account: str) -> str:
    """An empty one for the account of a client without application."""
    return account.partition(SEPARATOR)[2]
