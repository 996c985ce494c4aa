"""How much one step may hold: what was configured, less where memory ran out or time would."""

from __future__ import annotations

from fairserve.engine.pace import Pace

LEAST_PROMPT_TOKENS = 16
"""Of a step that would take longer than it should whatever it holds: prompts go on, however slowly."""
PATIENCE_STEPS, MAX_PATIENCE_STEPS = 100, 6400


class StepBudget:
    """Tokens of a step and requests that run at the same time.

    Both shrink when a step runs out of memory and double, up to what was configured, after ``PATIENCE_STEPS`` steps
    that went well. They grow back because the shortage may have been somebody else's (another process on the device) or
    one unusual batch's, and a replica lives for weeks; slowly, and twice as slowly with each shortage (at the most
    every ``MAX_PATIENCE_STEPS``), because trying in vain costs a step.
    """

    def __init__(self, max_tokens: int, max_requests: int, max_step_s: float | None = None) -> None:
        """``max_step_s``: what a step with decodes in it should take at most; None: no limit."""
        # All decodes go first; with fewer tokens than requests some of them would starve.
        self.max_tokens = self.tokens = max(max_tokens, max_requests)
        self.max_requests = self.requests = max_requests
        self._wait_steps, self._next_wait_steps = 0, PATIENCE_STEPS
        self._num_well = 0
        self._is_new_shortage = True
        self._max_step_s = max_step_s
        self._pace = Pace()

    def prompt_tokens(self, num_decodes: int) -> int:
        """Prompt tokens that a step may hold beside ``num_decodes``; without decodes nobody waits for its end."""
        room = self.tokens - num_decodes
        if self._max_step_s is None or num_decodes == 0:
            return room
        return int(min(room, max(self._pace.tokens_within(self._max_step_s), LEAST_PROMPT_TOKENS)))

    def took(self, num_prompt_tokens: int, step_s: float) -> None:
        """How long a step was."""
        self._pace.saw(num_prompt_tokens, step_s)

    @property
    def least_tokens(self) -> int:
        """One for each request that may run: every prompt goes on, however slowly."""
        return self.max_requests

    def halve_tokens(self, num_tokens: int) -> bool:
        """A step of ``num_tokens`` was too large; False when fewer cannot be asked for."""
        tokens = max(min(self.tokens, num_tokens) // 2, self.least_tokens)
        if tokens >= min(self.tokens, num_tokens):
            return False
        self.tokens = tokens
        self._became_short()
        return True

    def limit_requests(self, num_requests: int) -> None:
        """More than ``num_requests`` were too many."""
        self.requests = max(1, num_requests)
        self._became_short()

    def went_well(self) -> None:
        """A step was computed."""
        self._is_new_shortage = True
        if self.tokens == self.max_tokens and self.requests == self.max_requests:
            return
        self._num_well += 1
        if self._num_well >= self._wait_steps:
            self._num_well = 0
            self.tokens = min(2 * self.tokens, self.max_tokens)
            self.requests = min(2 * self.requests, self.max_requests)

    def _became_short(self) -> None:
        if self._is_new_shortage:
            self._wait_steps = self._next_wait_steps
            self._next_wait_steps = min(2 * self._wait_steps, MAX_PATIENCE_STEPS)
        self._is_new_shortage = False
        self._num_well = 0
