"""Where do running slots go unused at saturation? The simulator's replicas, as many requests as one likes.

    python -m benchmarks.slots [--quick] [--out out/slots.json]

Two replicas with 8 slots each; 16-token prompts, 24 output tokens; three times what they can serve. For each
``dispatch.lookahead`` and each way of counting, the share of slots in use, a mean over time:

- *computing*: requests in the step that runs, 0 between steps: what the hardware sees;
- *reported*: ``running`` of the newest report. A request leaves its slot when its last token is committed, and the
  next one takes it in the plan that follows at once: the report between the two counts it free until the next report.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.machine import describe_machine
from fairserve.simulate.records import Arrival
from fairserve.simulate.replica import SimReplica
from fairserve.simulate.run import run
from fairserve.simulate.scenario import Scenario

LOOKAHEADS = (0, 1, 2, 4)
DELAYS_S = (0.0005, 0.003)
"""One way, of a call to the counter actor: a fast machine's, and two slow cores'."""
WARM_UP_S = 20.0
NUM_REPLICAS, SLOTS = 2, 8
NUM_INPUT, NUM_OUTPUT = 16, 24


@dataclass(slots=True)
class Share:
    """The mean over time of a number that changes in steps, since the warm-up."""

    now: float = 0.0
    at_s: float = WARM_UP_S
    area: float = 0.0

    def put(self, value: float, now_s: float) -> None:
        if now_s > self.at_s:
            self.area += self.now * (now_s - self.at_s)
            self.at_s = now_s
        self.now = value

    def mean(self, slots: int, end_s: float) -> float:
        self.put(self.now, end_s)
        return self.area / slots / (end_s - WARM_UP_S)


@dataclass(slots=True)
class Watched:
    """By replica."""

    computing: dict[str, Share] = field(default_factory=dict)
    reported: dict[str, Share] = field(default_factory=dict)


@contextmanager
def watching() -> Any:
    """Every replica that is simulated meanwhile."""
    watched = Watched()
    begin, end, tell = SimReplica._begin, SimReplica._end, SimReplica._tell

    def put(shares: dict[str, Share], replica: SimReplica, value: float) -> None:
        shares.setdefault(replica.name, Share()).put(value, replica._timeline.now_s)

    def begun(self: SimReplica, plan: Any) -> None:
        put(watched.computing, self, len({chunk.request_id for chunk in (*plan.decodes, *plan.prefills)}))
        begin(self, plan)

    def ended(self: SimReplica, plan: Any, sampled: Any) -> None:
        put(watched.computing, self, 0)
        end(self, plan, sampled)

    def told(self: SimReplica) -> None:
        tell(self)
        put(watched.reported, self, self.state.num_running)

    with (
        patch.object(SimReplica, "_begin", begun),
        patch.object(SimReplica, "_end", ended),
        patch.object(SimReplica, "_tell", told),
    ):
        yield watched


@dataclass(frozen=True, slots=True)
class Row:
    lookahead: int
    delay_s: float
    computing: float
    reported: float
    requests_per_s: float


def measure(lookahead: int, delay_s: float, seconds: float) -> Row:
    scenario = Scenario.model_validate(
        {
            "name": "slots",
            "duration_s": WARM_UP_S + seconds,
            "workload": {"kind": "overload"},
            "dispatch": {"lookahead": lookahead},
            "cluster": {
                "replicas": NUM_REPLICAS,
                "max_num_seqs": SLOTS,
                "kv_tokens": 4_096,
                "step_time": "cpu-smollm2-135m",
                "network_delay_s": delay_s,
            },
        }
    )
    with watching() as watched:
        record = run(scenario, 1, arrivals=list(arrivals(WARM_UP_S + seconds)))
    end_s, slots = WARM_UP_S + seconds, NUM_REPLICAS * SLOTS
    done = sum(one.finished_s is not None and one.finished_s > WARM_UP_S for one in record.requests)
    return Row(
        lookahead,
        delay_s,
        sum(share.mean(slots, end_s) for share in watched.computing.values()),
        sum(share.mean(slots, end_s) for share in watched.reported.values()),
        done / seconds,
    )


def arrivals(seconds: float, per_s: float = 60.0) -> Sequence[Arrival]:
    """Two clients in turn."""
    return [
        Arrival(f"{i}", i / per_s, ("ann", "bob")[i % 2], NUM_INPUT, NUM_OUTPUT, NUM_OUTPUT)
        for i in range(int(seconds * per_s))
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="slots", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated, after the warm-up (default 120)")
    parser.add_argument("--quick", action="store_true", help="10 s: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/slots.json"))
    options = parser.parse_args(argv)
    seconds = 10.0 if options.quick else options.seconds
    rows = [measure(lookahead, delay_s, seconds) for delay_s in DELAYS_S for lookahead in LOOKAHEADS]
    print("one-way delay ms  lookahead  computing  reported  requests/s")
    for row in rows:
        print(
            f"{1e3 * row.delay_s:16.1f}  {row.lookahead:9}  {row.computing:9.1%}  {row.reported:8.1%}"
            f"  {row.requests_per_s:10.2f}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe_machine(), "rows": [asdict(row) for row in rows]}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
