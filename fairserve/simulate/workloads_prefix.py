"""Workloads whose prompts share long beginnings, as DLPM's do (arXiv 2501.14312): chats and trees of thought."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import count

from fairserve.config import NonNegativeFloat, PositiveFloat, PositiveInt
from fairserve.errors import ConfigError
from fairserve.simulate.records import PREFIX_BLOCK, Arrival
from fairserve.simulate.workloads_basic import Length, draw, merge


@dataclass(frozen=True, slots=True)
class Text:
    """A text known only by the names of its pieces: equal pieces at the start give equal hashes."""

    num_tokens: int = 0
    prefix: tuple[int, ...] = ()
    """One hash per whole block of PREFIX_BLOCK tokens; each covers all before it. See ``Arrival.prefix``."""
    rest: tuple[tuple[str, int, int], ...] = ()
    """(piece, first token, end) of the tokens after the last whole block."""

    def plus(self, piece: str, num_tokens: int) -> Text:
        """This text with a piece of ``num_tokens`` tokens after it. A name stands for one content."""
        hashes, rest = list(self.prefix), list(self.rest)
        at, free = 0, PREFIX_BLOCK - self.num_tokens % PREFIX_BLOCK
        while num_tokens - at >= free:
            rest.append((piece, at, at + free))
            seed = f"{hashes[-1] if hashes else 0} {rest}".encode()
            hashes.append(int.from_bytes(hashlib.blake2b(seed, digest_size=7).digest(), "big"))
            rest, at, free = [], at + free, PREFIX_BLOCK
        if at < num_tokens:
            rest.append((piece, at, num_tokens))
        return Text(self.num_tokens + num_tokens, tuple(hashes), tuple(rest))


def shared_prefix(
    rng: random.Random,
    *,
    rates: tuple[PositiveFloat, ...] = (0.1, 0.1, 0.1, 0.4),
    weights: tuple[PositiveFloat, ...] = (),
    system_tokens: PositiveInt = 512,
    num_templates: PositiveInt = 2,
    template_tokens: PositiveInt = 512,
    turns: Length = (1, 6),
    question_tokens: Length = (16, 128),
    answer_tokens: Length = (32, 256),
    think_s: PositiveFloat = 10.0,
    end_s: PositiveFloat = 600.0,
) -> list[Arrival]:
    """Chats. ``rates``: sessions per second of each client. Every prompt of a client begins with its system prompt;
    then comes one of its few-shot templates, chosen per session; then all turns so far; then a question. The next turn
    comes an exponential time after the one before, ``think_s`` on average. A session is an interaction."""
    sessions = []
    for client, weight, start_s, name in _starts(rng, rates, weights, end_s):
        template = rng.randrange(num_templates)
        text = Text().plus(f"system {client}", system_tokens).plus(f"template {client} {template}", template_tokens)
        calls = []
        at_s = start_s
        for turn in range(draw(rng, turns)):
            text = text.plus(f"question {name} {turn}", draw(rng, question_tokens))
            num_output = draw(rng, answer_tokens)
            calls.append(_call(client, weight, name, turn, at_s, text, num_output))
            text = text.plus(f"answer {name} {turn}", num_output)
            at_s += rng.expovariate(1 / think_s)
        sessions.append([call for call in calls if call.arrival_s < end_s])
    return merge(*sessions)


def tree_of_thought(
    rng: random.Random,
    *,
    rates: tuple[PositiveFloat, ...] = (0.02, 0.02, 0.08),
    weights: tuple[PositiveFloat, ...] = (),
    system_tokens: PositiveInt = 512,
    problem_tokens: Length = (64, 256),
    branching: PositiveInt = 2,
    depth: PositiveInt = 3,
    thought_tokens: Length = (32, 128),
    level_s: PositiveFloat = 10.0,
    gap_s: NonNegativeFloat = 0.01,
    end_s: PositiveFloat = 600.0,
) -> list[Arrival]:
    """Trees. ``rates``: problems per second of each client. A problem is a root call and ``branching`` further calls
    below each call, down to ``depth`` levels; a call's prompt is all thoughts on its way to the root. Calls of a level
    come ``gap_s`` apart, the next level ``level_s`` later. A problem is an interaction, numbered level by level."""
    size = sum(branching**level for level in range(depth))
    if size > 10_000:
        raise ConfigError(f"branching {branching} and depth {depth} make {size} calls per problem; at most 10,000")
    problems = []
    for client, weight, start_s, name in _starts(rng, rates, weights, end_s):
        root = Text().plus(f"system {client}", system_tokens).plus(f"problem {name}", draw(rng, problem_tokens))
        level, calls, at_s = [root], list[Arrival](), start_s
        for _ in range(depth):
            below = []
            for text in level:
                num_output = draw(rng, thought_tokens)
                below += [text.plus(f"thought {name} {len(calls)}", num_output)] * branching
                calls.append(_call(client, weight, name, len(calls), at_s, text, num_output))
                at_s += gap_s
            level, at_s = below, at_s + level_s
        problems.append([call for call in calls if call.arrival_s < end_s])
    return merge(*problems)


def _starts(
    rng: random.Random, rates: tuple[float, ...], weights: tuple[float, ...], end_s: float
) -> list[tuple[str, float, float, str]]:
    """(client, weight, start_s, interaction), Poisson."""
    if weights and len(weights) != len(rates):
        raise ConfigError(f"{len(weights)} weights for the {len(rates)} clients of rates: give one each, or none")
    starts = []
    for num, (rate, weight) in enumerate(zip(rates, weights or [1.0] * len(rates), strict=True)):
        client, at_s, numbers = f"client-{num}", rng.expovariate(rate), count()
        while at_s < end_s:
            starts.append((client, weight, at_s, f"{client}/{next(numbers):04d}"))
            at_s += rng.expovariate(rate)
    return starts


def _call(
    client: str, weight: float, interaction: str, call_index: int, at_s: float, text: Text, num_output: int
) -> Arrival:
    return Arrival(
        request_id=f"{interaction}.{call_index:04d}",
        arrival_s=at_s,
        client=client,
        num_input=text.num_tokens,
        num_output=num_output,
        max_output=num_output,
        weight=weight,
        interaction=interaction,
        call_index=call_index,
        prefix=text.prefix,
    )
