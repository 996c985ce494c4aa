"""A replica that plays a script, and may die in it. No Ray cluster, no engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fairserve.engine.request import GenerateRequest, RequestOutput, TokenLogprob, Usage

STARTED, RETURNED = object(), object()


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


@dataclass
class Replica:
    """Plays a script: a number is so many more tokens, STARTED the word that it has begun, an exception its end.
    Makes the tokens that it would make alone: the n-th output token is 100 + n."""

    script: list[Any]
    asked: GenerateRequest | None = None

    async def outputs(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        self.asked = request
        before = request.num_generated or 0
        assert request.prompt_token_ids[request.num_prompt :] == tuple(range(100, 100 + before))
        num_made, waited_s = 0, 0.5
        cached = request.num_input if request.num_generated is not None else 0
        for step in self.script:
            if isinstance(step, BaseException):
                raise step
            if step is STARTED or step is RETURNED:
                reason = "returned" if step is RETURNED else None
                yield RequestOutput(request.request_id, "", (), Usage(0, 0, 0), (), reason, waited_s=waited_s)  # type: ignore[arg-type]
                continue
            ids = tuple(100 + before + num_made + i for i in range(step))
            num_made += step
            is_last = num_made == request.sampling.max_tokens
            yield RequestOutput(
                request.request_id,
                "".join(f"<{i}>" for i in ids),
                ids,
                Usage(request.num_input, cached, num_made),
                tuple(TokenLogprob(i, -0.5) for i in ids),
                "length" if is_last else None,
                waited_s=waited_s,
            )
            waited_s = None  # type: ignore[assignment]
