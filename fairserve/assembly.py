"""From the configuration to the objects that decide: the live system and the simulator build theirs here alike."""

from __future__ import annotations

from typing import Any

from fairserve.config import CostConfig, DispatchConfig, FairnessConfig
from fairserve.dispatch.budgets import BudgetSettings, rows_from
from fairserve.dispatch.capacity import Capacity
from fairserve.dispatch.controls import Controls
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.dispatcher import Dispatcher, DispatchLimits
from fairserve.dispatch.notes import Notes
from fairserve.dispatch.replica_book import LocalBook, Request
from fairserve.dispatch.usage import UsageBook
from fairserve.fairness.catalog import PolicySettings, make_policy
from fairserve.fairness.cost import CostFunction, KvTokenTime, ProfiledQuadratic, WeightedTokens
from fairserve.fairness.policy import Policy
from fairserve.fairness.prediction import make_predictor
from fairserve.fairness.throttle import ThrottleSettings


def make_cost(config: CostConfig) -> CostFunction:
    """The cost function that a configuration names."""
    if config.kind == "weighted_tokens":
        return WeightedTokens(config.input_weight, config.output_weight, config.cached_fraction)
    if config.kind == "profiled_quadratic":
        return ProfiledQuadratic(cached_fraction=config.cached_fraction)
    return KvTokenTime(cached_fraction=config.cached_fraction)


def policy_of(config: FairnessConfig) -> Policy:
    """A new policy object of the configured name."""
    settings = PolicySettings(
        rpm_limit=config.rpm_limit,
        quantum=config.quantum,
        replica_quantum=config.replica_quantum,
        window=config.locality_window,
        expected_service=config.expected_service,
    )
    return make_policy(config.policy, settings)


def make_dispatcher(
    fairness: FairnessConfig,
    dispatch: DispatchConfig,
    *,
    epoch: int,
    capacity: Capacity | None = None,
    log: DecisionLog | None = None,
    notes: Notes | None = None,
    controls: Controls | None = None,
    usage: UsageBook | None = None,
) -> Dispatcher:
    """The cluster's authority, new."""
    return Dispatcher(
        policy_of(fairness),
        make_cost(fairness.cost),
        DispatchLimits(**dispatch.model_dump()),
        epoch=epoch,
        predictor=make_predictor(fairness.prediction),
        throttle=ThrottleSettings(**fairness.throttle.model_dump()),
        group_weights=fairness.group_weights,
        capacity=capacity,
        log=log,
        notes=notes,
        controls=controls,
        usage=usage,
        budgets=BudgetSettings(
            {group: rows_from(one.rows) for group, one in fairness.group_budgets.items()},
            fairness.soft_budget_weight,
        ),
    )


def make_local_book(fairness: FairnessConfig) -> LocalBook[Request]:
    """The queue and the accounts of one replica."""
    return LocalBook(cost=make_cost(fairness.cost), **book_settings(fairness))


def book_settings(fairness: FairnessConfig) -> dict[str, Any]:
    """What of a :class:`LocalBook` may change while it is in use: arguments of :meth:`LocalBook.take_settings`."""
    return {
        "policy": policy_of(fairness),
        "group_weights": fairness.group_weights,
        "tracks_outputs": fairness.prediction != "none",
    }
