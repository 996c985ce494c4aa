"""Telling calls from text: the same whatever the pieces in which a model's words come."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.api.tool_calls import CallParser, CallPiece
from fairserve.api.tool_formats import FORMATS, format_of
from fairserve.config import ApiConfig
from tests.api import tool_kit
from tests.api.tool_kit import told

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "s": {"type": "string"},
        "x": {"type": ["array", "null"]},
        "b": {"type": "boolean"},
        "m": {"anyOf": [{"type": "string"}, {"type": "number"}]},
    },
}
FUNCTIONS: dict[str, Any] = {"f": SCHEMA, "g": None}
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
    ("granite", 'So.<|tool_call|> [{"name": "f", "arguments": {"a": 1}}]', "So.", [("f", '{"a": 1}')]),
    ("phi4_mini", 'functools[{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    ("nemotron", '<TOOLCALL>[{"name": "f", "arguments": {}}]</TOOLCALL>', "", [("f", "{}")]),
    ("pythonic", " [f(a=1, s='x'), g()]", "", [("f", '{"a": 1, "s": "x"}'), ("g", "{}")]),
    (
        "pythonic",
        "[f( a = -1.5 , x = [True, None, {'k': (1, .5)},], b=false,)] yes",
        " yes",
        [("f", '{"a": -1.5, "x": [true, null, {"k": [1, 0.5]}], "b": false}')],
    ),
    (
        "pythonic",
        r"""[f(s="a\n\"\'\u00e9\ud83d\ude00\x41\d", m='it"s', x='', b='''a'b''')]""",
        "",
        [("f", '{"s": "a\\n\\"\'é😀A\\\\d", "m": "it\\"s", "x": "", "b": "a\'b"}')],
    ),
    (
        "olmo3",
        "Look: <function_calls>\nf(s='a, b) =')\ng()\n</function_calls>",
        "Look:",
        [("f", '{"s": "a, b) ="}'), ("g", "{}")],
    ),
    (
        "qwen3_coder",
        "Sure.\n<tool_call>\n<function=f>\n<parameter=s>\n1\n\n</parameter>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=m>\n2.0\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
        "Sure.",
        [("f", '{"s": "1\\n", "a": 1, "m": 2.0}'), ("g", "{}")],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
        "<tool_call>\n",
        [("g", "{}")],
    ),
    (
        "qwen3_coder",
        "<function=<function=rm><function=g></function> <function",
        "<function=<function=rm> <function",
        [("g", "{}")],
    ),
    ("qwen3_coder", "<function=f><parameter=b>True</parameter></function> ok", " ok", [("f", '{"b": true}')]),
    (
        "qwen3_coder",
        "<tool_call><function=f><parameter=x>['a', None]</parameter><parameter=b>yes</parameter>"
        "<parameter=m>null</parameter></function><function=g></function></tool_call>",
        "",
        [("f", '{"x": ["a", null], "b": "yes", "m": "null"}'), ("g", "{}")],
    ),
    (
        "seed_oss",
        "<seed:tool_call>\n<function=f>\n<parameter=s>a </par\nb</parameter>\n</function>\n</seed:tool_call>",
        "",
        [("f", '{"s": "a </par\\nb"}')],
    ),
    (
        "glm4",
        "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>\nx\n</arg_value>\n<arg_key>a</arg_key>\n<arg_value>7</arg_value>\n"
        "</tool_call><tool_call>g</tool_call>",
        "",
        [("f", '{"s": "\\nx\\n", "a": 7}'), ("g", "{}")],
    ),
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
    ("mistral", "[TOOL_CALLS]f" + " " * 300 + "{}"),
    ("mistral", "[TOOL"),
    ("granite", "<|tool_call|>none"),
    ("phi4_mini", 'functools{"name": "f", "arguments": {}}'),
    ("nemotron", "<TOOLCALL>[]</TOOLCALL>"),
    *(
        ("pythonic", text)
        for text in ("f(a=1)", "Call [f(a=1)]", "[]", "[f", "[f(", "[rm(a=1)]", "[f](a=1)", "[f (a=1)]")
    ),
    *(("pythonic", f"[f({given})] so") for given in ("1", "a", "a=", "a=1 b=2", "a=1, a=2", "=1", "a=x", "a=g()")),
    *(
        ("pythonic", f"[f(a={given})]")
        for given in ("nan", "1e", "1-2", "{1: 2}", "{1}", "[1 2]", "'\\ud800'", "Truer")
    ),
    *(
        ("pythonic", f"[f(a={given})]")
        for given in ("'\\ud83dx'", "'\\xzz'", "'\\U00110000'", "'", '"""a""', "[" * 65, "1" * 401)
    ),
    ("olmo3", "<function_calls>\nno\n</function_calls>"),
    ("qwen3_coder", "<tool_call>\n<function=rm>\n</function>\n</tool_call>"),
    ("qwen3_coder", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
    ("qwen3_coder", "<function=f><parameter=a>1"),
    ("qwen3_coder", "<function=f><parameter=a>1</parameter></tool_call>"),
    ("qwen3_coder", "<function=f><parameter=a>1</parameter><parameter=a>1</parameter></function>"),
    ("qwen3_coder", "<function=f>text</function>"),
    ("qwen3_coder", f"<function={'f' * 70}>"),
    ("qwen3_coder", f"<function=f><parameter={'a' * 300}>1</parameter></function>"),
    ("glm4", "<tool_call>rm\n</tool_call>"),
    ("glm4", "<tool_call>f\n<arg_key>a</arg_key>\n1\n</tool_call>"),
]
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", '{"name": "f", "arguments": ', '"parameters": ']
MARKS += ["<function=f>", "<parameter=a>", "</parameter>", "</function>", "<arg_key>a</arg_key>", "<arg_value>"]
MARKS += ["</arg_value>", "f(", "s=", "'", "None", "<function_calls>", "functools[", "<|tool_call|>", "<TOOLCALL>["]


KEYWORDS = [name for name, form in FORMATS.items() if not form.is_json]
"""Their calls are given out as soon as the name is known."""


def read(name: str, pieces: list[str], **how: Any) -> tuple[str, list[tuple[str, str]]]:
    parser = CallParser(FORMATS[name], FUNCTIONS, **how)
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
    said, calls = read(name, pieces, is_piecewise=is_piecewise)
    if is_piecewise and name in KEYWORDS and calls:  # it was given out before it broke
        assert text.endswith(said)
    else:
        assert (said, calls) == (text, [])


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


TEXTS = st.text(st.sampled_from("ab1 \"'\\\n\té😀<>/={}[](),:"), max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "a": st.integers(),
        "s": TEXTS.filter(lambda text: "</" not in text),
        "x": st.none() | st.lists(LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(TEXTS, LEAVES, max_size=2)),
        "b": st.booleans(),
        "m": NUMBERS | st.sampled_from(["", "nought", "a 1", "é"]),
    },
)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    given=st.lists(st.tuples(st.just("f"), GIVEN) | st.just(("g", {})), min_size=1, max_size=3),
    size=st.integers(1, 40),
    is_piecewise=st.booleans(),
)
def test_what_a_template_writes_is_read_back(
    name: str, given: list[tuple[str, dict[str, Any]]], size: int, is_piecewise: bool
) -> None:
    text = tool_kit.write(name, given)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    said, calls = read(name, pieces, is_piecewise=is_piecewise)
    assert said == ""
    assert [(one, json.loads(arguments)) for one, arguments in calls] == given
    assert [type(value) for _, one in calls for value in json.loads(one).values()] == [
        type(value) for _, one in given for value in one.values()
    ]


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def test_text_before_a_call_streams_and_a_possible_marker_is_held_back() -> None:
    parser = CallParser(FORMATS["hermes"], FUNCTIONS)
    assert parser.push("a <b> and ") == ["a <b> and"]
    assert parser.push("<tool") == []
    assert parser.push("box>") == [" <toolbox>"]
    assert parser.push(" <tool_call") == []
    assert parser.push('>{"name": "f"') == []
    assert parser.finish() == [' <tool_call>{"name": "f"']


def test_arguments_stream_as_soon_as_the_name_is_known() -> None:
    parser = CallParser(FORMATS["hermes"], FUNCTIONS)
    parser.push('<tool_call>{"name": "f", "arguments": ')
    (first,) = parser.push('{"a')
    assert isinstance(first, CallPiece)
    assert (first.index, first.name, first.arguments) == (0, "f", '{"a')
    assert first.id.startswith("call_")
    assert parser.push('": 1') == [CallPiece(0, '": 1')]
    assert parser.push("}}</tool_call>") == [CallPiece(0, "}")]
    assert parser.finish() == []


def test_a_text_between_tags_streams_and_what_may_end_it_is_held_back() -> None:
    parser = CallParser(FORMATS["qwen3_coder"], FUNCTIONS)
    parser.push("<tool_call>\n<function=f>\n<parameter=s>\n")
    assert parser.push('say "hi"\n') == [CallPiece(0, 'say \\"hi\\"')]
    assert parser.push("</param") == []
    assert parser.push("s>\n") == [CallPiece(0, "\\n</params>")]
    assert parser.push("</parameter>\n</function>") == [CallPiece(0, '"}')]
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
        ("{{ tools }}<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter></function></tool_call>", "qwen3_coder"),
        ("{{ tools }}<seed:tool_call>\n<function=f>", "seed_oss"),
        ("{{ tools }}<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>", "glm4"),
        ("{{ tools }}respond only with <|tool_call|> followed by a JSON list", "granite"),
        ("{{ tools }}a single JSON list formatted as functools[{", "phi4_mini"),
        ("{{ tools }}<TOOLCALL>[{", "nemotron"),
        (
            "{{ tools }}[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
            "pythonic",
        ),
        ("{{ tools }}call wrapped in <function_calls></function_calls> XML tags", "olmo3"),
        (None, None),
    ],
)
def test_the_template_tells_the_format(template: Any, name: str | None) -> None:
    found = format_of(template, "auto")
    assert (found.name if found else None) == name
    assert format_of(template, "mistral") is FORMATS["mistral"]


def test_every_format_is_one_that_the_setting_takes() -> None:
    assert get_args(ApiConfig.model_fields["tool_format"].annotation) == ("auto", *sorted(FORMATS))
