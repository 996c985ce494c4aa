"""Answers that begin with the prompt: ``echo`` of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fairserve.api.answers import CompletionAnswer, Job, Json, TokenText
from fairserve.engine.request import RequestOutput, TokenLogprob


class EchoAnswer(CompletionAnswer):
    """Each choice begins with its prompt, and its log probabilities with those of the prompt's tokens: null for the
    first, which follows nothing."""

    def __init__(self, job: Job, token_text: TokenText, texts: Sequence[str]) -> None:
        """``texts``: of the prompts."""
        super().__init__(job, token_text)
        self._texts = texts
        self._echoed: set[int] = set()

    def _choice(self, index: int, output: RequestOutput) -> Json:
        if index in self._echoed:
            return super()._choice(index, output)
        self._echoed.add(index)
        prompt = self._prompt(index) if self._wants_logprobs(index) else {}
        choice = super()._choice(index, output)
        choice["text"] = self._texts[index // self._job.n] + choice["text"]
        if prompt:
            choice["logprobs"] = {key: values + choice["logprobs"][key] for key, values in prompt.items()}
        return choice

    def _prompt(self, index: int) -> Json:
        """Offsets go on from here, so this comes before the output's."""
        request = self._job.requests[index]
        first, num_top = self._token_text(request.prompt_token_ids[0])[0], request.sampling.logprobs
        self._num_chars[index] = len(first)
        scored = [TokenLogprob(one.token_id, one.logprob, one.top[:num_top]) for one in self._scored[index]]
        head = {"tokens": [first], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
        return {key: head[key] + values for key, values in self._logprobs(index, scored).items()}
