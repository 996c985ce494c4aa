"""What a caller who makes a mistake is told, side by side with what OpenAI tells: the unmodified ``openai`` package
asks, and what it raises is compared. Each difference stands with its reason, and no other is let through. OpenAI's side
is from bodies that people showed in public; where each was seen stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import openai
import pytest

from fairserve.errors import BudgetSpent, ClientQueueFull, ModelFailed, ReplicaFailed
from tests.api.scripted import Pause, Step
from tests.api.served import Served

CONTEXT = 20_000
"""Of the application in conftest.py."""
INVALID = "invalid_request_error"


@dataclass(frozen=True)
class Told:
    """An error as a client sees it."""

    status: int
    type: str
    code: str | None
    param: str | None


@dataclass(frozen=True)
class Mistake:
    """``ours``: what we tell in another way, by name: our value and why. ``message``: must stand in our message."""

    name: str
    raised: type[openai.APIStatusError]
    theirs: Told
    path: str = "/chat/completions"
    body: Any = None
    """Bytes are sent as they are, a dict as JSON."""
    method: str = "POST"
    files: dict[str, Any] | None = None
    ours: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    message: str = ""


HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": HI}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NO_CODE = "OpenAI has no code here; one tells a program what went wrong"
NO_PARAM = "OpenAI names no field here; one tells a person where to look"


def bad(name: str, change: Any, code: str | None, param: str | None, **more: Any) -> Mistake:
    """A chat that is refused with 400."""
    return Mistake(name, openai.BadRequestError, Told(400, INVALID, code, param), body=CHAT | change, **more)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CHAT.items() if key != name}


MISTAKES = [
    Mistake(
        "unknown model",
        openai.NotFoundError,
        Told(404, INVALID, "model_not_found", None),  # Aider-AI/aider#2030, shobrook/wut#14
        body=CHAT | {"model": "gpt-4o"},
        ours={"param": ("model", NO_PARAM)},
        message="does not exist",
    ),
    Mistake(
        "unknown route",
        openai.NotFoundError,
        Told(404, INVALID, "unknown_url", None),  # artificial-julien/docker-nginx-openai-api-cache#2
        path="/chat/completion",
        body=CHAT,
    ),
    Mistake(
        "another method",  # a Java client of the images API keeps the body in a comment: "Not allowed to GET on ..."
        openai.APIStatusError,
        Told(405, INVALID, None, None),
        method="GET",
        ours={"code": ("method_not_allowed", NO_CODE)},
    ),
    Mistake(
        "required field left out",
        openai.BadRequestError,
        Told(400, INVALID, "missing_required_parameter", "messages"),  # SilasMarvin/lsp-ai#108
        body=without("messages"),
    ),
    Mistake(
        "no model",
        openai.BadRequestError,
        Told(400, INVALID, None, None),  # transitive-bullshit/agentic#530
        body=without("model"),
        ours={
            "code": ("missing_required_parameter", "as OpenAI itself says of every other field that is left out"),
            "param": ("model", NO_PARAM),
        },
    ),
    bad("text for a number", {"max_tokens": "10"}, "invalid_type", "max_tokens"),  # diffbot/code-gpt-docs#273
    bad("a fraction for a whole", {"max_tokens": 1.5}, "invalid_type", "max_tokens"),  # Jeffser/Alpaca#904
    bad("an object for a message", {"messages": ["hi"]}, "invalid_type", "messages[0]"),  # james-6-23/codex2api#330
    bad(  # the same text and code for 200 in several logs that are kept in public; top_p alike in openclaw's tests
        "temperature 3", {"temperature": 3}, "decimal_above_max_value", "temperature"
    ),
    bad("top_p 5", {"top_p": 5}, "decimal_above_max_value", "top_p"),
    bad("max_tokens -1", {"max_tokens": -1}, "integer_below_min_value", "max_tokens"),  # OpenBMB/ChatDev#446
    bad(  # thisisartium/continuous-alignment-testing#25: 128 is the most there, too
        "n 130", {"n": 130}, "integer_above_max_value", "n", message="128"
    ),
    bad("unknown field", {"reasoning": {}}, "unknown_parameter", "reasoning"),  # teabranch/open-responses-server#41
    bad(  # spring-projects/spring-ai#2969
        "unknown field of response_format",
        {"response_format": {"type": "json_object", "schema": {}}},
        "unknown_parameter",
        "response_format.schema",
    ),
    bad(  # mkht/PSOpenAI#44 and devnullvoid/dms-ai-assistant#12, of fields that the route or the model does not have
        "field that is known and not supported", {"store": True}, "unsupported_parameter", "store"
    ),
    bad(  # NVlabs/cvdp_benchmark#29, of a temperature
        "value that the model does not support", {"reasoning_effort": "high"}, "unsupported_value", "reasoning_effort"
    ),
    bad(  # crewAIInc/crewAI-examples#121; agents find "maximum context length" and shorten the conversation
        "too long a conversation",
        {"messages": [{"role": "user", "content": "x" * (CONTEXT + 1)}]},
        "context_length_exceeded",
        "messages",
        message=f"This model's maximum context length is {CONTEXT} tokens",
    ),
    bad(  # conghaonet/hao_chatgpt#4, as of 2023
        "prompt and max_tokens together too long",
        {"max_tokens": CONTEXT - 5},
        "context_length_exceeded",
        "messages",
        message="maximum context length",
    ),
    bad(  # tailcallhq/forgecode#1185
        "max_tokens 10**6",
        {"max_tokens": 10**6},
        "invalid_value",
        "max_tokens",
        ours={
            "code": ("context_length_exceeded", "the context is the only limit of an output here"),
            "param": ("messages", "the same error, whichever of the two is too long"),
        },
        message="lower max_tokens",
    ),
    Mistake(
        "no JSON",
        openai.BadRequestError,
        Told(400, INVALID, None, None),  # ChatGPTNextWeb/NextChat#4064
        body=b'{"model": "tiny", ',
        ours={"code": ("invalid_json", NO_CODE)},
    ),
    bad("no messages", {"messages": []}, "empty_array", "messages"),  # CopilotKit/CopilotKit#529
    bad(  # a promptfoo-like proxy's test (role 'test') and many more
        "unknown role", {"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages[0].role"
    ),
    bad(  # langchain-ai/langchain#24531
        "no content",
        {"messages": [{"role": "user", "content": None}]},
        None,
        "messages.[0].content",
        ours={
            "code": ("missing_required_parameter", NO_CODE),
            "param": ("messages[0].content", "as OpenAI writes all other places"),
        },
    ),
    bad(  # neuron-core/neuron-ai#292
        "part without a type",
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
        "missing_required_parameter",
        "messages[0].content[0].type",
    ),
    bad(  # ag2ai/ag2#1990
        "schema that is none",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}}},
        None,
        "response_format",
        ours={"code": ("invalid_grammar", NO_CODE)},
    ),
    bad(  # epuerta9/deep-research-py#19
        "unknown response_format", {"response_format": {"type": "object"}}, "invalid_value", "response_format.type"
    ),
    bad(  # bolna-ai/bolna#144
        "tool without a function", {"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"
    ),
    bad(  # the same, one step deeper; microsoft/vscode-copilot-release#11157 has it of the Responses API
        "tool without a name",
        {"tools": [{"type": "function", "function": {}}]},
        "missing_required_parameter",
        "tools[0].function.name",
    ),
    bad(  # brekkylab/ailoy#109
        "tool whose name has a slash",
        {"tools": [{"type": "function", "function": {"name": "a/b"}}]},
        "invalid_value",
        "tools[0].function.name",
    ),
    bad(  # dapr/dapr-agents#248
        "tool_choice without tools",
        {"tool_choice": "required"},
        None,
        "tool_choice",
        ours={"code": ("invalid_value", NO_CODE)},
    ),
    bad(  # kept in the tests of several gateways, with this param and no code
        "tool_choice that names no tool",
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "rm"}}},
        None,
        "tool_choice",
        ours={"code": ("invalid_value", NO_CODE)},
    ),
    bad(  # kept in the tests of several gateways, with this param; no code was seen
        "stream_options without a stream",
        {"stream_options": {"include_usage": True}},
        None,
        "stream_options",
        ours={"code": ("invalid_value", NO_CODE)},
    ),
    # The four of metadata: gateways that have OpenAI's codes in their tests agree on them.
    bad("17 pairs", {"metadata": {f"k{i}": "" for i in range(17)}}, "object_above_max_properties", "metadata"),
    bad("a pair whose key is long", {"metadata": {"k" * 65: ""}}, "property_name_above_max_length", "metadata"),
    bad("a pair whose value is long", {"metadata": {"k": "v" * 513}}, "string_above_max_length", "metadata.k"),
    bad("a pair whose value is no text", {"metadata": {"k": 1}}, "invalid_type", "metadata.k"),
    bad("17 stop strings", {"stop": ["x"] * 17}, "array_above_max_length", "stop"),  # of five there, vLLM has no limit
    Mistake(
        "too large a body",
        openai.APIStatusError,
        Told(413, "server_error", None, None),  # chidiwilliams/buzz#381, of an upload
        body=CHAT | {"messages": [{"role": "user", "content": "x" * 2_100_000}]},
        ours={
            "type": (INVALID, "it is the caller's mistake, and no retry helps"),
            "code": ("body_too_large", NO_CODE),
        },
    ),
    Mistake(
        "a purpose that files are not kept for",
        openai.BadRequestError,
        Told(400, INVALID, None, None),  # irudnyts/openai#66 has the message, orhanerday/open-ai#100, too
        path="/files",
        body={"purpose": "answers"},
        files={"file": ("x.jsonl", b"{}")},
        ours={"code": ("invalid_value", NO_CODE), "param": ("purpose", NO_PARAM)},
    ),
    Mistake(
        "no such file",
        openai.NotFoundError,
        Told(404, INVALID, None, "id"),  # a .NET test against the service: 404, no code, parameter id
        path="/files/file-abc123",
        method="GET",
        ours={"code": ("file_not_found", NO_CODE), "param": ("file_id", "what the path and a batch call it")},
    ),
    Mistake(
        "no such batch",
        openai.NotFoundError,
        Told(404, INVALID, "batch_not_found", None),  # BerriAI/litellm#37148 has status and code, no more
        path="/batches/batch_abc",
        method="GET",
        ours={"param": ("batch_id", NO_PARAM)},
    ),
    Mistake(
        "embeddings of nothing",
        openai.BadRequestError,
        Told(400, INVALID, None, None),  # a gateway's notes of what it measured: no param, and no code seen
        path="/embeddings",
        body={"model": "tiny", "input": []},
        ours={"code": ("invalid_value", NO_CODE), "param": ("input", NO_PARAM)},
    ),
]


def ask(client: openai.OpenAI, mistake: Mistake, **headers: Any) -> openai.APIStatusError:
    """What the package raises."""
    if mistake.files:
        headers["Content-Type"] = "multipart/form-data"
    sent: Any = {"cast_to": httpx.Response, "options": {"headers": headers}}
    if isinstance(mistake.body, bytes):
        headers["Content-Type"] = "application/json"
        sent["content"] = mistake.body
    elif mistake.method == "POST":
        sent |= {"body": mistake.body, "files": mistake.files}
    with pytest.raises(openai.APIStatusError) as caught:
        getattr(client, mistake.method.lower())(mistake.path, **sent)
    return caught.value


def told_by(error: openai.APIStatusError) -> Told:
    return Told(error.status_code, str(error.type), error.code, error.param)


def compare(mistake: Mistake, error: openai.APIStatusError) -> None:
    """Equal to OpenAI's in all that is not excused, and different in all that is."""
    assert type(error) is mistake.raised
    theirs, ours = asdict(mistake.theirs), asdict(told_by(error))
    differs = {name: ours[name] for name in ours if ours[name] != theirs[name]}
    assert differs == {name: value for name, (value, _) in mistake.ours.items()}
    assert all(why for _, why in mistake.ours.values())
    shown: Any = error.response.json()
    assert shown.keys() == {"error"}
    assert shown["error"].keys() - {"details"} == {"message", "type", "param", "code"}
    assert mistake.message in shown["error"]["message"]
    assert error.request_id == error.response.headers["x-request-id"]
    assert re.fullmatch("req_[0-9a-f]{32}", str(error.request_id))


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_a_mistake_is_told_as_openai_tells_it(client: openai.OpenAI, mistake: Mistake) -> None:
    compare(mistake, ask(client, mistake))


def test_each_mistake_has_a_name_of_its_own() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize(
    ("authorization", "theirs", "ours"),
    [
        # IIC2440/Syllabus-2025-1#13, vivekuppal/transcribe#179
        ("Bearer sk-nobody", Told(401, INVALID, "invalid_api_key", None), {}),
        # continuedev/continue#10931 has the message; bodies of it show no code
        (openai.Omit(), Told(401, INVALID, None, None), {"code": ("invalid_api_key", NO_CODE)}),
    ],
    ids=["wrong key", "no key"],
)
def test_strangers_are_told_as_openai_tells_them(
    client: openai.OpenAI, authorization: Any, theirs: Told, ours: dict[str, Any]
) -> None:
    mistake = Mistake("stranger", openai.AuthenticationError, theirs, body=CHAT, ours=ours)
    compare(mistake, ask(client, mistake, Authorization=authorization))


QUOTA = BudgetSpent(
    client="ann", of="ann", budget="day", limit=10, used=10, promised=0, asked=5,
    reset_s=3600.0, resets_at="2026-11-23T00:00:00Z", retry_after_s=3600.0,
)  # fmt: skip
WHICH = "which of our limits it was; OpenAI tells requests and tokens apart in its type"
FAILURES = [
    Mistake(
        "queue full",
        openai.RateLimitError,
        Told(429, "tokens", "rate_limit_exceeded", None),  # Pythagora-io/gpt-pilot#53
        ours={"type": ("rate_limit_error", "one word for all limits"), "code": ("client_queue_full", WHICH)},
    ),
    Mistake(
        "budget spent",
        openai.RateLimitError,
        Told(429, "insufficient_quota", "insufficient_quota", None),  # chatanywhere/GPT_API_free#229
    ),
    Mistake(
        "model failed",
        openai.InternalServerError,
        Told(500, "server_error", None, None),  # ai-genie/chatgpt-vscode#100
        ours={"code": ("model_error", NO_CODE)},
    ),
    Mistake(
        "replica failed",
        openai.InternalServerError,
        Told(503, "server_error", None, None),  # waylaidwanderer/node-chatgpt-api#34
        ours={"code": ("replica_failed", NO_CODE)},
    ),
]
RAISED = {
    "queue full": ClientQueueFull("ann", 7, 7, 2.0),
    "budget spent": QUOTA,
    "model failed": ModelFailed("NaN"),
    "replica failed": ReplicaFailed("gone"),
}


@pytest.fixture
def failing(served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the model fail from now on, after some text."""

    def fail(error: Exception, *steps: Step) -> None:
        monkeypatch.setattr(served.backend, "script", lambda _: [*steps, error])

    return fail


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", FAILURES, ids=[failure.name for failure in FAILURES])
def test_a_failure_is_told_as_openai_tells_it_also_where_a_stream_was_asked_for(
    client: openai.OpenAI, failing: Any, failure: Mistake, stream: bool
) -> None:
    failing(RAISED[failure.name])
    error = ask(client, Mistake(failure.name, failure.raised, failure.theirs, body=CHAT | {"stream": stream}))
    compare(failure, error)
    retries = {"queue full": None, "budget spent": "false", "model failed": "false", "replica failed": None}
    assert error.response.headers.get("x-should-retry") == retries[failure.name]
    assert ("retry-after" in error.response.headers) == (failure.name != "model failed")


@pytest.mark.parametrize("failure", FAILURES[2:], ids=[failure.name for failure in FAILURES[2:]])
def test_a_failure_inside_a_stream_is_raised_with_its_code(
    client: openai.OpenAI, failing: Any, failure: Mistake
) -> None:
    # aaif-goose/goose#8027: OpenAI, vLLM and SGLang send {"error": ...} as an event's data. No status comes with it.
    failing(RAISED[failure.name], "Hello", Pause())  # what fails before anything was sent gets a status of its own
    stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
    chunks = iter(stream)
    assert next(chunks).choices[0].delta.content == "Hello"
    with pytest.raises(openai.APIError) as caught:
        list(chunks)
    error = caught.value
    assert type(error) is openai.APIError
    told = Told(failure.theirs.status, str(error.type), error.code, error.param)
    assert asdict(told) == asdict(failure.theirs) | {name: value for name, (value, _) in failure.ours.items()}
    assert isinstance(error.body, dict) and error.body["message"] == error.message
