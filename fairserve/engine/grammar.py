"""Which tokens keep an output within its grammar: llguidance's matchers, compiled once for each grammar.

A grammar is compiled from its text wherever it is needed: the ingress sees whether it compiles (:func:`check`, which
needs no tokenizer), the replica compiles it for its model's tokens (:class:`Grammars`). Both keep the last ones, and
both compile on threads of their own, without Python's lock: neither event loop nor engine thread waits for it.

What hostile text can cost is bounded twice: by its size, before it is compiled, and by llguidance's own budgets while
it is compiled and at every step.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from fairserve.engine.request import Grammar, GrammarKind
from fairserve.errors import InvalidRequest

MAX_CHARS: dict[GrammarKind, int] = {
    "json_schema": 65_536,
    "json_object": 0,
    "regex": 4_096,
    "choice": 65_536,
    "lark": 65_536,
}
"""Of a grammar's text."""
MAX_DEPTH = 64
"""Of arrays and objects within each other in a JSON Schema."""
MAX_CHOICES = 2_048
MAX_KEPT = 64
"""Grammars that a process keeps compiled."""
MAX_MESSAGE_CHARS = 500
"""Of what the library says, in an error."""
COMPILING = ThreadPoolExecutor(1, thread_name_prefix="grammar")
"""One at a time in a process: who sends many hard grammars delays other grammars, and nothing else."""
BUDGETS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between two tokens of JSON: with no end to it, a small model may find none."""
_REGEX_SIGNS = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """The values of the last keys, each made once however many threads ask for it. What a maker raises is not kept."""

    def __init__(self, make: Callable[[K], V], most: int = MAX_KEPT) -> None:
        self._make = make
        self._most = most
        self._lock = threading.Lock()
        self._making: dict[K, threading.Lock] = {}
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """What is kept; None where nothing is."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def made(self, key: K) -> V:
        """What is kept, or made now. Raises what the maker raises."""
        if (value := self.get(key)) is not None:
            return value
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            if (value := self.get(key)) is not None:
                return value
            try:
                value = self._make(key)
            finally:
                with self._lock:
                    self._making.pop(key, None)
            with self._lock:
                self._kept[key] = value
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)
        return value


def source(grammar: Grammar) -> str:
    """The same in llguidance's own form.

    Raises:
        InvalidRequest: too large, too deep, or of another form than its kind; whether it compiles shows later.
    """
    kind, text = grammar.kind, grammar.text
    if len(text) > MAX_CHARS[kind]:
        raise _invalid(f"has {len(text)} characters, at most {MAX_CHARS[kind]} are allowed")
    match kind:
        case "regex":
            return _of_regex(text)
        case "lark":
            return LLMatcher.grammar_from_lark(text)
        case "choice":  # as a rule of strings it would take the library a hundred times as long to follow
            return _of_regex("|".join(f"({_literal(one)})" for one in _choices(text)))
        case "json_object":
            text = '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(_schema(text), defaults={"whitespace_pattern": _WHITESPACE})


def is_lark(text: str) -> bool:
    """Or GBNF, as llama.cpp has it."""
    return is_lark_syntax(text)


def lark_of_gbnf(text: str) -> str:
    """
    Raises:
        InvalidRequest: it is no GBNF.
    """
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # the library's translation raises whatever it stumbles over
        raise _invalid(f"is neither Lark nor GBNF: {error}") from None


def json_rule(schema: Any) -> str:
    """What a rule of a grammar in Lark says for JSON of this schema, with as little space in it as elsewhere."""
    said = {} if schema is True else schema
    limited = said | {"x-guidance": {"whitespace_pattern": _WHITESPACE}} if isinstance(said, dict) else said
    return f"%json {json.dumps(limited)}"


def check(grammar: Grammar) -> None:
    """Compile it without a tokenizer, to see whether it does.

    Raises:
        InvalidRequest: it does not; the message is what the library says.
    """
    said = _CHECKED.made(grammar)
    if said:
        raise _invalid(said)


def is_checked(grammar: Grammar) -> bool:
    """:func:`check` remembers the answer."""
    return _CHECKED.get(grammar) is not None


def _check(grammar: Grammar) -> str:
    """Why it does not compile, "" when it does: that is worth remembering as well."""
    try:
        is_wrong, said = LLMatcher.validate_grammar_with_warnings(source(grammar), limits=BUDGETS)
    except (InvalidRequest, ValueError) as error:
        return _short(str(error))
    return _short(said[0]) if is_wrong else ""


_CHECKED: Kept[Grammar, str] = Kept(_check)


class Grammars:
    """The grammars of one engine's tokenizer. Any thread may compile."""

    def __init__(self, tokenizer: Any = None, eos: Iterable[int] = (), vocab_size: int = 0) -> None:
        """``tokenizer``: a transformers tokenizer; ``eos``: what ends a text; ``vocab_size``: logits in a row, more
        than the tokenizer knows or fewer."""
        self._tokenizer = tokenizer
        self._eos = sorted(eos)
        self._vocab_size = vocab_size
        self._bridges: Kept[str, LLTokenizer] = Kept(self._bridge)
        self._compiled: Kept[Grammar, LLMatcher | str] = Kept(self._compile)
        """Or why it does not compile."""

    def warm(self) -> None:
        """Read the tokenizer, which is done once: half a second for 50,000 tokens, and under Python's lock."""
        if getattr(self._tokenizer, "is_fast", False):
            self._bridges.made("")

    def is_prepared(self, grammar: Grammar) -> bool:
        return self._compiled.get(grammar) is not None

    def prepare(self, grammar: Grammar) -> None:
        """Compile it, on a thread that nobody waits for; :meth:`matcher` says what became of it."""
        self._compiled.made(grammar)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of an output; quick when the grammar is compiled.

        Raises:
            InvalidRequest: it does not compile, or this tokenizer allows no grammar.
        """
        compiled = self._compiled.made(grammar)
        if isinstance(compiled, str):
            raise _invalid(compiled)
        return Matcher(compiled.deep_copy(), self._bridges.made("").vocab_size)

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        try:
            compiled = LLMatcher(self._bridges.made(""), source(grammar), log_level=0, limits=BUDGETS)
        except (InvalidRequest, ValueError) as error:
            return _short(str(error))
        return _short(compiled.get_error()) if compiled.is_error() else compiled

    def _bridge(self, _: str) -> LLTokenizer:
        if not getattr(self._tokenizer, "is_fast", False):
            raise _invalid("no output can be constrained: this model's tokenizer is none of the tokenizers library's")
        given = self._tokenizer.backend_tokenizer
        core = type(given).from_str(given.to_str())
        core.no_padding()
        core.no_truncation()
        size = max(core.get_vocab_size(with_added_tokens=True), self._vocab_size)
        # Where nothing ends a text, a number that no logit has stands for what does; the library would take token 0.
        return LLTokenizer(core.to_str(), n_vocab=size + (not self._eos), eos_token=self._eos or [size])


class Matcher:
    """Where one output stands in its grammar."""

    def __init__(self, core: LLMatcher, num_tokens: int) -> None:
        self.core = core
        self.num_tokens = num_tokens

    @property
    def has_ended(self) -> bool:
        """The output is whole and nothing can follow, except EOS where that was not taken."""
        return self.core.is_stopped() and not self.core.is_error()

    @property
    def error(self) -> str | None:
        """Why it can follow no further: a budget is spent, or a token was not allowed."""
        return _short(self.core.get_error()) if self.core.is_error() else None

    def take(self, token_ids: Sequence[int]) -> None:
        """These come next; :attr:`error` says whether they could."""
        self.core.consume_tokens(list(token_ids))


def allowed_tokens(matchers: Sequence[Matcher], vocab_size: int) -> NDArray[np.bool_]:
    """What may come next, [matchers of one tokenizer, vocab_size]. The row of a matcher with an error says nothing."""
    num_tokens = matchers[0].num_tokens
    bits = allocate_token_bitmask(len(matchers), num_tokens)
    if len(matchers) == 1:
        fill_next_token_bitmask(matchers[0].core, bits)
    else:
        fill_next_token_bitmask_par(_executor(), [(matcher.core, i) for i, matcher in enumerate(matchers)], bits)
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=min(num_tokens, vocab_size), bitorder="little")
    if num_tokens < vocab_size:
        allowed = np.pad(allowed, ((0, 0), (0, vocab_size - num_tokens)))
    return allowed.view(np.bool_)


@functools.cache
def _executor() -> LLExecutor:
    """The library's own threads; they run while the engine's sleep."""
    return LLExecutor()


def _of_regex(text: str) -> str:
    """``\\d`` means 0 to 9: to Rust it would be a digit of any script."""
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, use_ascii='d')}/")


def _choices(text: str) -> list[str]:
    choices = _json(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
        raise _invalid("must be a list of strings, with one at least")
    if len(choices) > MAX_CHOICES:
        raise _invalid(f"holds {len(choices)} choices, at most {MAX_CHOICES} are allowed")
    return choices


def _schema(text: str) -> str:
    """A JSON Schema as it is, if it is no deeper than it may be."""
    schema = _json(text)
    if not isinstance(schema, dict | bool):
        raise _invalid("must be a JSON Schema: an object")
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return text
    raise _invalid(f"is deeper than {MAX_DEPTH} objects and lists within each other")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"is not JSON: {error}") from None


def _literal(text: str) -> str:
    """A regular expression that matches this text alone."""
    return _REGEX_SIGNS.sub(lambda sign: "\\" + sign[0], text)


def _short(said: str) -> str:
    """One line of what the library says."""
    said = " ".join(said.replace("<non-verbose/>", "").split())
    return said if len(said) <= MAX_MESSAGE_CHARS else said[:MAX_MESSAGE_CHARS] + "..."


def _invalid(said: str) -> InvalidRequest:
    return InvalidRequest(_short(said), code="invalid_grammar")
