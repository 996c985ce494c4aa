"""What a request says of itself: which interaction it is a call of, its place in there, which application sends it.

Each comes from a header or, for callers that cannot set headers, from OpenAI's ``metadata``::

    X-Fairserve-Interaction-Id    metadata.interaction_id    1-128 of A-Z a-z 0-9 . _ : -
    X-Fairserve-Call-Index        metadata.call_index        an integer from 0 to 1000000, from 0 within an interaction
    X-Fairserve-Application       metadata.application       1-64 of A-Z a-z 0-9 . _ : -

Given in both places they must be equal. An interaction is one user task, often of several calls; its id counts within
the client only, and the index is a hint. The application is a claim, and as policy ``wsc`` compares service by
application, a claim is worth what the operator made of it:

- a key that registers applications may send one of them, anything else is refused; callers who send none get the
  first, so that leaving the label out is no way round it;
- a key that registers none has no application, and what its callers send is ignored, as it is in open mode;
- a trusted gateway may send any, and so must not pass on what its own callers send. Where it sends none, the client
  that it names has its first registered one, if any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fairserve.api.identity import Client, Headers
from fairserve.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Labels:
    """As in :class:`~fairserve.engine.request.GenerateRequest`."""

    application: str = ""
    interaction: str = ""
    call_index: int = 0


NO_LABELS = Labels()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one label may stand, and what it may be."""

    header: str
    key: str
    form: re.Pattern[str]
    rule: str

    def read(self, headers: Headers, metadata: Mapping[str, str]) -> str | None:
        """The label, None where it is given nowhere. Errors name places and rules, never what was sent."""
        in_headers, in_body = headers.getlist(self.header), metadata.get(self.key)
        if len(in_headers) > 1:
            raise InvalidRequest(f"header {self.header} is given {len(in_headers)} times", code="invalid_label")
        sent = in_headers[0] if in_headers else None
        if sent is not None and not self.form.fullmatch(sent):
            raise InvalidRequest(f"header {self.header} must be {self.rule}", code="invalid_label")
        if in_body is not None and not self.form.fullmatch(in_body):
            raise InvalidRequest(f"metadata.{self.key} must be {self.rule}", self.param, "invalid_label")
        if None not in (sent, in_body) and sent != in_body:
            detail = f"header {self.header} and metadata.{self.key} differ: send one of the two"
            raise InvalidRequest(detail, self.param, "conflicting_labels")
        return in_body if sent is None else sent

    @property
    def param(self) -> str:
        return f"metadata.{self.key}"


INTERACTION = _Source(
    "X-Fairserve-Interaction-Id",
    "interaction_id",
    re.compile(r"[A-Za-z0-9._:-]{1,128}"),
    "1-128 of A-Z a-z 0-9 . _ : -",
)
CALL_INDEX = _Source(
    "X-Fairserve-Call-Index",
    "call_index",
    re.compile(r"0|[1-9][0-9]{0,5}|1000000"),
    "an integer from 0 to 1000000, as a string of digits",
)
APPLICATION = _Source(
    "X-Fairserve-Application",
    "application",
    re.compile(r"[A-Za-z0-9._:-]{1,64}"),
    "1-64 of A-Z a-z 0-9 . _ : -",
)


def labels_of(headers: Headers, metadata: Mapping[str, str], client: Client) -> Labels:
    """The labels of one request of ``client``.

    Raises:
        InvalidRequest: a label of the wrong form, two that differ, a call index without an interaction, or an
            application that the key does not register.
    """
    interaction = INTERACTION.read(headers, metadata)
    call_index = CALL_INDEX.read(headers, metadata)
    application = APPLICATION.read(headers, metadata)
    if interaction is None and call_index is not None:
        raise InvalidRequest(
            f"a call index is the place in an interaction: send {INTERACTION.header} or {INTERACTION.param} with it",
            code="invalid_label",
        )
    return Labels(_allowed(application, client), interaction or "", int(call_index or 0))


def _allowed(asked: str | None, client: Client) -> str:
    known = client.applications
    if asked is None:
        return known[0] if known else ""
    if client.is_gateway or asked in known:
        return asked
    if known:
        detail = f"this API key may send as {APPLICATION.header} or {APPLICATION.param} only: {', '.join(known)}"
        raise InvalidRequest(detail, code="unknown_application")
    return ""
