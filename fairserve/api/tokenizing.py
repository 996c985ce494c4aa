"""``/tokenize`` and ``/detokenize``, in vLLM's shapes: the served model's tokenizer, for callers who have none. No
engine is asked, and nothing is charged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import FailFast, Field, model_validator

from fairserve.api.answers import Json
from fairserve.api.body_errors import refuse
from fairserve.api.conversation import Rendering
from fairserve.api.openai_schema import Body, Message
from fairserve.api.prompts import Prompts


class TokenizeRequest(Body):
    """The body of ``POST /tokenize``: ``prompt`` or ``messages``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "tools": ([],),
    }

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(default_factory=list, min_length=1), FailFast()]
    add_special_tokens: bool | None = None
    """Those that the tokenizer puts round a text. Left out: true for a prompt, false for messages, whose template
    writes them."""
    add_generation_prompt: bool = True
    """Messages only: the beginning of the assistant's turn is part of it."""
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise refuse("wrong_field", "give exactly one of prompt and messages", "prompt")
        return self


class DetokenizeRequest(Body):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]


async def tokenized(body: TokenizeRequest, prompts: Prompts, max_model_len: int) -> Json:
    """The answer of /tokenize. There may be more tokens than a request may hold.

    Raises:
        InvalidRequest: as :meth:`Prompts.of_chat`.
    """
    if body.prompt is not None:
        tokens = await prompts.encoded(body.prompt, body.add_special_tokens is not False)
    else:
        rendered = await prompts.of_chat(
            body.messages,
            Rendering(adds_prompt=body.add_generation_prompt),
            add_special_tokens=body.add_special_tokens is True,
        )
        tokens = list(rendered)
    return {
        "count": len(tokens),
        "max_model_len": max_model_len,
        "tokens": tokens,
        "token_strs": prompts.names(tokens) if body.return_token_strs else None,
    }


async def detokenized(body: DetokenizeRequest, prompts: Prompts) -> Json:
    """The answer of /detokenize.

    Raises:
        InvalidRequest: a token id is outside the vocabulary.
    """
    prompts.check_ids(body.tokens, "tokens")
    return {"prompt": await prompts.decoded(body.tokens)}
