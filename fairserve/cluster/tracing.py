"""OpenTelemetry spans of one request: at the door, in the cluster's queue, on the replica. Off, nothing is imported.

::

    fairserve.request            ingress: from the read request to its end
    +-- fairserve.queue          router: from the submit to the grant, with the decision as attributes
    |   +-- fairserve.dispatch   counter actor: from the submit's arrival to the answer that holds the grant or refusal
    +-- fairserve.prefill        replica: from its arrival there to its first token
    +-- fairserve.decode         replica: from the first token to the last

Between processes travels a ``traceparent`` (W3C Trace Context, version 00) in ``GenerateRequest.trace`` and
``Submit.trace``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from fairserve.config import TracingConfig
from fairserve.dispatch.messages import RouterCall, RouterReply
from fairserve.engine.request import GenerateRequest, RequestOutput
from fairserve.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

REQUEST, QUEUE, DISPATCH, PREFILL, DECODE = (
    f"fairserve.{name}" for name in ("request", "queue", "dispatch", "prefill", "decode")
)
Value = str | int | float | bool


class Span(Protocol):
    """Something under way."""

    @property
    def traceparent(self) -> str:
        """For spans below this one, in whatever process; "" when tracing is off."""
        ...

    def note(self, **attributes: Value) -> None:
        """Tell more; names are prefixed with ``fairserve.``."""
        ...

    def end(self, error: BaseException | None = None) -> None: ...


class Tracer(Protocol):
    def begin(self, name: str, parent: str = "", **attributes: Value) -> Span:
        """``parent``: a traceparent; with "" or an invalid one the span begins a trace."""
        ...


class NoSpan:
    traceparent = ""

    def note(self, **attributes: Value) -> None: ...
    def end(self, error: BaseException | None = None) -> None: ...


class NoTracing:
    """Tracing is off."""

    def begin(self, name: str, parent: str = "", **attributes: Value) -> Span:
        return NO_SPAN


NO_SPAN = NoSpan()
NO_TRACING = NoTracing()


class OtelTracing:
    """Through an OpenTelemetry tracer provider."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("fairserve")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, parent: str = "", **attributes: Value) -> Span:
        from opentelemetry.context import Context

        context = self._propagator.extract({"traceparent": parent}, Context()) if parent else Context()
        span = OtelSpan(self._tracer.start_span(name, context), self._propagator)
        span.note(**attributes)
        return span


class OtelSpan:
    def __init__(self, span: Any, propagator: Any) -> None:
        self._span = span
        self._propagator = propagator

    @property
    def traceparent(self) -> str:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(self._span, Context()))
        return carrier.get("traceparent", "")

    def note(self, **attributes: Value) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(f"fairserve.{name}", value)

    def end(self, error: BaseException | None = None) -> None:
        from opentelemetry.trace import StatusCode

        if error is not None:  # its name only: a message may hold what a caller sent
            self._span.set_status(StatusCode.ERROR, type(error).__name__)
        self._span.end()


@contextmanager
def spanning(tracer: Tracer, name: str, parent: str, **attributes: Value) -> Iterator[Span]:
    """A span round a block; what the block raises ends it with an error."""
    span = tracer.begin(name, parent, **attributes)
    try:
        yield span
    except BaseException as error:
        span.end(error)
        raise
    span.end()


class PhaseSpans:
    """Prefill and decode of one request on its replica."""

    def __init__(self, tracer: Tracer, request: GenerateRequest, replica: str) -> None:
        self._tracer = tracer
        self._trace = request.trace
        self._about: dict[str, Value] = {"client": request.client, "replica": replica}
        self._span = tracer.begin(PREFILL, self._trace, num_input=request.num_input, **self._about)
        self._has_token = False
        self._num_output = 0

    def saw(self, output: RequestOutput) -> None:
        self._num_output = output.usage.num_output
        if not self._has_token and output.usage.num_output:
            self._has_token = True
            self._span.note(num_cached=output.usage.num_cached)
            self._span.end()
            self._span = self._tracer.begin(DECODE, self._trace, **self._about)

    def end(self, reason: str) -> None:
        """``reason``: why the request ended here."""
        self._span.note(finish_reason=reason)
        if self._has_token:
            self._span.note(num_output=self._num_output)
        self._span.end()


class DispatchSpans:
    """One span of each traced request that waits in the counter actor. It looks at calls and replies, and touches
    neither."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._open: dict[str, Span] = {}

    def called(self, call: RouterCall) -> None:
        """Before the call is answered."""
        for submit in call.submits:
            if submit.trace and submit.request_id not in self._open:
                about: dict[str, Value] = {"client": submit.client, "is_retry": submit.is_retry}
                self._open[submit.request_id] = self._tracer.begin(DISPATCH, submit.trace, **about)
        if self._open:
            for request_id in (*call.cancels, *call.declined):
                self._end(request_id, outcome="cancelled")

    def replied(self, reply: RouterReply) -> None:
        if self._open:
            for grant in reply.grants:
                self._end(grant.request_id, outcome="granted", replica=grant.replica, waited_s=grant.waited_s)
            for refusal in reply.refusals:
                self._end(refusal.request_id, outcome=refusal.error.reason)

    def keep(self, waits: Callable[[str], bool]) -> None:
        """End the spans of requests that left without an answer, with their router."""
        for request_id in [request_id for request_id in self._open if not waits(request_id)]:
            self._end(request_id, outcome="lost")

    def _end(self, request_id: str, **attributes: Value) -> None:
        if (span := self._open.pop(request_id, None)) is not None:
            span.note(**attributes)
            span.end()


def make_tracing(config: TracingConfig) -> Tracer:
    """What this process traces with.

    Raises:
        ConfigError: tracing is on and its packages are not installed.
    """
    if not config.enabled:
        return NO_TRACING
    try:
        return OtelTracing(_provider())
    except ImportError as error:
        raise ConfigError(f"tracing.enabled needs `pip install 'fairserve[otel]'` ({error})") from error


@cache
def _provider() -> TracerProvider:
    """The provider of this process: one that somebody else installed, or ours, which the OTEL_ variables configure
    (where to, which share, which service name)."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    installed = trace.get_tracer_provider()
    if isinstance(installed, TracerProvider):
        return installed
    provider = TracerProvider(resource=_named(Resource.create()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _named(resource: Any) -> Any:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come first."""
    from opentelemetry.sdk.resources import Resource

    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        return resource.merge(Resource({"service.name": "fairserve"}))
    return resource
