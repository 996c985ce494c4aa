"""The attacks: who else is there, what the attacker would send as an honest client, and what it sends instead.

Every attack is a function from the requests of the honest attacker to those of the dishonest one, so that both want the
same. A world is a crowd that asks for about 1.75 times what two replicas can give: two victims ask for more than their
share (busy), two for less (modest), and the attacker for more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from fairserve.simulate.records import Arrival, RequestRecord
from fairserve.simulate.workloads_basic import Length, merge, poisson, split

DURATION_S = 180.0
ATTACKER = "mallory"
MODEST = ("modest-0", "modest-1")
BUSY = ("busy-0", "busy-1")
INPUT, OUTPUT = (512, 1536), (16, 112)
"""Tokens of an ordinary request: 1,024 and 64 on average, 1,152 of service."""
CAPACITY = 3.5
"""Ordinary requests per second that the cluster finishes."""
SHARES = {"modest-0": 0.1, "modest-1": 0.1, "busy-0": 0.5, "busy-1": 0.5, ATTACKER: 0.55}
"""What each asks for, over what the cluster can give. Fair among these: 0.1 to the modest, 0.27 to the others."""
WARM_UP_S = 30.0
"""Whoever asks for more has more of the idle cluster's room, once; by then nobody has it any longer."""
BURST_S = 90.0
"""When whoever was silent comes back."""

Requests = list[Arrival]


def is_attacker(client: str) -> bool:
    return client.startswith(ATTACKER)


# -- worlds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """Everybody's requests when everybody is honest."""

    victims: Requests
    attacker: Requests


def overload(seed: str) -> World:
    return _world(seed)


def paused(seed: str) -> World:
    """The victims ask for less than the cluster gives at first, then all pause: nobody waits when the burst comes."""
    world, rng = _world(seed), random.Random(f"{seed} pause")
    victims = [one for one in world.victims if one.arrival_s >= BURST_S or (rng.random() < 0.65 and _is_early(one))]
    return World(victims, [one for one in world.attacker if one.arrival_s >= BURST_S or _is_early(one)])


def _is_early(one: Arrival) -> bool:
    return one.arrival_s < BURST_S - 25


def long_answers(seed: str) -> World:
    """The attacker asks short questions with long answers: nearly all of a request's cost comes after it was picked."""
    return _world(seed, (32, 96), (400, 600))


def long_prompts(seed: str) -> World:
    """The attacker wants one token for each long prompt, and says so."""
    return _world(seed, (512, 2048), 1)


def all_lengths(seed: str) -> World:
    """The attacker's answers have 16 tokens or up to 800."""
    return _world(seed, (32, 96), (16, 800))


def applications(seed: str) -> World:
    """busy-0 writes reports, twice as large as what the others chat; the attacker chats."""
    world = _world(seed)
    reports = _client(f"{seed} reports", "busy-0", SHARES["busy-0"], (1024, 3072), (32, 224), application="report")
    chats = [replace(one, application="chat") for one in world.victims if one.client != "busy-0"]
    return World(merge(reports, chats), [replace(one, application="chat") for one in world.attacker])


def tasks(seed: str) -> World:
    """Interactions of three calls, a second apart."""
    world = _world(seed)
    return World(merge(*(in_tasks(_of(world.victims, name)) for name in (*MODEST, *BUSY))), in_tasks(world.attacker))


def in_tasks(requests: Sequence[Arrival], num_calls: int = 3) -> Requests:
    return [
        replace(
            one,
            arrival_s=requests[num - num % num_calls].arrival_s + num % num_calls,
            interaction=f"task-{num // num_calls}",
            call_index=num % num_calls,
        )
        for num, one in enumerate(requests)
    ]


def _world(seed: str, num_input: Length = INPUT, num_output: Length = OUTPUT) -> World:
    victims = merge(*(_client(f"{seed} {name}", name, SHARES[name]) for name in (*MODEST, *BUSY)))
    return World(victims, _client(f"{seed} {ATTACKER}", ATTACKER, SHARES[ATTACKER], num_input, num_output))


def _client(
    seed: str, name: str, share: float, num_input: Length = INPUT, num_output: Length = OUTPUT, application: str = ""
) -> Requests:
    """Poisson requests that are worth ``share`` of the cluster, whatever their size."""
    size = (_mean(INPUT) + 2 * _mean(OUTPUT)) / (_mean(num_input) + 2 * _mean(num_output))
    made = poisson(
        random.Random(seed),
        client=name,
        rate=share * CAPACITY * size,
        num_input=num_input,
        num_output=num_output,
        end_s=DURATION_S,
    )
    return [replace(one, application=application) for one in made]


def _mean(length: Length) -> float:
    return float(length) if isinstance(length, int) else sum(length) / 2


def _of(requests: Sequence[Arrival], client: str) -> Requests:
    return [one for one in requests if one.client == client]


# -- attacks -----------------------------------------------------------------------------------------------------------


def flood(requests: Requests) -> Requests:
    """Four times as much. The only attack that wants more than the honest client."""
    return merge(*[requests] * 4)


def sleep_then_burst(requests: Requests) -> Requests:
    """Silent until ``BURST_S``; then all that was saved up, at once, and the rest as ever."""
    return [replace(one, arrival_s=max(one.arrival_s, BURST_S)) for one in requests]


def fifty_at_once(requests: Requests) -> Requests:
    """A newcomer sends its next fifty requests in one moment, before the first of them was charged a single token."""
    return [replace(one, arrival_s=BURST_S) for one in requests if one.arrival_s >= BURST_S][:50]


def sybil(num_keys: int) -> Callable[[Requests], Requests]:
    """The same requests under many keys of one tenant: TENANT/key."""
    return lambda requests: split(requests, num_keys)


def abort_after_prefill(requests: Requests) -> Requests:
    """Asks for a long answer, takes its first token and goes."""
    return [replace(one, num_output=512, max_output=512, cancel_after=1) for one in requests]


def tiny(requests: Requests, num_parts: int = 16) -> Requests:
    """Each request in 16 parts: the same tokens, 64 and 4 at a time."""
    return merge(*(_parts(one, num_parts) for one in requests))


def _parts(one: Arrival, num_parts: int) -> Requests:
    num_parts = min(num_parts, one.num_output)
    return [
        replace(one, request_id=f"{one.request_id}.{part}", num_input=num_in, num_output=num_out, max_output=num_out)
        for part, num_in, num_out in zip(
            range(num_parts), _dealt(one.num_input, num_parts), _dealt(one.num_output, num_parts), strict=True
        )
    ]


def _dealt(total: int, num_parts: int) -> list[int]:
    return [total // num_parts + (part < total % num_parts) for part in range(num_parts)]


def ask_for_too_much(requests: Requests) -> Requests:
    """max_tokens of 4,096 for answers of 64."""
    return [replace(one, max_output=4096) for one in requests]


PIECE = 32
AGAIN = "+"
"""In the id of a request that repeats the prompt of another."""


def ask_for_too_little(requests: Requests) -> Requests:
    """max_tokens of 32, then the next 32 with the prompt and what there is so far, and so on; all pieces are sent at
    once, which no real caller could. It looks cheap to whoever foretells lengths."""
    return merge(*(_pieces(one) for one in requests))


def _pieces(one: Arrival) -> Requests:
    return [
        replace(
            one,
            request_id=f"{one.request_id}{AGAIN * bool(part)}{part}",
            num_input=one.num_input + part * PIECE,
            num_output=(left := min(PIECE, one.num_output - part * PIECE)),
            max_output=left,
        )
        for part in range(ceil(one.num_output / PIECE))
    ]


def short_then_long(requests: Requests) -> Requests:
    """The same requests in another order: in each 30 s those with short answers first, to teach the predictor, then the
    long ones."""
    by_window: dict[int, Requests] = {}
    for one in requests:
        by_window.setdefault(int(one.arrival_s // 30), []).append(one)
    return [
        replace(one, arrival_s=slot.arrival_s)
        for window in by_window.values()
        for slot, one in zip(window, sorted(window, key=lambda one: one.num_output), strict=True)
    ]


def forge_label(requests: Requests) -> Requests:
    """Chats are called reports."""
    return [replace(one, application="report") for one in requests]


def endless_task(requests: Requests) -> Requests:
    """All calls belong to one interaction."""
    return [replace(one, interaction="the-one", call_index=num) for num, one in enumerate(requests)]


def false_index(requests: Requests) -> Requests:
    """From ``BURST_S`` on every call claims to be in the middle of an interaction, a new one each time. (For its first
    minute an authority believes that: its predecessor may have accepted the first call.)"""
    return [
        replace(one, interaction=f"lie-{num}", call_index=7) if one.arrival_s >= BURST_S else one
        for num, one in enumerate(requests)
    ]


def merged(requests: Requests, num_merged: int = 4) -> Requests:
    """Four requests in one, so that what is counted by the request costs a quarter."""
    groups = [requests[i : i + num_merged] for i in range(0, len(requests), num_merged)]
    return [
        replace(
            group[-1],
            num_input=sum(one.num_input for one in group),
            num_output=(num_output := sum(one.num_output for one in group)),
            max_output=num_output,
        )
        for group in groups
    ]


Surroundings = tuple[Callable[[str], World], int | None, tuple[tuple[str, float], ...]]


@dataclass(frozen=True, slots=True)
class Attack:
    name: str
    world: Callable[[str], World]
    forge: Callable[[Requests], Requests]
    columns: tuple[str, ...]
    """Policies (see ``attacks.COLUMNS``) that can tell the attack from honest behaviour; to the others it is the same
    run."""
    is_one_time: bool = False
    """What it may gain is one lead, and does not grow with time: it is compared with the bound in absolute service."""
    window_s: tuple[float, float] = (WARM_UP_S, DURATION_S)
    """In which service is counted."""
    client_limit: int | None = None
    """Of throttling, where the policy throttles: requests a minute. Fair is 56."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """Policy wsc: what the operator says of applications."""
    known: str = ""
    """Why ours does not hold, where that is known."""

    @property
    def surroundings(self) -> Surroundings:
        """Attacks that share it share the honest run."""
        return self.world, self.client_limit, tuple(self.expected.items())

    def arrivals(self, seed: int, *, honest: bool, knows_tenants: bool = True) -> Requests:
        """Without tenants the keys of one are strangers to each other."""
        world = self.world(str(seed))
        mine = world.attacker if honest else self.forge(world.attacker)
        if not knows_tenants:
            mine = [replace(one, client=one.client.replace("/", ".")) for one in mine]
        return merge(world.victims, mine)


def useful_input(record: RequestRecord) -> int:
    """Prompt tokens, without those that an attacker had to send again to get what it wanted."""
    return 0 if AGAIN in record.arrival.request_id else record.num_input


NO_NAMES = ("rpm", "published", "vtc", "vtc+mean")
ALL = ("fcfs", *NO_NAMES)
LENGTHS = ("vtc", "vtc+mean")
LABELS = ("published wsc", "wsc")

EXPECTED = {"chat": 1152.0, "report": 2304.0}
LEARNED = "what an application is worth is learned from all its requests, so whoever may use the label moves it"
THROTTLE = "the calls of a begun interaction are never throttled (300 calls or 600 s of one id), and victims are"

_LATER = (BURST_S, DURATION_S)
_AT_ONCE = (BURST_S, BURST_S + 30)
ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("flood: four times as much", overload, flood, ALL),
        Attack("idle, then burst", overload, sleep_then_burst, ALL, is_one_time=True, window_s=_LATER),
        Attack("the same into an empty queue", paused, sleep_then_burst, ALL, is_one_time=True, window_s=_LATER),
        Attack("50 long requests at once", long_answers, fifty_at_once, ALL, is_one_time=True, window_s=_AT_ONCE),
        Attack("sybil: 2 keys", overload, sybil(2), NO_NAMES),
        Attack("sybil: 5 keys", overload, sybil(5), NO_NAMES),
        Attack("sybil: 20 keys", overload, sybil(20), NO_NAMES),
        Attack("abort after prefill", long_prompts, abort_after_prefill, ALL),
        Attack("many tiny requests", overload, tiny, ALL),
        Attack("max_tokens far too high", overload, ask_for_too_much, ALL),
        Attack("max_tokens far too low", overload, ask_for_too_little, ALL),
        Attack("short answers, then long", all_lengths, short_then_long, LENGTHS),
        Attack("forged label", applications, forge_label, LABELS, known=LEARNED),
        Attack("the same, expected_service given", applications, forge_label, ("wsc",), expected=EXPECTED),
        Attack("four requests in one", applications, merged, LABELS, known=LEARNED),
        Attack("the same four, expected_service given", applications, merged, ("wsc",), expected=EXPECTED),
        Attack("false call_index", tasks, false_index, LABELS, client_limit=80, window_s=_LATER),
        Attack("one endless interaction", tasks, endless_task, LABELS, client_limit=80),
        Attack("the same, limit below the share", tasks, endless_task, LABELS, client_limit=45, known=THROTTLE),
    )
}
