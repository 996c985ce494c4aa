"""A backend that plays a script, a tokenizer built in place, and a caller that can hang up.

Script steps: text (one token of it, more with a list), a RequestOutput as it is, an asyncio.Event to wait for, an
exception to raise. Nothing sleeps.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fairserve.engine.request import FinishReason, GenerateRequest, RequestOutput, TokenLogprob, Usage

Step = str | RequestOutput | asyncio.Event | Exception
Script = Callable[[GenerateRequest], Sequence[Step]]

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('this template has no tools') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, as GPT-2 writes bytes, and one special token."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=chat_template)


def words(*texts: str, finish: FinishReason = "stop", cached: int = 0) -> Script:
    """Every text is one output of one token; the last one finishes. With logprobs asked for, each has one."""

    def script(request: GenerateRequest) -> list[Step]:
        outputs: list[Step] = []
        for i, text in enumerate(texts):
            is_last = i == len(texts) - 1
            outputs.append(output(request, text, i + 1, finish=finish if is_last else None, cached=cached))
        return outputs

    return script


def output(
    request: GenerateRequest, text: str, num_output: int, *, finish: FinishReason | None = None, cached: int = 0
) -> RequestOutput:
    token_id = 40 + num_output
    alternatives = request.sampling.logprobs
    logprobs: tuple[TokenLogprob, ...] = ()
    if alternatives is not None:
        top = tuple((token_id + i, -0.5 - i) for i in range(alternatives))
        logprobs = (TokenLogprob(token_id, -0.5, top),)
    if request.scores_prompt and num_output == 1:
        scored = [TokenLogprob(token, -1.0, ((token, -1.0),)) for token in request.prompt_token_ids[1:]]
        logprobs = (*scored, *logprobs)
    usage = Usage(request.num_input, cached, num_output)
    return RequestOutput(request.request_id, text, (token_id,), usage, logprobs, finish)


class ScriptedBackend:
    """Plays ``script(request)`` for every request; remembers requests, and which were cancelled where."""

    def __init__(self, script: Script = words("Hello", " world")) -> None:  # noqa: B008 (a pure function)
        self.script = script
        self.health_body: dict[str, Any] | Exception = {"ready": True, "replicas": 2}
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.finished: list[str] = []
        self.num_taken = 0
        """Outputs that somebody has asked to go on after."""
        self.changed = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        self.requests.append(request)
        self.changed.set()
        is_done = False
        try:
            num_output = 0
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    num_output += 1
                    yield output(request, step, num_output) if isinstance(step, str) else step
                    self.num_taken += 1
                    self.changed.set()
            is_done = True
        except Exception:
            is_done = True
            raise
        finally:
            (self.finished if is_done else self.cancelled).append(request.request_id)
            self.changed.set()

    async def health(self) -> dict[str, Any]:
        if isinstance(self.health_body, Exception):
            raise self.health_body
        return self.health_body

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()


App = Callable[[Any, Any, Any], Awaitable[None]]


class Call:
    """One HTTP request on the ASGI level: what it answers can be read piece by piece, and it can hang up."""

    def __init__(self, app: App, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        raw = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer alice")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.send_raises: Exception | None = None
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        await self.may_send.wait()
        if self.send_raises is not None:
            raise self.send_raises
        self.sent.put_nowait(message)

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def status(self) -> int:
        message = await self.sent.get()
        assert message["type"] == "http.response.start"
        return int(message["status"])

    async def events(self) -> list[Any]:
        """The events of the next write."""
        message = await self.sent.get()
        return events_of(message["body"])


def events_of(body: bytes) -> list[Any]:
    """Server-sent events as JSON values; ``[DONE]`` as a string."""
    data = [block.removeprefix("data: ") for block in body.decode().split("\n\n") if block]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


async def settled(rounds: int = 20) -> None:
    """Let everything that can run now run."""
    for _ in itertools.repeat(None, rounds):
        await asyncio.sleep(0)


class Pause(asyncio.Event):
    """A step that lets out what came before it; outputs that are ready together are told as one."""

    async def wait(self) -> Literal[True]:
        await settled()
        return True
