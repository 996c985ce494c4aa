"""The items of an answer of ``/v1/responses``, and the events that tell of each as it grows.

::

    message        response.output_item.added, response.content_part.added
                     response.output_text.delta ...
                   response.output_text.done, response.content_part.done, response.output_item.done
    function_call  response.output_item.added
                     response.function_call_arguments.delta ...
                   response.function_call_arguments.done, response.output_item.done

Items follow each other as the model says them: each ends where the next one begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import from_json

from fairserve.api.answers import TokenText, scored
from fairserve.api.tool_calls import CallParser, CallPiece, Piece
from fairserve.engine.request import TokenLogprob

Json = dict[str, Any]
Event = tuple[str, Json]
"""Its type without ``response.``, and its fields but the number."""
Status = Literal["in_progress", "completed", "incomplete"]
PART = 0
"""Index of a message's one part."""


@dataclass(slots=True)
class Message:
    """What the assistant says, in one part."""

    index: int
    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    def begin(self) -> list[Event]:
        added = {"output_index": self.index, "item": self.item("in_progress") | {"content": []}}
        return [("output_item.added", added), ("content_part.added", self._place | {"part": self._part})]

    def grow(self, text: str, logprobs: list[Json]) -> list[Event]:
        self.texts.append(text)
        self.logprobs += logprobs
        return [("output_text.delta", self._place | {"delta": text, "logprobs": logprobs})]

    def end(self, status: Status) -> list[Event]:
        part = self._part
        return [
            ("output_text.done", self._place | {"text": part["text"], "logprobs": part["logprobs"]}),
            ("content_part.done", self._place | {"part": part}),
            ("output_item.done", {"output_index": self.index, "item": self.item(status)}),
        ]

    def item(self, status: Status) -> Json:
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": [self._part]}

    @property
    def _place(self) -> Json:
        return {"item_id": self.id, "output_index": self.index, "content_index": PART}

    @property
    def _part(self) -> Json:
        return {"type": "output_text", "text": "".join(self.texts), "annotations": [], "logprobs": [*self.logprobs]}


@dataclass(slots=True)
class FunctionCall:
    index: int
    id: str
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def begin(self) -> list[Event]:
        return [("output_item.added", {"output_index": self.index, "item": self.item("in_progress")})]

    def grow(self, arguments: str) -> list[Event]:
        self.arguments.append(arguments)
        return [("function_call_arguments.delta", self._place | {"delta": arguments})] if arguments else []

    def end(self, status: Status) -> list[Event]:
        whole = {"arguments": "".join(self.arguments), "name": self.name}
        return [
            ("function_call_arguments.done", self._place | whole),
            ("output_item.done", {"output_index": self.index, "item": self.item(status)}),
        ]

    def item(self, status: Status) -> Json:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "".join(self.arguments),
        }

    @property
    def _place(self) -> Json:
        return {"item_id": self.id, "output_index": self.index}


class Items:
    """Puts what a model says into items.

    Args:
        tail: what makes the ids of these items their own.
        token_text: how tokens look, for log probabilities.
        parser: tells calls from text; None where there are no functions.
    """

    def __init__(self, tail: str, token_text: TokenText, parser: CallParser | None = None) -> None:
        self._tail = tail
        self._token_text = token_text
        self._parser = parser
        self._done: list[Json] = []
        self._open: Message | FunctionCall | None = None
        self._scored: list[Json] = []
        """Tokens whose text is not out yet."""

    def push(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        """What is certain now."""
        self._scored += [_with_bytes(scored(one, self._token_text)) for one in logprobs]
        if self._parser is None:
            return self._take([text] if text else [])
        return self._take(self._parser.push(text))

    def finish(self, is_cut: bool) -> list[Event]:
        """The rest, when the output is over; ``is_cut``: before its own end. There is one item at least."""
        events = self._take([] if self._parser is None else self._parser.finish())
        if self._open is None:
            events += self._begin(Message(len(self._done), self._id("msg")))
        if isinstance(self._open, Message) and self._parser is None:
            self._open.logprobs += self._scored  # of tokens without text, such as the last
        return events + self._end("incomplete" if is_cut else "completed")

    def so_far(self) -> list[Json]:
        """All items, when nothing more comes."""
        return self._done + ([] if self._open is None else [self._open.item("incomplete")])

    def _take(self, pieces: Iterable[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, CallPiece):
                self._scored_of(piece.arguments)
                if piece.name:
                    events += self._end("completed")
                    index = len(self._done)
                    events += self._begin(FunctionCall(index, self._id("fc"), piece.id, piece.name))
                assert isinstance(self._open, FunctionCall)
                events += self._open.grow(piece.arguments)
            else:
                if not isinstance(self._open, Message):
                    events += self._end("completed")
                    events += self._begin(Message(len(self._done), self._id("msg")))
                assert isinstance(self._open, Message)
                events += self._open.grow(piece, self._scored_of(piece))
        return events

    def _begin(self, item: Message | FunctionCall) -> list[Event]:
        self._open = item
        return item.begin()

    def _end(self, status: Status) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        if isinstance(item, FunctionCall):  # whether it was cut shows in what it is, not in what came after it
            status = "completed" if _is_json("".join(item.arguments)) else "incomplete"
        self._done.append(item.item(status))
        return item.end(status)

    def _id(self, kind: str) -> str:
        return f"{kind}_{self._tail}_{len(self._done)}"

    def _scored_of(self, text: str) -> list[Json]:
        """Take the tokens that made ``text``; beside calls, those before them are markers, and are forgotten."""
        raw, wanted = b"".join(bytes(one["bytes"]) for one in self._scored), text.encode()
        begin = -1 if self._parser is None else raw.find(wanted)
        if begin < 0:
            taken, self._scored = self._scored, []
            return taken
        taken, left, place = [], [], 0
        for one in self._scored:
            start, place = place, place + len(one["bytes"])
            if start >= begin + len(wanted):
                left.append(one)
            elif place > begin:
                taken.append(one)
        self._scored = left
        return taken


def _is_json(text: str) -> bool:
    try:
        from_json(text)
    except ValueError:
        return False
    return True


def _with_bytes(one: Json) -> Json:
    """This route's tokens always have bytes."""
    top = [_with_bytes(alternative) for alternative in one.get("top_logprobs", ())]
    told = {"token": one["token"], "bytes": one["bytes"] or list(one["token"].encode()), "logprob": one["logprob"]}
    return told | ({"top_logprobs": top} if "top_logprobs" in one else {})
