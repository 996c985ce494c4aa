"""How long an answer will be: what a request is charged for its output when it is picked (VTC with length prediction,
arXiv 2401.00588, section 4.4 and algorithm 3)."""

from __future__ import annotations

from typing import Protocol

from fairserve.errors import ConfigError

MOST_APPLICATIONS = 1_000
"""Applications of one client whose means are kept: a trusted gateway may name any."""


class Predictor(Protocol):
    """``application`` is "" for none; lengths are output tokens."""

    def predict(self, client: str, application: str, hint: int | None) -> float: ...

    def learn(self, client: str, application: str, num_output: int) -> None:
        """A request ended with that many."""
        ...

    def forget(self, client: str) -> None:
        """The client is not known any more."""
        ...


class NoPrediction:
    """Nothing is charged before it is generated."""

    def predict(self, client: str, application: str, hint: int | None) -> float:
        return 0.0

    def learn(self, client: str, application: str, num_output: int) -> None:
        pass

    def forget(self, client: str) -> None:
        pass


class MovingMean:
    """p = (4 p + n) / 5 per client and application, from its first length on; before that the mean over all clients,
    so that a newcomer's burst is not free. Each model has its own."""

    def __init__(self) -> None:
        self._mean: dict[str, dict[str, float]] = {}
        """By client and application."""
        self._overall: float | None = None

    def predict(self, client: str, application: str, hint: int | None) -> float:
        return self._mean.get(client, {}).get(application, self._overall or 0.0)

    def learn(self, client: str, application: str, num_output: int) -> None:
        own = self._mean.setdefault(client, {})
        own[application] = (4 * own.pop(application, num_output) + num_output) / 5
        if len(own) > MOST_APPLICATIONS:
            del own[next(iter(own))]
        overall = num_output if self._overall is None else self._overall
        self._overall = (99 * overall + num_output) / 100

    def forget(self, client: str) -> None:
        self._mean.pop(client, None)


class Foretold(NoPrediction):
    """Believes ``Submit.predicted_output``: the oracle, exact or noisy, of simulations. Never for outside callers."""

    def predict(self, client: str, application: str, hint: int | None) -> float:
        return 0.0 if hint is None else float(hint)


PREDICTORS: dict[str, type[NoPrediction] | type[MovingMean]] = {
    "none": NoPrediction,
    "moving_mean": MovingMean,
    "foretold": Foretold,
}


def make_predictor(name: str) -> Predictor:
    """The predictor of that name.

    Raises:
        ConfigError: for an unknown name; the message lists the known ones.
    """
    if name not in PREDICTORS:
        raise ConfigError(f"unknown prediction {name!r}: known are {', '.join(PREDICTORS)}")
    return PREDICTORS[name]()
