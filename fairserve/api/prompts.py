"""Text to token ids and back to the strings that log probabilities show."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from fairserve.api.conversation import PLAIN, Conversations, Rendering
from fairserve.api.openai_schema import Message, Prompt
from fairserve.api.output_rules import Words, bad_words
from fairserve.errors import InvalidRequest

A = TypeVar("A")
R = TypeVar("R")
INLINE_CHARS = 4_000
"""Prompts beyond this many characters are tokenized in a thread; below it, the hop costs more than the work."""


class TextTokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool = ...) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> Any: ...


class Prompts:
    """One tokenizer, off the event loop when the text is long."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.conversations = Conversations(tokenizer)
        self.num_tokens = len(tokenizer)
        self.token_text = functools.lru_cache(maxsize=65_536)(functools.partial(token_text, tokenizer))

    async def of_chat(
        self, messages: Sequence[Message], how: Rendering = PLAIN, *, add_special_tokens: bool = False
    ) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's turn. Its template writes the special tokens itself.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses this conversation.
        """
        if not self._tokenizer.chat_template:
            detail = "this model has no chat template, so it cannot chat: use /v1/completions"
            raise InvalidRequest(detail, param="messages", code="no_chat_template")
        num_chars = how.num_chars + sum(len(message.content or "") + 32 for message in messages)
        encode = functools.partial(self._render_and_encode, how, add_special_tokens)
        return await _run(encode, messages, num_chars)

    async def of_prompts(self, prompts: Sequence[Prompt], param: str = "prompt") -> list[tuple[int, ...]]:
        """Token ids of completion prompts, which the request body calls ``param``.

        Raises:
            InvalidRequest: a prompt is empty, or a token id is outside the vocabulary.
        """
        num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        encoded = await _run(self._encode_all, prompts, num_chars)
        for token_ids in encoded:
            if not token_ids:
                raise InvalidRequest(f"{param}: must hold at least one token", param=param)
            self.check_ids(token_ids, param)
        return encoded

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """
        Raises:
            InvalidRequest: one is outside the vocabulary.
        """
        if max(token_ids, default=0) >= self.num_tokens:
            detail = f"{param}: token ids must be below {self.num_tokens}, the size of the vocabulary"
            raise InvalidRequest(detail, param=param)

    async def texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Of prompts as they were sent."""
        return [one if isinstance(one, str) else await self.decoded(one) for one in prompts]

    async def encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        encode = functools.partial(self._tokenizer.encode, add_special_tokens=add_special_tokens)
        return await _run(encode, text, len(text))

    async def decoded(self, token_ids: Sequence[int]) -> str:
        decode = functools.partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)
        return await _run(decode, list(token_ids), len(token_ids))

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return [self._tokenizer.convert_ids_to_tokens(one) for one in token_ids]

    def bad_words(self, words: Sequence[str]) -> Words:
        """See :func:`fairserve.api.output_rules.bad_words`."""
        return bad_words(self._tokenizer, words)

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return [tuple(self._tokenizer.encode(one)) if isinstance(one, str) else one for one in prompts]

    def _render_and_encode(
        self, how: Rendering, add_special_tokens: bool, messages: Sequence[Message]
    ) -> tuple[int, ...]:
        text = self.conversations.render(messages, how)
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))


async def _run(work: Callable[[A], R], argument: A, num_chars: int) -> R:
    return await asyncio.to_thread(work, argument) if num_chars > INLINE_CHARS else work(argument)


_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def token_text(tokenizer: TextTokenizer, token_id: int) -> tuple[str, list[int] | None]:
    """How a token looks, and its bytes (None: unknown).

    A token that holds part of a character has no text; it shows as ``bytes:\\xe2\\x80``, as at OpenAI.
    """
    raw = tokenizer.convert_ids_to_tokens(token_id)
    text = raw.replace("▁", " ") if "▁" in raw else tokenizer.decode([token_id])  # decode drops a leading "▁"
    fallback = _BYTE_FALLBACK.fullmatch(raw)
    if fallback is None and "\N{REPLACEMENT CHARACTER}" not in text:
        return text, list(text.encode())
    if fallback is not None:
        data = [int(fallback[1], 16)]
    elif all(character in _byte_alphabet() for character in raw):
        data = [_byte_alphabet()[character] for character in raw]
    else:
        return text, None
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte, which byte-level vocabularies are written in."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
