"""Answers of a chat whose model may call functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fairserve.api.answers import ChatAnswer, Job, Json, TokenText
from fairserve.api.tool_calls import CallParser, CallPiece, Piece
from fairserve.engine.request import RequestOutput

NewParser = Callable[[bool], CallParser]
"""Makes one for a choice; True: calls are given out as they come."""


class ToolAnswer(ChatAnswer):
    """As a chat's; text that is a call is told as a call. A choice that calls has the finish reason ``tool_calls``, and
    keeps ``length`` where it was cut."""

    has_plain_text = False

    def __init__(self, job: Job, token_text: TokenText, new_parser: NewParser) -> None:
        super().__init__(job, token_text)
        self._new_parser = new_parser
        self._parsers: dict[int, CallParser] = {}

    def _choice(self, index: int, output: RequestOutput) -> Json:
        parser = self._new_parser(False)
        text, calls = _told_apart([*parser.push(output.text), *parser.finish()])
        choice = super()._choice(index, replace(output, text=text)) | _ending(parser, output)
        if calls:
            plain = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
            choice["message"] |= {"content": text or None, "tool_calls": plain}
        return choice

    def chunk(self, index: int, output: RequestOutput) -> Json | None:
        is_first = index not in self._begun
        parser = self._parsers.setdefault(index, self._new_parser(True)) if is_first else self._parsers[index]
        ending = parser.finish if output.finish_reason is not None else list
        text, calls = _told_apart([*parser.push(output.text), *ending()])
        if not (is_first or text or calls or output.logprobs or output.finish_reason):
            return None
        self._begun.add(index)
        delta: Json = {"role": "assistant", "content": text or None} if is_first else {}
        delta |= ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})
        return self._chunk({"index": index, "delta": delta} | self._rest(index, output) | _ending(parser, output))


def _ending(parser: CallParser, output: RequestOutput) -> Json:
    """OpenAI's word for an output that stopped after calls."""
    return {"finish_reason": "tool_calls"} if parser.has_calls and output.finish_reason == "stop" else {}


def _told_apart(pieces: Sequence[Piece]) -> tuple[str, list[Json]]:
    """The text, and the calls as in a delta: what came for one call is one entry."""
    calls: dict[int, Json] = {}
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name:
                function = {"name": piece.name, "arguments": ""}
                calls[piece.index] = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
            entry = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
            entry["function"]["arguments"] += piece.arguments
    return "".join(piece for piece in pieces if isinstance(piece, str)), list(calls.values())
