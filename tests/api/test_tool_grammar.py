"""The grammar of a forced call: it lets calls through that the parser reads, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fairserve.api.openai_schema import Tool
from fairserve.api.tool_calls import CallParser
from fairserve.api.tool_formats import FORMATS
from fairserve.api.tool_grammar import grammar_of, grammar_of_either
from fairserve.api.tools import Choice, Toolbox
from fairserve.engine.request import Grammar
from tests.api.tool_kit import TIME, WEATHER, told

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
DRAW = {
    "type": "function",
    "function": {
        "name": "draw",
        "parameters": {
            "type": "object",
            "properties": {"at": {"$ref": "#/$defs/Point"}},
            "required": ["at"],
            "$defs": {"Point": POINT},
        },
    },
}
CALLS = {
    "hermes": '<tool_call>\n{"name": NAME, "arguments": GIVEN}\n</tool_call>',
    "llama3_json": '{"name": NAME, "parameters": GIVEN}',
    "mistral": '[{"name": NAME, "arguments": GIVEN}]',
}


def toolbox(*tools: dict[str, Any], name: str = "", is_parallel: bool = True) -> Toolbox:
    return Toolbox(tuple(Tool.model_validate(one) for one in tools), Choice("required", name), is_parallel)


def written(form: str, name: str, arguments: Any) -> str:
    return CALLS[form].replace("NAME", json.dumps(name)).replace("GIVEN", json.dumps(arguments))


def is_taken(grammar: Grammar, text: str) -> bool:
    """All of ``text`` follows the grammar, and may end there."""
    llguidance = pytest.importorskip("llguidance", reason="the engine's library for grammars is not there")
    from llguidance.hf import from_tokenizer

    from tests.api.scripted import byte_tokenizer

    tokenizer = byte_tokenizer()
    make = llguidance.LLMatcher
    read = make.grammar_from_lark if grammar.kind == "lark" else make.grammar_from_json_schema
    compiled = read(grammar.text)
    matcher = llguidance.LLMatcher(from_tokenizer(tokenizer), compiled)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_forced_call_is_one_that_the_parser_reads(form: str) -> None:
    box = toolbox(WEATHER, TIME, DRAW)
    grammar = grammar_of(FORMATS[form], box)
    for name, right, wrong in (
        ("weather", {"city": "Oslo", "days": 3}, {"city": "Oslo", "days": "three"}),
        ("time", {}, {"zone": "CET"}),
        ("draw", {"at": {"x": 1}}, {"at": {"y": 1}}),
    ):
        assert is_taken(grammar, text := written(form, name, right)), (name, grammar.text)
        assert not is_taken(grammar, written(form, name, wrong))
        is_begun = not FORMATS[form].has_marker_in_grammar
        parser = CallParser(FORMATS[form], box.names, is_begun=is_begun)
        assert told(parser.push(text) + parser.finish()) == ("", [(name, json.dumps(right))])
    assert not is_taken(grammar, "Certainly!")
    assert not is_taken(grammar, written(form, "rm", {}))


@pytest.mark.parametrize("form", ["hermes", "llama3_json"])
@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_an_answer_in_json_may_stand_in_place_of_a_call(form: str, kind: Any) -> None:
    box = toolbox(WEATHER, TIME, DRAW)
    answer = Grammar(kind, json.dumps(POINT) if kind == "json_schema" else "")
    grammar = grammar_of_either(FORMATS[form], box, answer)
    assert grammar is not None
    for text in (written(form, "time", {}), written(form, "draw", {"at": {"x": 1}}), '{"x": 1}'):
        assert is_taken(grammar, text), grammar.text
    assert is_taken(grammar, '{"y": 1}') == (kind == "json_object")
    for text in ("Certainly!", "[]"):
        assert not is_taken(grammar, text)
    if form == "hermes":
        assert not is_taken(grammar, written(form, "rm", {}))


def test_nothing_may_stand_in_place_of_calls_that_cannot_be_told_from_it() -> None:
    assert grammar_of_either(FORMATS["mistral"], toolbox(TIME), Grammar("json_object")) is None
    assert grammar_of_either(FORMATS["hermes"], toolbox(TIME), Grammar("choice", '["yes"]')) is None


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_named_function_is_the_only_one(form: str) -> None:
    grammar = grammar_of(FORMATS[form], toolbox(WEATHER, TIME, DRAW, name="draw"))
    assert is_taken(grammar, written(form, "draw", {"at": {"x": 1}}))
    assert not is_taken(grammar, written(form, "time", {}))


def test_several_calls_are_forced_only_where_they_are_parallel() -> None:
    one = written("hermes", "time", {})
    listed = '[{"name": "time", "arguments": {}}, {"name": "time", "arguments": {}}]'
    for is_parallel in (True, False):
        box = toolbox(TIME, WEATHER, is_parallel=is_parallel)
        assert is_taken(grammar_of(FORMATS["hermes"], box), f"{one}\n{one}") == is_parallel
        assert is_taken(grammar_of(FORMATS["mistral"], box), listed) == is_parallel
