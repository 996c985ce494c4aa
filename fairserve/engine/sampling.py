"""From logits to tokens, for all rows of a step at once.

Order of the changes to a row (transformers' generation): biases, penalties, what may not come next (``rules.py``),
temperature, top_k, top_p, min_p. A token is drawn by inverse transform with one uniform number per output token from
the request's own ``random.Random``: which token comes out depends on the row's logits, its parameters and its seed,
never on the other rows or on the device.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairserve.engine.drawing import inverse_transform, log_total, weights_of
from fairserve.engine.grammar import Grammars
from fairserve.engine.prompt_rows import PromptRows
from fairserve.engine.request import GenerateRequest, SamplingParams, TokenLogprob
from fairserve.engine.rules import Rules, addends, allowed_of, needs_rules

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: dividing by them gains nothing but overflow."""
_CANDIDATES = 1024
"""Tokens sorted at first for top_k and top_p; a whole vocabulary is sorted only for rows that need more."""


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    """-1 where the chunk does not sample, and only its ``prompt`` was read."""
    logprob: TokenLogprob | None = None
    prompt: PromptRows | None = None
    ends: bool = False
    """The output is whole with this token: its grammar allows no more."""
    error: str | None = None
    """Why this request gets no token, now or later: its own rules leave none."""


class _Row:
    """What the sampler keeps for one request between steps."""

    def __init__(self, request: GenerateRequest, seed: int, rules: Rules | None) -> None:
        p = request.sampling
        self.params: SamplingParams = p
        self.random = random.Random(seed)
        self.greedy = p.temperature < GREEDY_BELOW
        self.repeats = p.repetition_penalty != 1.0
        self.counts_output = p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        self.sorts = p.top_k > 0 or p.top_p < 1.0
        self.rules = rules
        changes = self.repeats or self.counts_output or p.logit_bias or rules is not None
        self.plain = self.greedy and not changes and p.logprobs is None
        self.prompt = tuple(set(request.prompt_token_ids)) if self.repeats else ()
        before = request.prompt_token_ids[request.num_prompt :]
        self.output: Counter[int] = Counter(before)
        for _ in before:  # each took one number, so that the next is the one that it would have been
            self.random.random()
        self._chance: float | None = None

    def chance(self) -> float:
        """The uniform number of the next token: the same until a token is taken, so that a step may be run again."""
        if self._chance is None:
            self._chance = self.random.random()
        return self._chance

    def take(self, token: int) -> bool:
        """Whether the output is whole with it."""
        self._chance = None
        if self.repeats or self.counts_output:
            self.output[token] += 1
        return self.rules is not None and self.rules.take(token)


class Sampler:
    """Per-request state (seeded chance, counted output, place in a grammar) and the vectorised choice."""

    def __init__(self, grammars: Grammars | None = None, eos: frozenset[int] = frozenset()) -> None:
        self.grammars = grammars or Grammars()
        self._eos = eos
        self._rows: dict[str, _Row] = {}

    def add(self, request: GenerateRequest, seed: int) -> None:
        """
        Raises:
            InvalidRequest: its grammar cannot be used.
        """
        rules = Rules(request, self.grammars, self._eos) if needs_rules(request) else None
        self._rows[request.request_id] = _Row(request, seed, rules)

    def drop(self, request_id: str) -> None:
        self._rows.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._rows)

    def num_prompt_logprobs(self, request_id: str) -> int:
        """Alternatives for each token of its prompt."""
        return self._rows[request_id].params.prompt_logprobs or 0

    def sample(self, logits: Tensor, request_ids: Sequence[str], draws: Sequence[bool]) -> dict[str, Sampled | None]:
        """One token per row of ``logits`` [R, vocabulary] that draws, None for the others; a row that is not finite is
        left out. Changes no state when it raises."""
        tokens = _best(logits)
        sampled: dict[str, Sampled | None] = {request_ids[i]: None for i, token in enumerate(tokens) if token >= 0}
        drawn = [i for i, token in enumerate(tokens) if token >= 0 and draws[i]]
        rows = [self._rows[request_ids[i]] for i in drawn]
        if all(row.plain for row in rows):
            sampled.update((request_ids[i], Sampled(tokens[i])) for i in drawn)
            return sampled
        sampled.update((request_ids[i], Sampled(tokens[i])) for i, row in zip(drawn, rows, strict=True) if row.plain)
        drawn, rows = [i for i, row in zip(drawn, rows, strict=True) if not row.plain], [r for r in rows if not r.plain]
        if len(drawn) < len(tokens):
            logits = logits[drawn]
        chosen = _choose(logits.float(), rows)
        for i, row, one in zip(drawn, rows, chosen, strict=True):
            if one.error is None and row.take(one.token_id):
                one = replace(one, ends=True)
            sampled[request_ids[i]] = one
        return sampled


def _argmax(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(axis=-1))  # torch's own takes 4 to 20 times as long on a CPU
    return scores.argmax(dim=-1)


def _best(logits: Tensor) -> list[int]:
    """The token of the highest logit in each row, -1 where it is not finite: NaN and inf both show in the maximum."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        best = _argmax(logits)
        highest = logits.gather(1, best.unsqueeze(1)).squeeze(1)
    else:
        highest, best = logits.max(dim=-1)
    tokens: list[int] = torch.where(torch.isfinite(highest), best, -1).tolist()  # one copy from the device
    return tokens


def _choose(raw: Tensor, rows: list[_Row]) -> list[Sampled]:
    """``raw``: float32 [R, vocabulary], finite maxima."""
    scores = _penalised(_biased(raw, rows), rows)
    tokens = _argmax(scores).tolist() if any(row.greedy for row in rows) else [0] * len(rows)
    scores, failed = _ruled(scores, rows, tokens)
    for sorts, draw in ((False, _draw), (True, _draw_sorted)):
        index = [i for i, row in enumerate(rows) if not row.greedy and row.sorts == sorts]
        if index:
            part = scores if len(index) == len(rows) else scores[index]
            drawn = draw(_tempered(part, [rows[i] for i in index], part is not raw), [rows[i] for i in index])
            for i, token in zip(index, drawn.tolist(), strict=True):
                tokens[i] = token
    logprobs = _logprobs(raw, rows, tokens)
    return [Sampled(token, next(logprobs), error=failed.get(i)) for i, token in enumerate(tokens)]


def _biased(raw: Tensor, rows: list[_Row]) -> Tensor:
    biases = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.params.logit_bias]
    if not biases:
        return raw
    where, token_ids, bias = zip(*biases, strict=True)
    at = (torch.tensor(where, device=raw.device), torch.tensor(token_ids, device=raw.device))
    return raw.index_put(at, torch.tensor(bias, dtype=raw.dtype, device=raw.device), accumulate=True)


def _ruled(scores: Tensor, rows: list[_Row], best: list[int]) -> tuple[Tensor, dict[int, str]]:
    """Minus infinity where a row's rules forbid a token, in a copy; and by row why they leave none.

    ``best``: each greedy row's best token, corrected here. One whose best token is allowed stays as it is: for most
    of a model's tokens that saves all work on the whole vocabulary.
    """
    ruled = [(i, row.rules) for i, row in enumerate(rows) if row.rules is not None]
    if not ruled:
        return scores, {}
    allowed, why = allowed_of([rules for _, rules in ruled], scores.shape[-1])
    failed = {ruled[k][0]: error for k, error in why.items()}
    cut = [k for k, (i, _) in enumerate(ruled) if not (rows[i].greedy and allowed[k, best[i]])]
    if not cut:
        return scores, failed
    index = [ruled[k][0] for k in cut]
    allowed = allowed if len(cut) == len(ruled) else allowed[cut]
    part = _masked(scores if len(cut) == len(rows) else scores[index], allowed)
    dead = part.amax(dim=-1, keepdim=True) == float("-inf")
    if dead.any():  # the model gives no chance to any that is left: all have the same; a row without any is told apart
        may = torch.from_numpy(allowed).to(scores.device)
        part = torch.where(dead & (may | ~may.any(dim=-1, keepdim=True)), 0.0, part)
    if any(rows[i].greedy for i in index):
        for i, token in zip(index, _argmax(part).tolist(), strict=True):
            best[i] = token
    return (part if len(cut) == len(rows) else scores.index_copy(0, _index(index, scores), part)), failed


def _masked(scores: Tensor, allowed: NDArray[np.bool_]) -> Tensor:
    """A copy with minus infinity where a token is not ``allowed``."""
    if scores.device.type != "cpu":
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), float("-inf"))
    added = torch.from_numpy(addends(allowed))  # torch's own masking takes five times as long on a CPU
    return added[:, : scores.shape[-1]].add_(scores)


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _penalised(raw: Tensor, rows: list[_Row]) -> Tensor:
    """Repetition penalty over prompt and output, then frequency and presence penalty over the output."""
    where: list[int] = []
    token_ids: list[int] = []
    repetition: list[float] = []
    subtract: list[float] = []
    for i, row in enumerate(rows):
        p = row.params
        seen = row.output.keys() | row.prompt
        for token in seen if row.repeats else row.output if row.counts_output else ():
            count = row.output[token] if row.counts_output else 0
            where.append(i)
            token_ids.append(token)
            repetition.append(p.repetition_penalty)
            subtract.append(p.frequency_penalty * count + (p.presence_penalty if count else 0.0))
    if not where:
        return raw
    at = (torch.tensor(where, device=raw.device), torch.tensor(token_ids, device=raw.device))
    penalty = torch.tensor(repetition, device=raw.device)
    values = raw[at]
    values = torch.where(values > 0, values / penalty, values * penalty)
    values -= torch.tensor(subtract, device=raw.device)
    return raw.clone().index_put_(at, values)


def _tempered(scores: Tensor, rows: list[_Row], may_overwrite: bool) -> Tensor:
    """Scores over temperature, largest 0: no temperature can overflow it."""
    highest = scores.amax(dim=-1, keepdim=True)
    scores = scores.sub_(highest) if may_overwrite else scores - highest
    if all(row.params.temperature == 1.0 for row in rows):
        return scores
    return scores.div_(_column([row.params.temperature for row in rows], scores))


def _draw(scores: Tensor, rows: list[_Row]) -> Tensor:
    """Token ids [R], drawn from softmax(scores) cut by min_p. The largest score is 0. Overwrites ``scores``."""
    kept = weights_of(scores)
    if any(row.params.min_p > 0.0 for row in rows):
        kept.masked_fill_(kept < _column([row.params.min_p for row in rows], scores), 0.0)
    return inverse_transform(kept, [row.chance() for row in rows])


def _draw_sorted(scores: Tensor, rows: list[_Row]) -> Tensor:
    """Token ids [R], drawn after top_k, top_p and min_p."""
    vocabulary = scores.shape[-1]
    top_k = [min(row.params.top_k or vocabulary, vocabulary) for row in rows]  # no float holds 10**400
    total = log_total(scores)
    size = min(_CANDIDATES, vocabulary)
    values, ids = scores.topk(size, dim=-1)
    covered = weights_of(values - total).sum(dim=-1).tolist()
    if any(k > size and row.params.top_p > mass - 1e-4 for k, row, mass in zip(top_k, rows, covered, strict=True)):
        values, ids = scores.sort(dim=-1, descending=True)
    beyond = torch.arange(values.shape[-1], device=scores.device) >= _column(top_k, scores)
    values = values.masked_fill(beyond, float("-inf"))
    # Renormalised over the k best where there is a k, else over the whole vocabulary, sorted or not.
    cut = torch.tensor([[k < vocabulary] for k in top_k], device=scores.device)
    probabilities = weights_of(values - torch.where(cut, log_total(values), total))
    before = probabilities.cumsum(dim=-1) - probabilities
    # 2.0 switches top_p off: the sum of many small numbers may pass 1.
    dropped = before >= _column([2.0 if row.params.top_p >= 1.0 else row.params.top_p for row in rows], scores)
    dropped |= probabilities < probabilities[:, :1] * _column([row.params.min_p for row in rows], scores)
    dropped[:, 0] = False
    drawn = inverse_transform(probabilities.masked_fill_(dropped, 0.0), [row.chance() for row in rows])
    return ids.gather(1, drawn.unsqueeze(1)).squeeze(1)


def _logprobs(raw: Tensor, rows: list[_Row], tokens: list[int]) -> Iterator[TokenLogprob | None]:
    """Log probabilities under the unmodified model, for the rows that asked."""
    index = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not index:
        yield from [None] * len(rows)
        return
    logprobs = raw[index].log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor([[tokens[i]] for i in index], device=raw.device)).squeeze(1).tolist()
    widest = min(max(rows[i].params.logprobs or 0 for i in index), raw.shape[-1])
    values, ids = (t.tolist() for t in logprobs.topk(widest, dim=-1))
    at = {row: k for k, row in enumerate(index)}
    for i, row in enumerate(rows):
        k = at.get(i)
        if k is None:
            yield None
        else:
            top = tuple(zip(ids[k], values[k], strict=True))[: row.params.logprobs]
            yield TokenLogprob(tokens[i], chosen[k], top)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
