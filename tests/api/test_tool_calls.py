"""Telling calls from text: the same whatever the pieces in which a model's words come."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.api.tool_calls import CallParser, CallPiece
from fairserve.api.tool_formats import FORMATS, format_of
from tests.api import tool_kit
from tests.api.tool_kit import told

NAMES = frozenset({"f", "g"})
RIGHT: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", 'Sure.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', "Sure.", [("f", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "}<tool_call>\\""}}</tool_call>\n'
        '<tool_call>{"arguments": {"x": [{}]}, "name": "g"}</tool_call>\n',
        "",
        [("f", '{"a": "}<tool_call>\\""}'), ("g", '{"x": [{}]}')],
    ),
    ("hermes", '<tool_call>{"name": "g"}</tool_call> done', " done", [("g", "{}")]),
    ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"a\\": 2}"}</tool_call>', "", [("g", '{"a": 2}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        "llama3_json",
        ' {"name": "f", "parameters": {}}; {"type": "function", "name": "g", "parameters": {"é": 1}}',
        "",
        [("f", "{}"), ("g", '{"é": 1}')],
    ),
    (
        "mistral",
        'Now: [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
        "Now:",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": 2}', "", [("f", '{"a": 1}'), ("g", '{"b": 2}')]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
]
WRONG = [
    ("hermes", "no call at all <tool_cal"),
    ("hermes", " \n "),
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>  \n"),
    ("hermes", "<tool_call>f(1)</tool_call> and more"),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "parameters": 5}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": NaN}, "name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", }</tool_call>'),
    ("hermes", '<tool_call>{"na'),
    ("llama3_json", '{"answer": 42} and {"name": "f", "parameters": {}}'),
    ("llama3_json", 'Call {"name": "f", "parameters": {}}'),
    ("llama3_json", '{"a": ' * 300),
    ("mistral", '[TOOL_CALLS]rm[ARGS]{"a": 1}'),
    ("mistral", "[TOOL_CALLS]" + "f" * 500),
    ("mistral", "[TOOL_CALLS][]"),
    ("mistral", "[TOOL"),
]
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", '{"name": "f", "arguments": ', '"parameters": ']


def read(name: str, pieces: list[str], **how: Any) -> tuple[str, list[tuple[str, str]]]:
    parser = CallParser(FORMATS[name], NAMES, **how)
    found = [one for piece in pieces for one in parser.push(piece)]
    return told(found + parser.finish())


@pytest.mark.parametrize("is_piecewise", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@pytest.mark.parametrize(("name", "text", "said", "calls"), RIGHT)
def test_calls_are_found_in_pieces_of_any_size(
    name: str, text: str, said: str, calls: list[tuple[str, str]], size: int, is_piecewise: bool
) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert read(name, pieces, is_piecewise=is_piecewise) == (said, calls)


@pytest.mark.parametrize("is_piecewise", [True, False])
@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize(("name", "text"), WRONG)
def test_what_is_no_call_is_text_to_the_last_character(name: str, text: str, size: int, is_piecewise: bool) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert read(name, pieces, is_piecewise=is_piecewise) == (text, [])


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    words=st.lists(
        st.sampled_from([*MARKS, *'{}[],;"\\ \nfgx']),
        max_size=20,
    ),
)
def test_pieces_make_no_difference_as_long_as_nothing_was_given_out_too_early(name: str, words: list[str]) -> None:
    text = "".join(words)
    whole = read(name, [text], is_piecewise=False)
    assert read(name, words, is_piecewise=False) == read(name, list(text), is_piecewise=False) == whole
    streamed = read(name, words)
    assert streamed == read(name, list(text)) == read(name, [text])
    if all(is_object(arguments) for _, arguments in streamed[1]):
        assert [call for call in streamed[1] if call in whole[1]] == whole[1]


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def test_text_before_a_call_streams_and_a_possible_marker_is_held_back() -> None:
    parser = CallParser(FORMATS["hermes"], NAMES)
    assert parser.push("a <b> and ") == ["a <b> and"]
    assert parser.push("<tool") == []
    assert parser.push("box>") == [" <toolbox>"]
    assert parser.push(" <tool_call") == []
    assert parser.push('>{"name": "f"') == []
    assert parser.finish() == [' <tool_call>{"name": "f"']


def test_arguments_stream_as_soon_as_the_name_is_known() -> None:
    parser = CallParser(FORMATS["hermes"], NAMES)
    parser.push('<tool_call>{"name": "f", "arguments": ')
    (first,) = parser.push('{"a')
    assert isinstance(first, CallPiece)
    assert (first.index, first.name, first.arguments) == (0, "f", '{"a')
    assert first.id.startswith("call_")
    assert parser.push('": 1') == [CallPiece(0, '": 1')]
    assert parser.push("}}</tool_call>") == [CallPiece(0, "}")]
    assert parser.finish() == []


def test_a_call_that_is_cut_short_is_text_when_it_is_whole_and_its_beginning_in_a_stream() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": '
    assert read("hermes", [text], is_piecewise=False) == (text, [])
    assert read("hermes", [text]) == ("", [("f", '{"a": ')])


def test_without_parallel_calls_the_first_is_the_only_one() -> None:
    text = '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}'
    for is_piecewise in (True, False):
        assert read("llama3_json", list(text), is_parallel=False, is_piecewise=is_piecewise) == ("", [("f", "{}")])


def test_a_forced_list_needs_no_marker() -> None:
    text = '[{"name": "f", "arguments": {}}]'
    assert read("mistral", list(text), is_begun=True) == ("", [("f", "{}")])


def test_ids_differ_and_mistrals_have_nine_letters_and_digits() -> None:
    ids = {FORMATS["mistral"].new_id() for _ in range(20)}
    assert len(ids) == 20
    assert all(len(one) == 9 and one.isalnum() for one in ids)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (tool_kit.HERMES, "hermes"),
        (tool_kit.LLAMA, "llama3_json"),
        (tool_kit.MISTRAL, "mistral"),
        ({"default": "{{ messages }}", "tool_use": tool_kit.HERMES}, "hermes"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ tools }}<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter></function></tool_call>", None),
        (None, None),
    ],
)
def test_the_template_tells_the_format(template: Any, name: str | None) -> None:
    found = format_of(template, "auto")
    assert (found.name if found else None) == name
    assert format_of(template, "mistral") is FORMATS["mistral"]
