"""One request on its way through more than one replica: what each is sent, and what the caller sees of it.

A replica that dies, or gives a request back, is followed by another. What had not started is sent again as it was.
What had started goes on, where that is wanted, behind the tokens that its caller has: they are computed again and
charged like cached input, for the client has paid for them once. Greedy output is what one replica would have made;
so is sampled output with a seed, because the chance of each token is the seed's and its position's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fairserve.engine.request import GenerateRequest, RequestOutput


@dataclass(slots=True)
class Continuation:
    """``continues``: requests that have started go on elsewhere, too. ``max_deaths``: replicas that may die of (or
    under) this request before its caller is told, so that one that kills them cannot have them all."""

    original: GenerateRequest
    continues: bool = False
    max_deaths: int = 1
    request: GenerateRequest = field(init=False)
    """What to send now."""
    replaces: str | None = None
    """Id under which an earlier replica had it."""
    num_returns: int = 0
    _num_tries: int = 1
    _num_deaths: int = 0
    _has_started: bool = False
    """Where it is now."""
    _has_output: bool = False
    _num_cached: int = 0
    _num_made: int = 0
    """Output tokens that the caller has."""
    _num_before: int = 0
    """Of them, made by earlier replicas."""
    _made: list[int] = field(default_factory=list)
    _waited_s: float | None = None

    def __post_init__(self) -> None:
        self.request = self.original

    def took(self, output: RequestOutput) -> RequestOutput | None:
        """What the caller sees of it, as of one request on one replica; None for what only says that it started."""
        self._has_started = True
        if not self._has_output and output.waited_s is not None:
            self._waited_s = output.waited_s
        if not output.token_ids and output.finish_reason is None:
            return None
        usage = output.usage
        if self.request.num_generated is None:
            self._num_cached = usage.num_cached
        self._num_made = self._num_before + usage.num_output
        if self.continues:
            self._made += output.token_ids
        seen = replace(
            output,
            request_id=self.original.request_id,
            usage=replace(
                usage,
                num_input=usage.num_input if self.request.num_generated is None else self.original.num_input,
                num_cached=self._num_cached,
                num_output=self._num_made,
            ),
            waited_s=self._waited_s,
        )
        self._waited_s, self._has_output = None, True
        return seen

    def returned(self) -> None:
        """The replica gave it back unserved: send it again."""
        self.num_returns += 1
        self._try_again(self.request)

    def died(self) -> bool:
        """The replica is gone. Whether to send it again."""
        self._num_deaths += 1
        if self._num_deaths > self.max_deaths:
            return False
        if not self._has_started:
            self._try_again(self.request)
            return True
        if not self.continues:
            return False
        first, made = self.original, tuple(self._made)
        assert len(made) == self._num_made < max(1, first.sampling.max_tokens), "it had ended"
        sampling = replace(first.sampling, max_tokens=first.sampling.max_tokens - len(made))
        prompt = first.prompt_token_ids + made
        self._try_again(replace(first, prompt_token_ids=prompt, sampling=sampling, num_generated=len(made)))
        return True

    def _try_again(self, request: GenerateRequest) -> None:
        """Under a new id: what is still said of the old one is not about this try."""
        self.replaces = self.request.request_id
        self.request = replace(request, request_id=f"{self.original.request_id}~{self._num_tries}")
        self._num_tries += 1
        self._num_before = self._num_made
        self._has_started = False
