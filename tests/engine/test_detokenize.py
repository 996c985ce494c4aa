"""Text: whole characters, stop strings across tokens, nothing lost, nothing early."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fairserve.engine.detokenize import FastDecoder, TextOutput, WindowDecoder
from fairserve.engine.request import SamplingParams
from tests.engine.support import TOKENIZER

PROMPT = tuple(TOKENIZER.encode("Say: "))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def feed(text: str, decoder: Any = None, **sampling: Any) -> tuple[list[str], str | None, str]:
    """Pieces as they came, the stop string, and what the flush gave."""
    output = TextOutput(TOKENIZER, PROMPT, SamplingParams(**sampling))
    if decoder is not None:
        output._decoder = decoder(TOKENIZER, PROMPT)
    pieces: list[str] = []
    for token in encode(text):
        piece, stop = output.push(token)
        pieces.append(piece)
        if stop is not None:
            return pieces, stop, ""
    return pieces, None, output.flush()


DECODERS = pytest.mark.parametrize("decoder", [FastDecoder, WindowDecoder])


@DECODERS
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=30))
def test_text_comes_whole_and_never_with_half_a_character(decoder, text):
    pieces, _, rest = feed(text, decoder)
    assert "".join(pieces) + rest == text
    assert not any("\ufffd" in piece for piece in pieces)


@DECODERS
def test_an_unfinished_character_at_the_end_is_not_text(decoder):
    output = decoder(TOKENIZER, PROMPT)
    first, *_ = encode("é")
    assert output.push(encode("a")[0]) == "a"
    assert output.push(first) == ""


@DECODERS
def test_a_prompt_that_ends_within_a_character_does_not_come_back(decoder):
    *prompt, last = encode("hello é")
    output = decoder(TOKENIZER, tuple(prompt))
    assert [output.push(token) for token in (last, *encode("!"))] == ["é", "!"]


@DECODERS
def test_special_tokens_give_no_text(decoder):
    output = decoder(TOKENIZER, PROMPT)
    special = TOKENIZER.convert_tokens_to_ids("<|end|>")
    assert "".join(output.push(t) for t in [*encode("ab"), special, *encode("c")]) == "abc"


def test_a_first_word_keeps_its_leading_space():
    core = Tokenizer(models.BPE({"▁Hi": 0, "▁there": 1, "▁you": 2}, []))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    for decoder in (FastDecoder, WindowDecoder):
        output = decoder(tokenizer, (0,))
        assert [output.push(1), output.push(2)] == [" there", " you"]


def test_a_stop_string_across_tokens_cuts_the_text_before_it():
    pieces, stop, _ = feed("one two END three", stop=("END",))
    assert "".join(pieces) == "one two "
    assert stop == "END"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_certain():
    pieces, stop, rest = feed("a ENx EN", stop=("END",))
    assert stop is None
    assert "".join(pieces) == "a ENx "
    assert rest == "EN", "held text comes out when the output ends otherwise"
    assert not any(piece.endswith("E") for piece in pieces)


def test_a_stop_string_can_be_included():
    pieces, stop, _ = feed("one END", stop=("END",), include_stop_str_in_output=True)
    assert "".join(pieces) == "one END"
    assert stop == "END"


def test_the_first_of_several_stop_strings_wins():
    pieces, stop, _ = feed("abcde", stop=("de", "cd"))
    assert ("".join(pieces), stop) == ("ab", "cd")


def test_a_stop_string_in_the_middle_of_a_character_sequence_is_found():
    pieces, stop, _ = feed("né🙂à fin", stop=("🙂à",))
    assert ("".join(pieces), stop) == ("né", "🙂à")


@settings(deadline=None, max_examples=200)
@given(text=st.text("abc", max_size=25), stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_end_the_text_where_a_search_over_the_whole_would(text, stops):
    pieces, stop, rest = feed(text, stop=tuple(stops))
    given_out = "".join(pieces) + rest
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert (stop, given_out) == (None, text)
    else:
        seen = text[: min(ends)]
        assert given_out == seen[: min(seen.find(s) for s in stops if s in seen)]
        assert stop in stops
    for end in range(len(pieces)):
        sent = "".join(pieces[:end])
        assert given_out.startswith(sent), "text that was sent cannot be taken back"


def test_without_a_tokenizer_there_is_no_text():
    output = TextOutput(None, (1,), SamplingParams(stop=("a",)))
    assert output.push(3) == ("", None)
    assert output.flush() == ""


def test_before_min_tokens_no_stop_string_is_looked_for():
    ids = TOKENIZER.encode("abab")
    text = TextOutput(TOKENIZER, (), SamplingParams(stop=("ab",), min_tokens=2))
    said = [text.push(token_id) for token_id in ids]
    assert said == [("a", None), ("b", None), ("", None), ("", "ab")]


@DECODERS
def test_special_tokens_are_text_only_where_they_are_asked_for(decoder):
    special = TOKENIZER.convert_tokens_to_ids("<|end|>")
    for skips, expected in ((True, "a"), (False, "a<|end|>")):
        output = decoder(TOKENIZER, PROMPT, skips)
        assert output.push(encode("a")[0]) + output.push(special) == expected
