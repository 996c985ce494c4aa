"""Output that follows a grammar: whatever the model prefers, what comes out is whole, and no other row changes."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

import fairserve.engine.grammar as grammar_module
from fairserve.engine.grammar import MAX_CHARS, Grammars, Kept, allowed_tokens, check, is_checked
from fairserve.engine.request import GenerateRequest, Grammar, joined
from fairserve.engine.sampling import Sampler
from fairserve.errors import InvalidRequest
from tests.api.scripted import byte_tokenizer
from tests.engine.support import Driver, drive, prepare, reference, request, tiny

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
VOCABULARY = 300
"""More logits than the tokenizer has tokens, as models pad them."""
GRAMMARS = Grammars(TOKENIZER, {EOS}, VOCABULARY)
PROMPT = tuple(range(60, 80))
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAMES = Grammar("choice", '["Ann", "Anna", "B\\u00f6rje"]')
DATE = Grammar("regex", r"\d{4}-\d\d-\d\d")


def schema(of: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(of))


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return GRAMMARS


def make_model() -> Any:
    return tiny("llama", vocab_size=VOCABULARY, eos_token_id=EOS, max_position_embeddings=512)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return prepare(make_model(), tokenizer=TOKENIZER)


def run(loaded: Any, *requests: GenerateRequest, **changes: Any) -> Driver:
    driver = drive(loaded, **{"kv_cache_tokens": 4096, "max_model_len": 512, **changes})
    driver.add(*requests)
    driver.run()
    return driver


def wanted(request_id: str, grammar: Grammar | None, **sampling: Any) -> GenerateRequest:
    return request(request_id, PROMPT, **{"grammar": grammar, "max_tokens": 200, **sampling})


def text_of(grammars: Grammars, grammar: Grammar, seed: int, most: int = 400, **sampling: Any) -> tuple[str, bool]:
    """What random logits make of a grammar, and whether it was ended by it."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(grammars, frozenset({EOS}))
    sampler.add(request("r", (1,), grammar=grammar, **{"temperature": 1.0, **sampling}), seed)
    made: list[int] = []
    for _ in range(most):
        logits = torch.randn(1, VOCABULARY, generator=generator) * 4
        logits[0, EOS] += 4.0  # it wants to end long before it may
        one = sampler.sample(logits, ["r"], [True])["r"]
        assert one is not None
        assert one.error is None, one.error
        made.append(one.token_id)
        if one.ends:
            return TOKENIZER.decode(made, skip_special_tokens=True), True
    return TOKENIZER.decode(made), False


# -- what comes out ----------------------------------------------------------------------------------------------------


SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 1000},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[a-f]{2,4}$"},
        {"enum": ["a", 7, None, '\u00e9\n"']},
        {"const": {"k": [1, 2]}},
        {"type": "string", "format": "date"},
    ]
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "long name", "\u00fc", 'quo"te'])
    objects = st.dictionaries(names, inner, max_size=3).flatmap(
        lambda of: st.sets(st.sampled_from(sorted(of)) if of else st.nothing()).map(
            lambda required: {
                "type": "object",
                "properties": of,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return objects | arrays | st.lists(inner, min_size=1, max_size=3).map(lambda of: {"anyOf": of})


SCHEMAS = st.recursive(SCALARS, containers, max_leaves=5)


@settings(max_examples=30, deadline=None)
@given(of=SCHEMAS, seed=st.integers(0, 2**32), greedy=st.booleans())
def test_any_logits_make_a_text_that_fits_the_schema(of: Any, seed: int, greedy: bool) -> None:
    text, is_whole = text_of(GRAMMARS, schema(of), seed, most=150, temperature=0.0 if greedy else 1.0)
    if is_whole:
        jsonschema.validate(json.loads(text), of)


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (NAMES, "Ann|Anna|Börje"),
        (Grammar("choice", json.dumps(["a+b", "a/b\n", "[x]\\d", "{1}$", ""])), r"a\+b|a/b\n|\[x\]\\d|\{1\}\$|"),
        (DATE, "[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        (Grammar("lark", 'start: "a" b*\nb: "x" | "y"'), "a[xy]*"),
    ],
)
def test_a_choice_a_regex_and_a_grammar_are_kept_to(grammars: Grammars, grammar: Grammar, expected: str) -> None:
    texts = {text_of(grammars, grammar, seed)[0] for seed in range(8)}
    assert all(re.fullmatch(expected, text) for text in texts), texts
    assert len(texts) > 1, "it chooses"


def test_a_json_object_is_any_json_object(grammars: Grammars) -> None:
    for seed in range(5):
        text, is_whole = text_of(grammars, Grammar("json_object"), seed)
        assert is_whole
        assert isinstance(json.loads(text), dict)


def test_a_token_with_no_chance_at_all_is_drawn_when_it_is_the_only_one_left(grammars: Grammars) -> None:
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
        sampler = Sampler(grammars, frozenset({EOS}))
        sampler.add(request("r", (1,), grammar=Grammar("choice", '["no"]'), **sampling), 0)
        logits = torch.full((1, VOCABULARY), float("-inf"))
        logits[0, 5] = 0.0
        made = [sampler.sample(logits, ["r"], [True])["r"] for _ in range(2)]
        assert TOKENIZER.decode([one.token_id for one in made if one]) == "no"


def test_tokens_of_more_than_one_byte_and_in_several_ways_are_followed() -> None:
    """The library's reading of a vocabulary against the tokenizer's own: every split of a text is allowed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for merged in ("Ġa", "ab", "Ġab", "é", '{"', '":', '"}', "name"):
        vocab.setdefault(merged if merged != "é" else "Ã©", len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    grammars = Grammars(tokenizer, {tokenizer.eos_token_id}, len(tokenizer))
    text = '{"name": "é ab"}'
    splits = [
        ['{"', "name", '":', "Ġ", '"', "Ã©", "Ġab", '"}'],
        ["{", '"', *"name", '"', ":", "Ġ", '"', "Ã", "©", "Ġa", "b", '"', "}"],
    ]
    for split in splits:
        matcher = grammars.matcher(schema({"type": "object", "properties": {"name": {"type": "string"}}}))
        for piece in split:
            token_id = vocab[piece]
            assert allowed_tokens([matcher], len(tokenizer))[0, token_id], piece
            matcher.take([token_id])
        assert matcher.has_ended
        assert tokenizer.decode([vocab[piece] for piece in split]) == text


# -- in the engine -----------------------------------------------------------------------------------------------------


def test_a_grammar_changes_no_other_row(loaded: Any) -> None:
    free = {
        "greedy": wanted("greedy", None, max_tokens=15),
        "seeded": wanted("seeded", None, max_tokens=15, temperature=0.9, seed=5),
        "counted": wanted("counted", None, max_tokens=15, repetition_penalty=1.3, logprobs=2),
    }
    alone = run(loaded, *free.values())
    beside = run(loaded, *free.values(), *(wanted(f"g{i}", one) for i, one in enumerate((DATE, schema(PERSON), NAMES))))
    for name in free:
        assert beside.tokens(name) == alone.tokens(name), name
    assert alone.tokens("greedy") == reference(make_model(), PROMPT, 15, eos=[EOS])
    assert re.fullmatch("[0-9-]{10}", beside.text("g0"))
    jsonschema.validate(json.loads(beside.text("g1")), PERSON)


def test_the_end_of_the_grammar_ends_the_request_even_where_eos_is_ignored(loaded: Any) -> None:
    driver = run(
        loaded,
        wanted("date", DATE, ignore_eos=True),
        wanted("open", Grammar("regex", "a+"), ignore_eos=True, max_tokens=20),
    )
    assert (driver.last("date").finish_reason, driver.last("date").stop_reason) == ("stop", None)
    assert len(driver.tokens("date")) == 10, "it needs no EOS"
    assert driver.text("open") == "a" * 20, "it could always go on, and was told to"
    assert driver.last("open").finish_reason == "length"


def test_max_tokens_and_stop_strings_cut_a_grammar_short(loaded: Any) -> None:
    driver = run(loaded, wanted("cut", DATE, max_tokens=6), wanted("stop", DATE, stop=("-",)))
    assert re.fullmatch("[0-9]{4}-[0-9]", driver.text("cut"))
    assert driver.last("cut").finish_reason == "length"
    assert re.fullmatch("[0-9]{4}", driver.text("stop"))
    assert (driver.last("stop").finish_reason, driver.last("stop").stop_reason) == ("stop", "-")


def test_log_probabilities_are_those_of_the_model_as_it_is(loaded: Any) -> None:
    free = run(loaded, wanted("r", None, logprobs=3, max_tokens=1)).outputs["r"][0].logprobs[0]
    ruled = run(loaded, wanted("r", DATE, logprobs=3, max_tokens=1)).outputs["r"][0].logprobs[0]
    assert ruled.token_id != free.token_id
    assert ruled.top == free.top
    assert ruled.logprob < free.top[-1][1]


def test_seeds_make_different_texts_and_each_the_same_twice(loaded: Any) -> None:
    requests = [wanted(f"r{seed}", schema(PERSON), temperature=1.0, seed=seed, max_tokens=60) for seed in range(3)]
    first, second = run(loaded, *requests), run(loaded, *reversed(requests))
    texts = [first.text(one.request_id) for one in requests]
    assert texts == [second.text(one.request_id) for one in requests]
    assert len(set(texts)) > 1
    for one, text in zip(requests, texts, strict=True):
        if first.last(one.request_id).finish_reason == "stop":
            jsonschema.validate(json.loads(text), PERSON)


def test_a_preempted_request_goes_on_where_its_grammar_stands(loaded: Any) -> None:
    requests = [wanted(f"r{i}", schema(PERSON), temperature=1.0, seed=i, max_tokens=40) for i in range(4)]
    roomy = run(loaded, *requests)
    tight = run(loaded, *requests, kv_cache_tokens=100, max_model_len=100)
    assert tight.num_preempted > 0, "or this test shows nothing"
    for one in requests:
        assert tight.text(one.request_id) == roomy.text(one.request_id)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "seeded"])
def test_cut_after_any_token_the_rest_is_what_one_engine_would_have_made(loaded: Any, sampling: dict[str, Any]) -> None:
    first = wanted("r", DATE, min_tokens=3, bad_words=((TOKENIZER.encode("1")[0],),), **sampling)
    whole = joined(run(loaded, first).outputs["r"])
    assert len(whole.token_ids) == 10
    for cut in range(1, 10):
        params = replace(first.sampling, max_tokens=first.sampling.max_tokens - cut)
        prompt = first.prompt_token_ids + whole.token_ids[:cut]
        rest = joined(
            run(loaded, replace(first, prompt_token_ids=prompt, sampling=params, num_generated=cut)).outputs["r"]
        )
        assert (rest.token_ids, rest.finish_reason) == (whole.token_ids[cut:], "stop"), cut


def test_output_from_elsewhere_that_is_against_the_grammar_is_refused(loaded: Any) -> None:
    driver = drive(loaded)
    elsewhere = replace(wanted("r", DATE), prompt_token_ids=(*PROMPT, TOKENIZER.encode("x")[0]), num_generated=1)
    with pytest.raises(InvalidRequest, match="does not follow the grammar"):
        driver.add(elsewhere)
    driver.engine.check()


def test_a_request_whose_rules_leave_nothing_fails_alone(loaded: Any) -> None:
    other = wanted("other", None, max_tokens=20, ignore_eos=True)
    alone = run(loaded, other)
    driver = run(loaded, other, wanted("bad", Grammar("regex", "[0-9]+"), allowed_token_ids=(70, 71)))
    assert driver.tokens("other") == alone.tokens("other")
    last = driver.last("bad")
    assert (last.finish_reason, last.error_code, last.token_ids) == ("error", "invalid_request", ())
    assert "leave none" in (last.error or "")


def test_a_request_that_spends_its_budget_fails_alone_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "BUDGETS", LLParserLimits(step_lexer_fuel=2_000, verbose_errors=False))
    hard = Grammar("regex", "(.*)(a|b)(.{0,200})(c|d)(.{0,200})e")
    bias = tuple((TOKENIZER.encode(letter)[0], 100.0) for letter in "abcd")
    driver = drive(prepare(make_model(), tokenizer=TOKENIZER), kv_cache_tokens=1024)
    driver.add(wanted("other", None, max_tokens=20, ignore_eos=True))
    driver.add(wanted("bad", hard, logit_bias=bias, temperature=1.0, seed=1))
    driver.run()
    assert len(driver.tokens("other")) == 20
    last = driver.last("bad")
    assert (last.finish_reason, last.error_code) == ("error", "invalid_request")
    assert "cannot follow its grammar any further" in (last.error or "")
    assert 0 < len(driver.tokens("bad")) == last.usage.num_output < 200


def test_what_does_not_compile_is_refused_when_it_comes(loaded: Any) -> None:
    driver = drive(loaded)
    with pytest.raises(InvalidRequest, match="Unimplemented keys"):
        driver.add(wanted("r", schema({"type": "array", "uniqueItems": True})))
    driver.engine.check()


def test_a_tokenizer_that_cannot_be_read_refuses_grammars_and_nothing_else() -> None:
    driver = run(prepare(tiny("llama")), request("r", (10, 11)))
    assert driver.last("r").finish_reason == "length"
    with pytest.raises(InvalidRequest, match="no output can be constrained"):
        driver.add(wanted("g", DATE))


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (schema({"type": "objec"}), "Invalid type: objec"),
        (schema({"not": {}}), 'Unimplemented keys: ["not"]'),
        (Grammar("json_schema", "[1]"), "must be a JSON Schema"),
        (Grammar("json_schema", "{"), "is not JSON"),
        (Grammar("json_schema", "[" * 60_000), "is not JSON"),
        (Grammar("json_schema", '{"a":' * 100 + "1" + "}" * 100), "is deeper than 64"),
        (Grammar("json_schema", " " * 70_000), "has 70000 characters, at most 65536 are allowed"),
        (schema({"$ref": "http://127.0.0.1/secret"}), "does not fetch"),
        (schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (Grammar("regex", "a(?=b)"), "look-around"),
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("choice", "[]"), "with one at least"),
        (Grammar("choice", '["a", 1]'), "a list of strings"),
        (Grammar("choice", json.dumps([str(i) for i in range(3000)])), "at most 2048"),
        (Grammar("lark", "start: other"), 'unknown name: "other"'),
    ],
)
def test_what_is_no_grammar_is_told_with_the_reason(grammar: Grammar, said: str) -> None:
    for _ in range(2):  # found, and remembered
        with pytest.raises(InvalidRequest, match=re.escape(said)) as caught:
            check(grammar)
        assert len(str(caught.value)) < 600
    assert is_checked(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
        schema({"enum": [f"value {i}" for i in range(3000)]}),
        schema({"type": "array", "items": {"type": "string", "maxLength": 10**9}, "minItems": 10**6}),
        Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
        Grammar("regex", r"(\w{1,500}\s){1,500}"),
        Grammar("regex", "(.*a.{20}){3}"),
        Grammar("lark", 'start: (("a"{1000}){1000}){1000}'),
        Grammar("lark", 'start: a\na: a a | "x" | '),
        Grammar("lark", "start: " + " ".join(f"a{i}" for i in range(1)) + '\na0: "x"{100000}'),
    ],
    ids=str,
)
def test_hostile_text_compiles_or_is_refused_within_its_budget(grammars: Grammars, grammar: Grammar) -> None:
    assert len(grammar.text) <= MAX_CHARS[grammar.kind]
    grammars.prepare(grammar)
    assert grammars.is_prepared(grammar)
    try:
        allowed_tokens([grammars.matcher(grammar)], VOCABULARY)
    except InvalidRequest as error:
        assert len(str(error)) < 600  # noqa: PT017 (either is right)


def test_a_grammar_is_compiled_once_however_many_threads_ask() -> None:
    made: list[str] = []
    begun = threading.Barrier(4)

    def make(key: str) -> str:
        made.append(key)
        return key.upper()

    kept: Kept[str, str] = Kept(make, most=2)
    answers: list[str] = []

    def ask() -> None:
        begun.wait()
        answers.append(kept.made("a"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made, answers) == (["a"], ["A"] * 4)
    kept.made("b"), kept.made("a"), kept.made("c")
    assert (kept.get("b"), kept.get("a"), kept.get("c")) == (None, "A", "C"), "the longest unused has gone"


def test_a_grammar_that_does_not_compile_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(TOKENIZER, {EOS}, VOCABULARY)
    grammars.prepare(Grammar("regex", "("))
    monkeypatch.setattr(grammar_module, "source", lambda _: pytest.fail("compiled again"))
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="unclosed group"):
            grammars.matcher(Grammar("regex", "("))


def test_what_cannot_be_made_is_tried_again() -> None:
    kept: Kept[int, float] = Kept(lambda key: 1 / key)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            kept.made(0)
    assert kept.made(2) == 0.5
