"""Tokens become text as they arrive: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from typing import Any, Protocol

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from fairserve.engine.request import SamplingParams

_CONTEXT = 6
"""Last prompt tokens that decoding looks back at, so that a first word keeps its leading space."""
_UNFINISHED = "\ufffd"


class Decoder(Protocol):
    def push(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""
        ...


class FastDecoder:
    """tokenizers' own stream; about 2 us a token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer: Any = tokenizer.backend_tokenizer
        context = list(prompt[-_CONTEXT:])
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        known = self._tokenizer.decode(context, skip_special_tokens=skip_special_tokens)
        self._known = known.rstrip(_UNFINISHED) if known.endswith(_UNFINISHED) else ""
        """Text of a context that ends within a character: the stream gives it out with its first new text."""

    def push(self, token_id: int) -> str:
        text = self._stream.step(self._tokenizer, token_id) or ""
        if text and self._known:
            text, self._known = text.removeprefix(self._known), ""
        return text


class WindowDecoder:
    """For any tokenizer: decode a short window twice, with and without the new token, and take the difference."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt[-_CONTEXT:])
        self._num_read = len(self._window)
        """Tokens at the head of the window whose text was given out."""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        old = self._decode(self._window[: self._num_read]).rstrip(_UNFINISHED)
        new = self._decode(self._window)
        if len(new) <= len(old) or new.endswith(_UNFINISHED):
            return ""
        self._window = self._window[max(0, self._num_read - _CONTEXT) :]
        self._num_read = len(self._window)
        return new[len(old) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def make_decoder(
    tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], skip_special_tokens: bool = True
) -> Decoder:
    kind = FastDecoder if tokenizer.is_fast else WindowDecoder
    return kind(tokenizer, prompt, skip_special_tokens)


class TextOutput:
    """The text of one request: decoded, searched for stop strings, given out as far as it is certain."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, prompt: tuple[int, ...], params: SamplingParams
    ) -> None:
        """Without a tokenizer there is no text."""
        self._decoder = None if tokenizer is None else make_decoder(tokenizer, prompt, params.skip_special_tokens)
        self._stop = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._unsearched = params.min_tokens
        """Tokens to come in whose text no stop string is looked for."""
        self._held = ""

    def push(self, token_id: int) -> tuple[str, str | None]:
        """New certain text, and the stop string that ended it; after a stop string the output is over."""
        if self._decoder is None:
            return "", None
        self._held += self._decoder.push(token_id)
        if self._unsearched > 0:
            self._unsearched -= 1
            return self.flush(), None
        found = min(((at, s) for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            at, stop = found
            text = self._held[: at + len(stop) if self._include_stop else at]
            self._held = ""
            return text, stop
        hold = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        return text, None

    def flush(self) -> str:
        """What was held back, when the output ends for another reason. An unfinished character is not text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
