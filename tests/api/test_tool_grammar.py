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
from fairserve.errors import InvalidRequest
from tests.api import tool_kit
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
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "kind": {"enum": ["a </b>", "a"]},
                "code": {"type": "string", "pattern": "^[A-Z]{2}/\\d$"},
                "short": {"type": "string", "minLength": 2, "maxLength": 3},
                "max": {"anyOf": [{"type": "integer", "minimum": 10}, {"type": "string"}, {"type": "null"}]},
                "deep": {"type": "boolean"},
                "any": {},
                "tags": {"type": ["array", "string"], "items": {"$ref": "#/$defs/tag/~1"}},
            },
            "required": ["kind", "other"],
            "$defs": {"tag": {"/": {"type": "boolean"}}},
        },
    },
}


def toolbox(*tools: dict[str, Any], name: str = "", is_parallel: bool = True) -> Toolbox:
    return Toolbox(tuple(Tool.model_validate(one) for one in tools), Choice("required", name), is_parallel)


def written(form: str, name: str, arguments: Any) -> str:
    """As a model must write a forced call."""
    text = tool_kit.write(form, [(name, arguments)])
    if form in ("pythonic", "olmo3"):
        given = [
            f"{key}={value if value in (True, False) else json.dumps(value, ensure_ascii=False)}"
            for key, value in arguments.items()
        ]
        begin, end = ("[", "]") if form == "pythonic" else ("<function_calls>\n", "\n</function_calls>")
        return f"{begin}{name}({', '.join(given)}){end}"
    if not FORMATS[form].has_marker_in_grammar:
        text = text.removeprefix(FORMATS[form].marker).removesuffix("</TOOLCALL>")
    return text


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
        parser = CallParser(FORMATS[form], box.functions, is_begun=is_begun)
        assert told(parser.push(text) + parser.finish()) == ("", [(name, json.dumps(right))])
    assert not is_taken(grammar, "Certainly!")
    assert not is_taken(grammar, written(form, "rm", {}))


EITHER = [name for name, form in FORMATS.items() if not (form.is_list and form.is_json)]


@pytest.mark.parametrize("form", EITHER)
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
    if form != "llama3_json":
        assert not is_taken(grammar, written(form, "rm", {}))


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_forced_call_has_no_endless_space_to_get_lost_in(form: str) -> None:
    grammar = grammar_of(FORMATS[form], toolbox(DRAW))
    text = written(form, "draw", {"at": {"x": 1}})
    for num_spaces, is_right in ((20, True), (40, grammar.kind == "json_schema")):  # that kind is limited elsewhere
        assert is_taken(grammar, text.replace('"x": 1', f'"x":{" " * num_spaces}1')) == is_right
    either = grammar_of_either(FORMATS[form], toolbox(DRAW), Grammar("json_object"))
    assert either is None or not is_taken(either, '{"a":' + " " * 40 + "1}")


def test_nothing_may_stand_in_place_of_calls_that_cannot_be_told_from_it() -> None:
    assert grammar_of_either(FORMATS["mistral"], toolbox(TIME), Grammar("json_object")) is None
    assert grammar_of_either(FORMATS["hermes"], toolbox(TIME), Grammar("choice", '["yes"]')) is None


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_named_function_is_the_only_one(form: str) -> None:
    grammar = grammar_of(FORMATS[form], toolbox(WEATHER, TIME, DRAW, name="draw"))
    assert is_taken(grammar, written(form, "draw", {"at": {"x": 1}}))
    assert not is_taken(grammar, written(form, "time", {}))


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_several_calls_are_forced_only_where_they_are_parallel(form: str) -> None:
    first, second = written(form, "time", {}), written(form, "weather", {"city": "Oslo"})
    if form == "olmo3":
        both = first.replace("</function_calls>", "") + second.removeprefix("<function_calls>\n")
    elif FORMATS[form].is_list:
        both = f"{first[:-1]}, {second[1:]}"
    else:
        both = f"{first}\n{second}"
    for is_parallel in (True, False):
        grammar = grammar_of(FORMATS[form], toolbox(TIME, WEATHER, is_parallel=is_parallel))
        assert is_taken(grammar, both) == (is_parallel and form != "llama3_json")
        assert is_taken(grammar, first)


ARGUMENTS: list[tuple[dict[str, Any], bool]] = [
    ({"kind": "a", "other": 1}, True),
    ({"other": 1}, False),
    ({"kind": "a"}, False),
    ({"kind": "b", "other": 1}, False),
    ({"text": 'x\n</par> é"', "kind": "a </b>", "other": {"a": [None]}}, True),
    ({"kind": "a", "text": "out of order", "other": 1}, False),
    ({"kind": "a", "code": "AB/7", "other": 1}, True),
    ({"kind": "a", "code": "AB/77", "other": 1}, False),
    ({"kind": "a", "code": "xAB/7", "other": 1}, False),
    ({"kind": "a", "short": "é\n", "other": 1}, True),
    ({"kind": "a", "short": "x", "other": 1}, False),
    ({"kind": "a", "short": "xxxx", "other": 1}, False),
    ({"kind": "a", "max": 12, "other": 1}, True),
    ({"kind": "a", "max": 9, "other": 1}, False),
    ({"kind": "a", "max": None, "deep": True, "other": 1}, True),
    ({"kind": "a", "max": "nothing", "deep": False, "any": "x", "other": "y"}, True),
    ({"kind": "a", "tags": [True, False], "other": 1}, True),
    ({"kind": "a", "tags": ["red"], "other": 1}, False),
    ({"kind": "a", "more": 1, "other": 1}, False),
]


@pytest.mark.parametrize("form", [name for name, form in FORMATS.items() if not form.is_json])
@pytest.mark.parametrize(("given", "is_right"), ARGUMENTS, ids=str)
def test_arguments_that_stand_by_themselves_are_held_to_their_schemas(
    form: str, given: dict[str, Any], is_right: bool
) -> None:
    box = toolbox(SEARCH)
    grammar = grammar_of(FORMATS[form], box)
    text = written(form, "search", given)
    assert is_taken(grammar, text) == is_right, grammar.text
    parser = CallParser(FORMATS[form], box.functions)
    said, calls = told(parser.push(text) + parser.finish())
    assert (said, [(name, json.loads(one)) for name, one in calls]) == ("", [("search", given)])


@pytest.mark.parametrize("form", [name for name, form in FORMATS.items() if not form.is_json])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"anyOf": [{"required": ["x"]}, {"required": ["y"]}]}, "the parameters of 'draw' say 'anyOf'"),
        ({"properties": {"<a=": {}}}, "the parameter '<a=' of 'draw' cannot be written"),
    ],
)
def test_what_a_notation_cannot_hold_a_call_to_is_told(form: str, change: dict[str, Any], said: str) -> None:
    tool = {"type": "function", "function": {"name": "draw", "parameters": {"type": "object"} | change}}
    with pytest.raises(InvalidRequest, match="send tool_choice 'auto'") as caught:
        grammar_of(FORMATS[form], toolbox(tool))
    assert said in str(caught.value)
    assert caught.value.param == "tools"


def test_a_pattern_that_cannot_be_sought_in_a_text_between_tags_is_told() -> None:
    for pattern, is_right in (("^a|b$", False), ("(a|b)", True), ("[|]", True), (r"\|", True)):
        parameters = {"type": "object", "properties": {"s": {"type": "string", "pattern": pattern}}}
        box = toolbox({"type": "function", "function": {"name": "f", "parameters": parameters}})
        if is_right:
            grammar_of(FORMATS["glm4"], box)
        else:
            with pytest.raises(InvalidRequest, match="alternatives outside of parentheses"):
                grammar_of(FORMATS["glm4"], box)
