"""What one request lets be drawn: its grammar, its lists of token ids, its least length; and its biases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fairserve.engine.grammar import Grammars, allowed_tokens
from fairserve.engine.request import GenerateRequest
from fairserve.errors import InvalidRequest

_ADDENDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf)
_ADDENDS = _ADDENDS.astype(np.float32)
"""What is added to the logits of eight tokens, by the byte whose bits say which may come."""


class Rules:
    """Rules of one request, and where its output stands in them."""

    def __init__(self, request: GenerateRequest, grammars: Grammars, eos: frozenset[int]) -> None:
        """
        Raises:
            InvalidRequest: the grammar does not compile, or what was generated elsewhere does not follow it.
        """
        p = request.sampling
        before = request.prompt_token_ids[request.num_prompt :]
        self.matcher = grammars.matcher(p.grammar) if p.grammar is not None else None
        self._allowed = None if p.allowed_token_ids is None else np.array(p.allowed_token_ids, dtype=np.int64)
        self._bad_words = p.bad_words
        self._longest = max(map(len, p.bad_words), default=1) - 1
        self._last = before[len(before) - self._longest :] if self._longest else ()
        """As many output tokens as a bad word may have before its last."""
        self._too_short = p.min_tokens - len(before)
        """Output tokens still wanted before any end."""
        self._ends = np.array(sorted(eos | {*p.stop_token_ids}), dtype=np.int64)
        self._eos = np.array(sorted(eos), dtype=np.int64)
        self._ignores_eos = p.ignore_eos
        if self.matcher is not None:
            self.matcher.take(before)
            if self.matcher.error is not None:
                detail = f"the output so far does not follow the grammar: {self.matcher.error}"
                raise InvalidRequest(detail, code="invalid_grammar")

    def cut(self, allowed: NDArray[np.bool_]) -> None:
        """Take what may not come next out of ``allowed`` [vocabulary], which holds what the grammar allows."""
        if self._allowed is not None:
            only = np.zeros_like(allowed)
            only[self._allowed] = allowed[self._allowed]
            allowed[:] = only
        for word in self._bad_words:
            head = word[:-1]
            if not head or self._last[len(self._last) - len(head) :] == head:
                allowed[word[-1]] = False
        if self._too_short > 0:
            self._cut_if_others_are_left(allowed, self._ends)
        elif self.matcher is not None and self._ignores_eos:
            self._cut_if_others_are_left(allowed, self._eos)

    def _cut_if_others_are_left(self, allowed: NDArray[np.bool_], ids: NDArray[np.int64]) -> None:
        """A grammar that allows nothing but its end is not kept from it."""
        kept = allowed[ids]
        allowed[ids] = False
        if self.matcher is not None and not allowed.any():
            allowed[ids] = kept

    def take(self, token_id: int) -> bool:
        """This one was drawn. Whether the grammar ends the output with it."""
        self._too_short -= 1
        if self._longest:
            self._last = (*self._last, token_id)[-self._longest :]
        if self.matcher is None:
            return False
        self.matcher.take((token_id,))
        return self.matcher.has_ended


def addends(allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """0 for what is ``allowed`` [rows, vocabulary], else minus infinity; the rows are filled up to whole bytes."""
    bits = np.packbits(allowed, axis=1, bitorder="little")
    return np.take(_ADDENDS, bits, axis=0).reshape(len(allowed), -1)


def needs_rules(request: GenerateRequest) -> bool:
    p = request.sampling
    return bool(p.grammar is not None or p.allowed_token_ids is not None or p.bad_words or p.min_tokens)


def allowed_of(rules: Sequence[Rules], vocab_size: int) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """What each may have next, [rules, vocab_size], and by index why one can have nothing."""
    followed = [(i, one.matcher) for i, one in enumerate(rules) if one.matcher is not None]
    allowed = allowed_tokens([matcher for _, matcher in followed], vocab_size) if followed else None
    if allowed is None or len(followed) < len(rules):
        constrained, allowed = allowed, np.ones((len(rules), vocab_size), dtype=np.bool_)
        if constrained is not None:
            allowed[[i for i, _ in followed]] = constrained
    failed: dict[int, str] = {}
    for i, one in enumerate(rules):
        one.cut(allowed[i])
        if one.matcher is not None and (error := one.matcher.error) is not None:
            failed[i] = f"the output cannot follow its grammar any further: {error}"
        elif not allowed[i].any():
            failed[i] = "no token may come next: its grammar, allowed_token_ids and bad_words leave none"
    return allowed, failed
