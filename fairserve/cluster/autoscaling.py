"""BacklogPolicy: Serve's autoscaling, told by the counter actor how much work waits in the whole cluster.

Serve's own policy averages what each router reports over 30 s and counts every request alike. The counter actor knows
all requests and the KV tokens that each needs, now. Serve adds to the policy's answer its delays, bounds and the start
from zero (``ray/serve/autoscaling_policy.py``, ``_apply_autoscaling_config``).

Serve pickles this module by value and runs the policy on its controller's event loop, so it stays thin, and a thread
asks the actor: the policy itself never waits.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from fairserve.dispatch.demand import Demand

ASK_S = 1.0
"""Seconds between two questions to the counter actor."""
OLD_S = 10.0
"""An answer this old is none: the cluster stays as it is until the actor answers again."""
UNSEEN_S = 10.0
"""A request that only Serve counts is on its way to the actor, or waits for a first replica. Where there is a replica
and the actor has not seen the request for so long, it is gone and Serve did not notice."""


class BacklogPolicy:
    """``policy_function`` of a Serve ``AutoscalingConfig``; the arguments are its ``policy_kwargs``.

    ``counter``: a ``CounterConfig`` as a dict; ``slot``: of the model; ``target_use`` and
    ``replicas_per_waiting_batch``: see ``AutoscalingConfig``. ``ask`` (blocks, may raise anything) and ``now_s`` are
    handed in by tests.
    """

    def __init__(
        self,
        counter: dict[str, Any],
        target_use: float,
        replicas_per_waiting_batch: float,
        slot: str = "",
        ask: Callable[[], Demand] | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target_use = target_use
        self._per_waiting_batch = replicas_per_waiting_batch
        self._now_s = now_s
        self._ask = ask or _asker(counter, slot)
        self._newest: tuple[float, Demand] | None = None
        self._unseen_since_s: float | None = None
        self._thread: threading.Thread | None = None

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, before Serve's delays and bounds; those of now while the counter actor does not answer."""
        from fairserve.dispatch.demand import wanted_replicas

        if self._thread is None:
            self._thread = threading.Thread(target=_keep_asking, args=(weakref.ref(self),), daemon=True)
            self._thread.start()
        if self._newest is None or self._now_s() - self._newest[0] > OLD_S:
            return ctx.target_num_replicas, {}
        wanted = wanted_replicas(
            self._newest[1], target_use=self._target_use, replicas_per_waiting_batch=self._per_waiting_batch
        )
        if wanted > 0 or not ctx.total_num_requests or not ctx.current_num_replicas:
            self._unseen_since_s = None
        if wanted == 0 and ctx.total_num_requests > 0:  # the answer may be from before a request that just came
            if self._unseen_since_s is None:
                self._unseen_since_s = self._now_s()
            if self._now_s() - self._unseen_since_s < UNSEEN_S:
                return 1, {}
        return wanted, {}

    def refresh(self) -> None:
        """Ask once. Blocks; a failure leaves the last answer."""
        try:
            answer = self._ask()
        except Exception:  # dead, restarting or partitioned: OLD_S decides
            return
        self._newest = (self._now_s(), answer)


def _keep_asking(policy: weakref.ref[BacklogPolicy]) -> None:
    """Until the policy is gone: Serve makes a new one at every change of its configuration."""
    while (one := policy()) is not None:
        one.refresh()
        del one
        time.sleep(ASK_S)


def _asker(counter: dict[str, Any], slot: str) -> Callable[[], Demand]:
    def ask() -> Demand:
        import ray

        from fairserve.cluster.counter_actor import find_counter_actor
        from fairserve.config import CounterConfig

        config = CounterConfig.model_validate(counter)
        answer: Demand = ray.get(find_counter_actor(config).demand.remote(slot), timeout=config.call_timeout_s)
        return answer

    return ask
