"""Names of accounts: one per client and application, so that a policy may price applications differently.

A replica that has closed an account and opens it again counts from zero under a new *generation* of the name
(``dispatch/replica_book.py``): ``ann``, ``ann||3``; ``ann|chat``, ``ann|chat|3``.
"""

from __future__ import annotations

SEPARATOR = "|"
"""In no client's and no application's name."""


def account_of(client: str, application: str, generation: int = 0) -> str:
    if generation:
        return f"{client}{SEPARATOR}{application}{SEPARATOR}{generation}"
    return f"{client}{SEPARATOR}{application}" if application else client


def client_of(account: str) -> str:
    return account.partition(SEPARATOR)[0]


def application_of(account: str) -> str:
    """An empty one for the account of a client without application."""
    return account.partition(SEPARATOR)[2].partition(SEPARATOR)[0]


def first_generation(account: str) -> str:
    """The same account, whatever its generation."""
    if SEPARATOR not in account:
        return account
    return account_of(client_of(account), application_of(account))
