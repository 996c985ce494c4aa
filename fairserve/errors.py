"""Every error that fairserve raises on purpose.

::

    FairServeError
    +-- ConfigError                 a setting is wrong; the message names the setting
    +-- ModelError                  a model cannot be found, verified or loaded
    +-- RequestError                the caller's request is wrong (HTTP 4xx, never retried)
    |   +-- InvalidRequest          a field has a wrong value
    |   +-- PromptTooLong           more prompt tokens than the context holds
    |   +-- Unauthenticated         no key, or an unknown key
    |   +-- UnknownModel            no such model is served here
    |   +-- UnknownClient           no client of that name is known to the counter actor
    |   +-- UnknownKey              no live API key of that id
    |   +-- UnknownFile             the caller has no file of that id
    |   +-- UnknownBatch            the caller has no batch of that id
    |   +-- UnknownResponse         responses are not stored, so there is none of any id (HTTP 404)
    |   +-- BatchesOff              this service keeps no files and runs no batches (HTTP 404)
    |   +-- AdminKeyRequired        /admin needs an admin key, or another one (HTTP 403)
    |   +-- BodyTooLarge            more bytes than max_body_bytes (HTTP 413)
    |   +-- BodyTooSlow             the body did not come whole within read_timeout_s (HTTP 408)
    |   +-- HeadersTooLarge         more header fields, or more bytes in them, than are read (HTTP 431)
    |   +-- WrongContentType        the body is not declared as plain JSON (HTTP 415)
    +-- Refused                     the request is fine, there is no room now (HTTP 429)
    |   +-- ClientQueueFull         this client has too many waiting requests
    |   +-- ClusterQueueFull        the whole cluster has too many waiting requests
    |   +-- RateLimited             policy ``rpm``: too many requests in the window
    |   +-- ClientRateLimited       an operator limits this client's requests per minute
    |   +-- BudgetSpent             a token budget of the client, or of a group above it, has no room for the request
    |   +-- InteractionThrottled    overload: who sent too many requests in the last 60 s begins no new interaction
    +-- RequestTimeout              not finished within request_timeout_s (HTTP 504)
    +-- ChangeNotKept               a live change could be kept nowhere, so it was not made (HTTP 503)
    +-- StorageFailed               the folder of files and batches cannot be read or written (HTTP 503)
    +-- CounterUnreachable          the counter actor is not there, or did not answer in time (HTTP 503)
    +-- GrafanaFailed               Grafana refused, is not there, or does not hold the newest dashboards
    +-- ReplicaFailed               the replica's engine failed (HTTP 503)
        +-- ReplicaDied             the replica, or its engine, is gone: it serves nobody any more
    +-- ModelFailed                 the model fails on this very request (HTTP 500, not to be retried)

Every error carries its numbers as attributes and survives pickling, because it may cross processes.
"""

from __future__ import annotations

from typing import Any


class FairServeError(Exception):
    """Root of the tree. ``fields`` holds the numbers that the message was made from."""

    message = "fairserve failed"

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)
        super().__init__(self.message.format(**fields))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.fields))


def unwrapped(error: Exception) -> Exception:
    """The error as it was raised: across a Ray call it comes in a wrapper whose text is the remote traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, FairServeError) else error


def _rebuild(cls: type[FairServeError], fields: dict[str, Any]) -> FairServeError:
    error = cls.__new__(cls)
    FairServeError.__init__(error, **fields)  # not cls.__init__: its arguments need not be the fields
    return error


class ConfigError(FairServeError):
    message = "{detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail)


class ModelError(FairServeError):
    message = "model {model!r}: {detail}"

    def __init__(self, model: str, detail: str) -> None:
        super().__init__(model=model, detail=detail)


class RequestError(FairServeError):
    """``param`` names the offending field in the request body, or is None; ``code`` is for machines."""

    param: str | None = None
    code: str | None = None


class InvalidRequest(RequestError):
    message = "{detail}"

    def __init__(self, detail: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(detail=detail, param=param, code=code)


class PromptTooLong(RequestError):
    # Its beginning is what agents and proxies look for, to shorten the conversation and try again.
    message = (
        "This model's maximum context length is {max_context} tokens, but the prompt has {num_prompt} tokens "
        "and {max_output} were asked for: shorten the prompt or lower max_tokens"
    )

    def __init__(self, num_prompt: int, max_output: int, max_context: int, param: str | None = "messages") -> None:
        super().__init__(
            num_prompt=num_prompt,
            max_output=max_output,
            max_context=max_context,
            param=param,
            code="context_length_exceeded",
        )


class Unauthenticated(RequestError):
    message = "{detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail, param=None, code="invalid_api_key")


class UnknownModel(RequestError):
    message = "the model {model!r} does not exist, or is not served here; available: {available}"

    def __init__(self, model: str, available: str) -> None:
        super().__init__(model=model, available=available, param="model", code="model_not_found")


class UnknownClient(RequestError):
    message = "no client {client!r} is known: a client is known from its first request on, or once it is changed"

    def __init__(self, client: str) -> None:
        super().__init__(client=client, param="client", code="client_not_found")


class UnknownKey(RequestError):
    message = (
        "no live API key has the id {id!r}: an id is the first hex digits of the key's SHA-256; "
        "keys of the configuration are revoked by taking them out of it"
    )

    def __init__(self, id: str) -> None:  # noqa: A002 (the views' word)
        super().__init__(id=id, param="id", code="key_not_found")


class UnknownFile(RequestError):
    message = "you have no file {id!r}: it was deleted, has expired, or never was"

    def __init__(self, id: str, param: str = "file_id") -> None:  # noqa: A002 (OpenAI's word)
        super().__init__(id=id, param=param, code="file_not_found")


class UnknownBatch(RequestError):
    message = "you have no batch {id!r}: it has been forgotten after its time, or never was"

    def __init__(self, id: str) -> None:  # noqa: A002 (OpenAI's word)
        super().__init__(id=id, param="batch_id", code="batch_not_found")


class UnknownResponse(RequestError):
    message = (
        "there is no response {id!r}: this service stores none (every answer says store: false), so none can be "
        "fetched, deleted, cancelled or gone on from"
    )

    def __init__(self, id: str) -> None:  # noqa: A002 (OpenAI's word)
        super().__init__(id=id, param="response_id", code="response_not_found")


class BatchesOff(RequestError):
    message = "this service keeps no files and runs no batches: its operator has set no batches.directory"

    def __init__(self) -> None:
        super().__init__(param=None, code="batches_off")


class AdminKeyRequired(RequestError):
    message = "{detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail, param=None, code="admin_key_required")


class BodyTooLarge(RequestError):
    message = "the request body holds more than {limit} bytes"

    def __init__(self, limit: int) -> None:
        super().__init__(limit=limit, param=None, code="body_too_large")


class BodyTooSlow(RequestError):
    message = "the request body did not come whole within {limit_s:g} s"

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s=limit_s, param=None, code="body_too_slow")


class HeadersTooLarge(RequestError):
    message = "the request has {num_fields} header fields with {num_bytes} bytes, at most {max_fields} with {max_bytes}"

    def __init__(self, num_fields: int, num_bytes: int, max_fields: int, max_bytes: int) -> None:
        super().__init__(
            num_fields=num_fields,
            num_bytes=num_bytes,
            max_fields=max_fields,
            max_bytes=max_bytes,
            param=None,
            code="headers_too_large",
        )


class WrongContentType(RequestError):
    message = "{detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail, param=None, code="wrong_content_type")


class RequestTimeout(FairServeError):
    message = "the request was not finished within {limit_s:g} s and was cancelled"

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s=limit_s)


class ChangeNotKept(FairServeError):
    message = "the change could not be kept and was not made: {detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail)


class StorageFailed(FairServeError):
    message = "files and batches cannot be reached now: {detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail)


class CounterUnreachable(FairServeError):
    message = "{detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail)


class GrafanaFailed(FairServeError):
    message = "{detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail)


class Refused(FairServeError):
    """No room now. ``retry_after_s`` (seconds, > 0) says when to come back; ``reason`` is for machines."""

    reason = "refused"
    retry_after_s: float


class ClientQueueFull(Refused):
    reason = "client_queue_full"
    message = (
        "client {client!r} already has {num_waiting} requests waiting, its limit is {limit}; "
        "retry in {retry_after_s:.0f} s"
    )

    def __init__(self, client: str, num_waiting: int, limit: int, retry_after_s: float) -> None:
        super().__init__(client=client, num_waiting=num_waiting, limit=limit, retry_after_s=retry_after_s)


class ClusterQueueFull(Refused):
    reason = "cluster_queue_full"
    message = "{num_waiting} requests are waiting in the cluster, the limit is {limit}; retry in {retry_after_s:.0f} s"

    def __init__(self, num_waiting: int, limit: int, retry_after_s: float) -> None:
        super().__init__(num_waiting=num_waiting, limit=limit, retry_after_s=retry_after_s)


class RateLimited(Refused):
    reason = "rate_limited"
    message = "client {client!r} has used its {limit} requests per minute; retry in {retry_after_s:.0f} s"

    def __init__(self, client: str, limit: int, retry_after_s: float) -> None:
        super().__init__(client=client, limit=limit, retry_after_s=retry_after_s)


class ClientRateLimited(Refused):
    reason = "client_rate"
    message = "client {client!r} is limited to {limit} requests per minute; retry in {retry_after_s:.0f} s"

    def __init__(self, client: str, limit: int, retry_after_s: float) -> None:
        super().__init__(client=client, limit=limit, retry_after_s=retry_after_s)


class BudgetSpent(Refused):
    """``of``: whose budget, the client's or a group's; ``budget``: minute, day or month. Tokens ``used`` in it,
    ``promised`` to requests under way, and ``asked`` by this one: its input and expected output. ``reset_s``: seconds
    until the window ends, at ``resets_at`` (UTC)."""

    reason = "insufficient_quota"
    message = (
        "the {budget} budget of {of!r} has no room for this request of client {client!r}: of {limit} tokens {used} are "
        "used and {promised} promised to requests under way, and this one is expected to take {asked}; all of it is "
        "free again at {resets_at}, retry in {retry_after_s:.0f} s"
    )


class InteractionThrottled(Refused):
    """Only ever for the first call of an interaction. ``application`` is "" where the limit is the client's own."""

    reason = "interaction_throttled"
    message = (
        "the cluster is overloaded and starts no new interaction for client {client!r}, which sent {num_recent} "
        "requests in the last 60 s, its limit is {limit}; retry in {retry_after_s:.0f} s"
    )
    application_message = message.replace("client {client!r}", "application {application!r} of client {client!r}")

    def __init__(self, client: str, application: str, num_recent: int, limit: int, retry_after_s: float) -> None:
        super().__init__(
            client=client, application=application, num_recent=num_recent, limit=limit, retry_after_s=retry_after_s
        )

    def __str__(self) -> str:
        return (self.application_message if self.fields["application"] else self.message).format(**self.fields)


class ReplicaFailed(FairServeError):
    message = "the replica that served this request failed: {detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail)


class ReplicaDied(ReplicaFailed):
    message = "the replica that served this request died: {detail}"


class ModelFailed(FairServeError):
    message = "the model failed on this request: {detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail)
