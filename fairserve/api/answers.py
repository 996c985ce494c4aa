"""What callers get: the engine's outputs as OpenAI objects (plain dicts; a test validates them with ``openai``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fairserve.api.answer_headers import charged_tokens
from fairserve.engine.request import GenerateRequest, RequestOutput, TokenLogprob

MIN_LOGPROB = -9999.0
"""Stands for a probability of 0, whose logarithm JSON cannot hold (OpenAI's convention)."""

TokenText = Callable[[int], tuple[str, list[int] | None]]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request, checked and tokenized: what to generate and how to answer."""

    response_id: str
    created_s: int
    """Unix time."""
    model: str
    requests: tuple[GenerateRequest, ...]
    """Prompt by prompt: choice ``i`` of prompt ``p`` is request ``p * n + i``; that is also its index in the answer."""
    n: int
    """Choices per prompt."""
    stream: bool
    include_usage: bool
    usage_in_chunks: bool = False
    """Each chunk tells the usage until then (vLLM's ``continuous_usage_stats``)."""
    prompt_logprobs: int | None = None
    """Alternatives to list for each token of the prompt (vLLM's field), None to list nothing."""
    fingerprint: str = ""
    """``system_fingerprint``: equal where equal requests are answered alike."""
    service_tier: str | None = None
    """The tier that was used, where the caller asked for one."""


class Answer(ABC):
    """Shapes the outputs of one job. While streaming it remembers which choices have begun."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    has_plain_text: ClassVar[bool] = True
    """A chunk holds the text of its output as it is."""

    def __init__(self, job: Job, token_text: TokenText) -> None:
        self._job = job
        self._token_text = token_text
        self._begun: set[int] = set()
        self._scored: dict[int, tuple[TokenLogprob, ...]] = {}
        """Of each choice that has begun: the tokens of its prompt, from the second on, where it asked for them."""

    def whole(self, outputs: Mapping[int, RequestOutput]) -> Json:
        """The complete answer; ``outputs`` holds everything that was generated, by choice."""
        choices = [self._choice(index, self._apart(index, outputs[index])) for index in sorted(outputs)]
        return self._envelope(self.whole_object, choices) | {"usage": self.usage(outputs)}

    def chunk(self, index: int, output: RequestOutput) -> Json | None:
        """One event of a stream, None when there is nothing to say (part of a character, or of a stop string)."""
        is_first = index not in self._begun
        if not (is_first or output.text or output.logprobs or output.finish_reason):
            return None
        self._begun.add(index)
        return self._chunk(self._delta(index, self._apart(index, output), is_first))

    @property
    def usage_in_chunks(self) -> bool:
        """Each chunk tells the usage until then, so no two are alike but for their text."""
        return self._job.usage_in_chunks

    def _chunk(self, choice: Json) -> Json:
        chunk = self._envelope(self.chunk_object, [choice])
        return chunk | {"usage": None} if self._job.include_usage else chunk

    def usage_chunk(self, last: Mapping[int, RequestOutput]) -> Json:
        """The event after the last, for ``stream_options.include_usage``; ``last`` holds each choice's last output."""
        usage = self.usage(last) | {"charged_tokens": charged_tokens(last)}  # too late for a header
        return self._envelope(self.chunk_object, []) | {"usage": usage}

    def usage(self, outputs: Mapping[int, RequestOutput]) -> Json:
        """OpenAI's usage: a prompt counts once however many choices it has.

        The client's counter is charged for what is computed, which is the prompt of every sequence: n = 3 costs three
        prompts there, less what the prefix cache held when each began. Cached are those of the first choice.
        """
        requests, n = self._job.requests, self._job.n
        num_prompt = sum(request.num_input for request in requests[::n])
        num_output = sum(output.usage.num_output for output in outputs.values())
        num_cached = sum(output.usage.num_cached for index, output in outputs.items() if index % n == 0)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _envelope(self, object_name: str, choices: list[Json]) -> Json:
        job = self._job
        tier = {} if job.service_tier is None else {"service_tier": job.service_tier}
        return {
            "id": job.response_id,
            "object": object_name,
            "created": job.created_s,
            "model": job.model,
            "system_fingerprint": job.fingerprint or None,
            **tier,
            "choices": choices,
        }

    def _apart(self, index: int, output: RequestOutput) -> RequestOutput:
        """``output`` without the log probabilities of the prompt, which come before those of its first output."""
        request = self._job.requests[index]
        if index in self._scored or not request.scores_prompt:
            return output
        num = request.num_input - 1
        self._scored[index] = output.logprobs[:num]
        return replace(output, logprobs=output.logprobs[num:])

    def _listed(self, index: int) -> Json:
        """vLLM's ``prompt_logprobs``, where it was asked for."""
        num_top = self._job.prompt_logprobs
        if num_top is None:
            return {}
        return {"prompt_logprobs": listed(self._scored[index], num_top, self._token_text)}

    def _wants_logprobs(self, index: int) -> bool:
        return self._job.requests[index].sampling.logprobs is not None

    @abstractmethod
    def _choice(self, index: int, output: RequestOutput) -> Json: ...

    @abstractmethod
    def _delta(self, index: int, output: RequestOutput, is_first: bool) -> Json: ...


class ChatAnswer(Answer):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, outputs: Mapping[int, RequestOutput]) -> Json:
        return super().whole(outputs) | self._listed(0)

    def _choice(self, index: int, output: RequestOutput) -> Json:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message} | self._rest(index, output)

    def _delta(self, index: int, output: RequestOutput, is_first: bool) -> Json:
        delta: Json = {"role": "assistant", "content": output.text} if is_first else {"content": output.text}
        return {"index": index, "delta": delta} | self._rest(index, output)

    def _rest(self, index: int, output: RequestOutput) -> Json:
        logprobs = None
        if self._wants_logprobs(index):
            logprobs = {"content": [scored(one, self._token_text) for one in output.logprobs], "refusal": None}
        return {"logprobs": logprobs} | _ending(output)


class CompletionAnswer(Answer):
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, job: Job, token_text: TokenText) -> None:
        super().__init__(job, token_text)
        self._num_chars = [0] * len(job.requests)

    def _choice(self, index: int, output: RequestOutput) -> Json:
        return {
            "index": index,
            "text": output.text,
            "logprobs": self._logprobs(index, output.logprobs) if self._wants_logprobs(index) else None,
        } | (_ending(output) | self._listed(index))

    def _delta(self, index: int, output: RequestOutput, is_first: bool) -> Json:
        return self._choice(index, output)

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> Json:
        """Offsets count characters of the tokens' texts since the beginning of the choice."""
        tokens, offsets, tops = [], [], []
        for one in logprobs:
            text = self._token_text(one.token_id)[0]
            tokens.append(text)
            offsets.append(self._num_chars[index])
            self._num_chars[index] += len(text)
            # OpenAI: the chosen token is always among them, so there may be logprobs + 1.
            top = {self._token_text(token_id)[0]: max(MIN_LOGPROB, logprob) for token_id, logprob in one.top}
            tops.append({text: max(MIN_LOGPROB, one.logprob)} | top)
        return {
            "tokens": tokens,
            "token_logprobs": [max(MIN_LOGPROB, one.logprob) for one in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def scored(one: TokenLogprob, token_text: TokenText) -> Json:
    """One token of an answer, as chats list them."""

    def entry(token_id: int, logprob: float) -> Json:
        text, data = token_text(token_id)
        return {"token": text, "logprob": max(MIN_LOGPROB, logprob), "bytes": data}

    top = [entry(token_id, logprob) for token_id, logprob in one.top]
    return entry(one.token_id, one.logprob) | {"top_logprobs": top}


def _ending(output: RequestOutput) -> Json:
    """``stop_reason`` is vLLM's addition: the stop string or token id that ended the text."""
    if output.finish_reason is None:
        return {"finish_reason": None}
    return {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}


def listed(scored: Sequence[TokenLogprob], num_top: int, token_text: TokenText) -> list[Json | None]:
    """vLLM's ``prompt_logprobs``: for each token of the prompt what was likely there, by token id, itself included;
    null for the first. ``rank`` is null where a token is not among the ``num_top`` most likely."""
    return [None, *(_ranked(one, num_top, token_text) for one in scored)]


def _ranked(one: TokenLogprob, num_top: int, token_text: TokenText) -> Json:
    def entry(token_id: int, logprob: float, rank: int | None) -> Json:
        return {"logprob": max(MIN_LOGPROB, logprob), "rank": rank, "decoded_token": token_text(token_id)[0]}

    top = one.top[:num_top]
    rank = next((rank for rank, (token_id, _) in enumerate(one.top, 1) if token_id == one.token_id), None)
    shown = {str(one.token_id): entry(one.token_id, one.logprob, rank)}
    return shown | {str(token_id): entry(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(top, 1)}
