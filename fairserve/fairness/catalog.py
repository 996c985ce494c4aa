"""Policies by name, and the settings that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fairserve.errors import ConfigError
from fairserve.fairness.baselines import Fcfs, Lcf, RoundRobin, Rpm
from fairserve.fairness.deficit import D2lpm, Dlpm, Drr
from fairserve.fairness.policy import Policy
from fairserve.fairness.vtc import Vtc
from fairserve.fairness.wsc import Wsc


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Numbers of the policies; ``FairnessConfig`` documents each."""

    rpm_limit: int = 60
    quantum: float = 500.0
    replica_quantum: float = 2_000.0
    window: int = 32
    expected_service: Mapping[str, float] = field(default_factory=dict)


POLICIES: dict[str, Callable[[PolicySettings], Policy]] = {
    "vtc": lambda settings: Vtc(),
    "wsc": lambda settings: Wsc(settings.quantum, dict(settings.expected_service)),
    "drr": lambda settings: Drr(settings.quantum),
    "dlpm": lambda settings: Dlpm(settings.quantum, settings.window),
    "d2lpm": lambda settings: D2lpm(settings.quantum, settings.window, settings.replica_quantum),
    "lcf": lambda settings: Lcf(),
    "fcfs": lambda settings: Fcfs(),
    "rpm": lambda settings: Rpm(settings.rpm_limit),
    "round_robin": lambda settings: RoundRobin(),
}


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """A new policy of that name.

    Raises:
        ConfigError: for an unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}: known are {', '.join(sorted(POLICIES))}")
    return POLICIES[name](settings or PolicySettings())
