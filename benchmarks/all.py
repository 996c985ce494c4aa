"""`make bench`: every figure that benchmarks/README.md lists, one command after another.

    python -m benchmarks.all --list
    python -m benchmarks.all --only control,slots
    python -m benchmarks.all --write        # the table in benchmarks/README.md, anew from FIGURES

Each command is a process of its own and writes into ``out/``. A command that fails, or whose promise was missed, does
not hold up the others; the exit status then is 1.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: python -m benchmarks.all --write -->\n", "<!-- end of figures -->\n"
PYTHON = ".venv/bin/python"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table.

    ``name`` is its module's, and results that are kept begin with it. ``command`` is what a person types in the
    repository's root. ``is_run``: by `make bench`; the others are variants, or need something that is not everywhere.
    """

    name: str
    what: str
    command: str
    minutes: int
    is_run: bool = True
    kept_as: tuple[str, ...] = ()
    """Other names of results that are kept."""

    @property
    def kept(self) -> list[Path]:
        """Results in the repository, the newest last."""
        names = "|".join(map(re.escape, (self.name, *self.kept_as)))
        return sorted(
            path for path in RESULTS.glob("*") if re.fullmatch(rf"({names})(-\d{{4}}-.*)?\.(json|md)", path.name)
        )


def _module(name: str, what: str, minutes: int, arguments: str = "", *, is_run: bool = True) -> Figure:
    return Figure(name, what, f"{PYTHON} -m benchmarks.{name} {arguments}".strip(), minutes, is_run)


FIGURES = (
    Figure(
        "demo",
        "FCFS beside VTC under a 10:1 flood: table and chart",
        "make demo",
        4,
        kept_as=("demo-busy-machine",),
    ),
    Figure(
        "pairs",
        "tokens/s of VTC over FCFS, ten alternating pairs: median ratio with its confidence interval",
        "make demo ARGS='--pairs 10 --out out/pairs'",
        36,
    ),
    Figure("pairs", "the same, three pairs", "make demo ARGS='--pairs 3'", 11, is_run=False),
    Figure(
        "pairs",
        "the same, and exit 1 when a promise was missed",
        "make demo ARGS='--pairs 3 --check'",
        11,
        is_run=False,
    ),
    Figure(
        "demo",
        "another length, seed, size",
        "make demo ARGS='--seconds 120 --seed 7 --replicas 2 --slots 16'",
        5,
        is_run=False,
    ),
    _module("skew", "weights 4:1 over two ingresses, demand balanced, skewed and swapped, VTC and FCFS", 8),
    _module(
        "scaling", "tokens/s and worst gap with 1 to 4 replicas that keep a GPU's pace, and with 1 and 2 on CPUs", 4
    ),
    _module(
        "control",
        "the counter actor on a real Ray with 8, 32 and 64 simulated replicas: CPU per report and per grant, how old "
        "its picture of a replica is, what a request alone waits; reports one by one and by node",
        4,
    ),
    _module("cold_start", "from `serve run` to the first token, and from one replica to two", 4),
    _module("lookahead", "slots in use and tokens/s by `dispatch.lookahead`", 5),
    _module("slots", "where slots go unused at saturation, simulated: computing, and as reports count", 1),
    Figure(
        "paper",
        "the VTC paper's workloads under every scheduler, simulated, beside the published numbers; exit 1 when a "
        "statement does not hold",
        "make paper",
        5,
    ),
    _module("attacks", "what an attacker gains under FCFS, RPM, VTC as published and ours", 10),
    _module("preemption", "what `dispatch.preempt_gap` buys and costs", 5),
    _module(
        "ablation",
        "one authority against per-replica queues, on 2, 8 and 64 replicas, ingress balanced and skewed",
        30,
    ),
    _module("interactions", "FairServe's comparison: RPM against throttled interactions", 10),
    _module("scale", "one dispatcher with 100,000 clients and 1,000 replicas: decisions/s, bytes", 8),
    Figure(
        "decisions",
        "decisions/s with 8 and 64 replicas, once every one of 10,000 waiting clients had its turn",
        f"{PYTHON} -m benchmarks.scale --decisions --policies vtc",
        2,
    ),
    _module("reads", "what ten dashboards cost the counter actor: reports' time, p99", 3),
    _module(
        "streaming",
        "CPU per streamed token of proxy, ingress and replica, with and without trunks, default settings and HAProxy",
        5,
    ),
    Figure(
        "bounds",
        "every fairness bound in 10,000 random runs",
        f"{PYTHON} -m tests.properties.run_bounds --jobs 2 --out out",
        20,
    ),
    _module("replica_death", "a stream whose replica is killed, without and with `api.retry_on_replica_death`", 4),
    Figure(
        "chaos",
        "any process killed, stopped or cut off at random under load from 20 clients: what was lost "
        "(nothing), every token, how long until fair again; exit 1 when a request or a token was lost",
        "make chaos",
        13,
    ),
    Figure(
        "chaos",
        "the same with some faults only, for a shorter time, without a second node",
        "make chaos ARGS='--seconds 90 --seed 7 --only actor --no-partition'",
        4,
        is_run=False,
    ),
    _module(
        "head_death",
        "the head node of a cluster dies under load, with Ray's state in Redis, and comes back (Linux, root, "
        "`redis-server`)",
        4,
        is_run=False,
    ),
    Figure(
        "flood",
        "load on a running service, to look at it by: a greedy and two modest clients",
        "make load",
        1,
        is_run=False,
    ),
    _module(
        "trace_slice",
        "no figure: a piece of a trace as aiperf and guidellm replay it (`deployments/README.md`, Load generators)",
        1,
        "TRACE OUT --format mooncake --max-tokens 600 --limit 50",
        is_run=False,
    ),
    Figure(
        "overload",
        "ten times capacity for three minutes: memory of every process, 429s, limits, polite clients, 2,000 aborts",
        f"{PYTHON} -m benchmarks.overload",
        7,
        kept_as=("overload-newcomers",),
    ),
    _module(
        "prefix_cache",
        "what the engine's prefix cache gains and costs: TTFT with 1,000 shared tokens, decode tokens/s without any "
        "hit, copying and hashing alone",
        8,
    ),
    _module(
        "peers",
        "our engine beside transformers' continuous batching, vLLM on a CPU and llama.cpp at 1, 8 and 32 "
        "requests; the first time it installs them under `out/peers` (4 GB, 5 minutes more)",
        15,
    ),
    _module(
        "locality",
        "what cached prefixes buy and cost: VTC, DLPM, D2LPM and a router that looks at prefixes alone, simulated; "
        "exit 1 when a promise was missed",
        10,
    ),
    Figure(
        "engine_steps",
        "the engine's decode steps at 1, 8, 32 requests and a prompt chunk beside this machine's floors, settings in "
        "alternating rounds",
        f"{PYTHON} -m benchmarks.engine_steps cpu_linear=packed cpu_linear=fused cpu_linear=int8",
        6,
        kept_as=("engine-log",),
    ),
    _module(
        "grammar",
        "what a JSON Schema costs a decode step and the choice of its tokens, greedy and sampled, at 1, 8 and 32 "
        "requests",
        4,
    ),
    _module(
        "adapters",
        "tokens/s with one and with four LoRA adapters in a batch of 8 and 32 requests, over the bare model's; what "
        "loaded adapters cost those who ask for none",
        6,
    ),
    _module("quality", "what weights of 8 bits cost: perplexity of a fixed text, tokens that stay the same", 4),
    Figure(
        "simulate",
        "any scenario under any policy, simulated",
        ".venv/bin/fairserve simulate overload --policy fcfs --policy vtc --seeds 5",
        1,
        is_run=False,
    ),
)
"""In the order of the table and of `make bench`."""


def table(figures: Sequence[Figure] = FIGURES) -> str:
    """The table of benchmarks/README.md; `make bench` runs the rows with a name."""
    rows = ["| name | figure | command | minutes |", "|---|---|---|---|"]
    rows += [f"| {one.name if one.is_run else ''} | {one.what} | `{one.command}` | {one.minutes} |" for one in figures]
    return "\n".join(rows) + "\n"


def listing(figures: Sequence[Figure]) -> str:
    """Name, minutes, command, and the newest result that is kept."""
    width = max(len(one.name) for one in figures)
    lines = []
    for one in figures:
        kept = f"  ({one.kept[-1].relative_to(ROOT)})" if one.kept else ""
        lines.append(f"{one.name:{width}}  {one.minutes:3} min  {one.command}{kept}")
    minutes = sum(one.minutes for one in figures)
    return "\n".join(lines) + f"\n{len(figures)} figures, about {minutes // 60} h {minutes % 60} min on two cores"


def chosen(only: str | None) -> list[Figure]:
    """Those that run, or those named.

    Raises:
        ValueError: a name is unknown.
    """
    runs = {one.name: one for one in FIGURES if one.is_run}
    if only is None:
        return list(runs.values())
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in runs]:
        raise ValueError(f"no figure is called {', '.join(unknown)}; there are {', '.join(runs)}")
    if not names:
        raise ValueError(f"--only names no figure; there are {', '.join(runs)}")
    return [one for one in runs.values() if one.name in names]


def command_of(figure: Figure) -> list[str]:
    """The same, with the Python that runs this: where `make bench` runs, all is set up."""
    words = shlex.split(figure.command)
    if words[0] == "make":
        arguments = [shlex.split(word.removeprefix("ARGS=")) for word in words[2:]]
        return [sys.executable, "-m", f"benchmarks.{words[1]}", *(one for some in arguments for one in some)]
    return [sys.executable, *words[1:]]


def run(figures: Sequence[Figure]) -> list[str]:
    """Names of those that failed."""
    failed = []
    for number, figure in enumerate(figures, 1):
        print(f"\n[{number}/{len(figures)}] {figure.name}, about {figure.minutes} min: {figure.command}", flush=True)
        began_s = time.monotonic()
        status = subprocess.run(command_of(figure), cwd=ROOT, check=False).returncode
        print(f"[{number}/{len(figures)}] {figure.name}: exit {status}, {(time.monotonic() - began_s) / 60:.1f} min")
        if status:
            failed.append(figure.name)
    return failed


def with_table(text: str) -> str:
    """The README with the table of now."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "the README has both marks"
    return before + BEGIN + table() + END + after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="all", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="NAMES", help="these figures, separated by commas")
    parser.add_argument("--list", action="store_true", help="what would run, and how long it takes; run nothing")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/README.md; run nothing")
    options = parser.parse_args(argv)
    if options.write:
        README.write_text(with_table(README.read_text()))
        return 0
    try:
        figures = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    print(listing(figures), flush=True)
    if options.list:
        return 0
    failed = run(figures)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
