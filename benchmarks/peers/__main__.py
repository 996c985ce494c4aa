"""Our engine beside transformers' continuous batching, vLLM on a CPU and llama.cpp: same model, prompts, threads.

    python -m benchmarks.peers [--peers ours,vllm] [--rounds 3] [--concurrency 1,8,32] [--out out/peers.json]

The embedded model; 32 prompts of 112, 120, 136 and 144 tokens (pieces of this repository's licence), 64 greedy tokens
each, the end-of-sequence token ignored. Every engine has a process of its own for the whole comparison, started one
after the other, and only one of them runs at a time: the others are stopped (SIGSTOP). For each concurrency the engines
take turns, round after round: A B C A B C. As many requests as the concurrency says are with the engine, until all
prompts have been sent; at concurrency 1 only the first ``--single-prompts``. No prefix cache anywhere.

Tokens are compared with ``model.generate``'s. Peers that are not there yet are installed under out/peers first; one
that cannot be, or that fails, is left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.peers.driver import Spec
from benchmarks.peers.environments import DEFAULT, FOLDER, PEERS, ROOT, CannotInstall, Peer, python_of
from benchmarks.peers.figures import Difference, Figures, differences, figures_of, over_rounds, told
from benchmarks.peers.gguf_files import gguf_file
from benchmarks.peers.processes import DriverFailed, Process
from fairserve.config import EMBEDDED_MODEL
from fairserve.engine.embedded import ensure_embedded
from fairserve.errors import ModelError

NUM_PROMPTS = 32
PROMPT_TOKENS = (112, 120, 136, 144)
"""In turn."""
LONGEST = max(PROMPT_TOKENS)
NUM_OUTPUT = 64


@dataclass(slots=True)
class Seen:
    """What was seen of one engine."""

    peer: Peer
    versions: dict[str, str]
    start_s: float
    runs: dict[int, list[Figures]] = field(default_factory=dict)
    """By concurrency, one for each round."""
    differences: dict[int, list[Difference]] = field(default_factory=dict)
    """By concurrency, from ``model.generate``; the round with most."""
    num_prompts: dict[int, int] = field(default_factory=dict)
    peak_rss_bytes: int = 0


def prompts_of(folder: Path) -> list[list[int]]:
    """English text in pieces of PROMPT_TOKENS tokens, the same on every machine."""
    from fairserve.engine.loading import load_tokenizer

    ids = load_tokenizer(str(folder))((ROOT / "LICENSE").read_text())["input_ids"]
    last = len(ids) - LONGEST
    return [ids[last * i // NUM_PROMPTS :][: PROMPT_TOKENS[i % len(PROMPT_TOKENS)]] for i in range(NUM_PROMPTS)]


def reference_of(folder: Path, prompts: Sequence[Sequence[int]], threads: int) -> dict[str, Any]:
    """``model.generate``'s tokens and logits gaps; kept in a file, since they take minutes.

    Raises:
        DriverFailed: it could not be computed.
    """
    versions = {name: version for name, version in describe_machine()["versions"].items() if name != "ray"}
    key = hashlib.sha256(json.dumps([prompts, NUM_OUTPUT, versions, folder.name]).encode()).hexdigest()[:16]
    kept = FOLDER / f"reference-{key}.json"
    if not kept.exists():
        print(f"model.generate on {len(prompts)} prompts: once, then it is kept", flush=True)
        spec = Spec(str(folder), threads, NUM_PROMPTS, LONGEST + NUM_OUTPUT)
        with Process(sys.executable, "reference", spec) as process:
            answer = process.ask({"prompts": prompts, "num_output": NUM_OUTPUT})
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(answer))
    reference: dict[str, Any] = json.loads(kept.read_text())
    return reference


def start(peer: Peer, folder: Path, options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Process, Seen]:
    """Install what is missing and start the engine; it rests when this returns.

    Raises:
        CannotInstall, DriverFailed, ModelError: it cannot be had.
    """
    python = python_of(peer)
    model = folder if peer.model == "folder" else gguf_file(EMBEDDED_MODEL, peer.model, FOLDER)
    length = -(-(LONGEST + NUM_OUTPUT) // 64) * 64
    spec = Spec(str(model), options.threads, max(options.concurrency), length, options=dict(peer.options))
    process = stack.enter_context(Process(python, peer.driver, spec))
    versions, start_s = process.ready()
    process.pause()
    print(f"{peer.name}: ready after {start_s:.1f} s", flush=True)
    return process, Seen(peer, versions, start_s)


def compare(
    options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack
) -> tuple[list[Seen], dict[str, str]]:
    """Everything that was seen, and who was left out why."""
    prompts = prompts_of(folder)
    reference = reference_of(folder, prompts, options.threads)
    left_out: dict[str, str] = {}
    started: dict[str, tuple[Process, Seen]] = {}
    for name in options.peers:
        try:
            started[name] = start(PEERS[name], folder, options, stack)
        except (CannotInstall, DriverFailed, ModelError) as error:
            left_out[name] = str(error)
            print(f"{name} is left out: {error}", flush=True)
    for concurrency in options.concurrency:
        ours = prompts[: options.single_prompts] if concurrency == 1 else prompts
        for round_ in range(options.rounds):
            for name, (process, seen) in list(started.items()):
                try:
                    one_run(process, seen, concurrency, ours, reference)
                except DriverFailed as error:
                    left_out[name] = f"at concurrency {concurrency}: {error}"
                    print(f"{name} is left out {left_out[name]}", flush=True)
                    del started[name]
                    continue
                rate = seen.runs[concurrency][-1].output_tokens_per_s
                print(f"concurrency {concurrency}, round {round_ + 1}: {name} {rate:.1f} tokens/s", flush=True)
    return [seen for _, seen in started.values()], left_out


def one_run(
    process: Process, seen: Seen, concurrency: int, prompts: Sequence[Sequence[int]], reference: dict[str, Any]
) -> None:
    process.go_on()
    answer = process.ask({"concurrency": concurrency, "prompts": prompts, "num_output": NUM_OUTPUT})
    process.pause()
    seen.runs.setdefault(concurrency, []).append(figures_of(answer["requests"]))
    seen.peak_rss_bytes = max(seen.peak_rss_bytes, answer["peak_rss_bytes"])
    seen.num_prompts[concurrency] = len(prompts)
    made = [request["tokens"] for request in answer["requests"]]
    found = differences(made, reference["tokens"], reference["gaps"])
    if len(found) >= len(seen.differences.get(concurrency, ())):
        seen.differences[concurrency] = found


def table_of(concurrency: int, all_seen: Sequence[Seen]) -> Table:
    rounds = len(all_seen[0].runs[concurrency])
    table = Table(title=f"concurrency {concurrency}, {rounds} rounds: median (least - most)", title_justify="left")
    table.add_column("engine")
    for heading in ("output tokens/s", "TTFT p50 ms", "p99", "inter-token p50 ms", "p99"):
        table.add_column(heading, justify="right")
    table.add_column("greedy tokens beside model.generate's")
    for seen in all_seen:
        cells = []
        for name, spread in over_rounds(seen.runs[concurrency]).items():
            form = "{median:,.1f} ({min:,.1f} - {max:,.1f})" if name == "output_tokens_per_s" else "{median:,.0f}"
            cells.append(form.format(**spread))
        equal = told(seen.differences[concurrency], seen.num_prompts[concurrency])
        table.add_row(f"{seen.peer.name}, {seen.peer.precision}", *cells, equal)
    return table


def json_of(seen: Seen) -> dict[str, Any]:
    return {
        "peer": seen.peer.name,
        "precision": seen.peer.precision,
        "options": dict(seen.peer.options),
        "versions": seen.versions,
        "start_s": seen.start_s,
        "peak_rss_bytes": seen.peak_rss_bytes,
        "concurrency": {
            str(concurrency): {
                "num_prompts": seen.num_prompts[concurrency],
                "rounds": [asdict(figures) for figures in runs],
                "over_rounds": over_rounds(runs),
                "differences": [asdict(one) for one in seen.differences[concurrency]],
            }
            for concurrency, runs in seen.runs.items()
        },
    }


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", default=",".join(DEFAULT), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine (default 3)")
    parser.add_argument("--concurrency", type=_numbers, default=[1, 8, 32], help="requests at a time (default 1,8,32)")
    parser.add_argument("--single-prompts", type=int, default=4, help="prompts at concurrency 1 (default 4)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each engine (default 2)")
    parser.add_argument("--install-only", action="store_true", help="install the peers, and stop")
    parser.add_argument("--out", type=Path, default=Path("out/peers.json"))
    options = parser.parse_args(argv)
    options.peers = options.peers.split(",")
    if unknown := [name for name in options.peers if name not in PEERS]:
        parser.error(f"unknown peer {unknown[0]!r}: known are {', '.join(PEERS)}")
    if min(options.rounds, options.single_prompts, options.threads, *options.concurrency) < 1:
        parser.error("rounds, prompts, threads and concurrency are at least 1")
    if options.install_only:
        return install(options.peers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the drivers end with this process, also then
    folder = ensure_embedded(progress=print)
    machine = describe_machine()
    with contextlib.ExitStack() as stack:
        all_seen, left_out = compare(options, folder, stack)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for concurrency in options.concurrency if all_seen else ():
        console.print(table_of(concurrency, all_seen))
    for seen in all_seen:
        print(f"{seen.peer.name}: start {seen.start_s:.1f} s, peak memory {seen.peak_rss_bytes / 1e6:,.0f} MB")
    for name, reason in left_out.items():
        print(f"{name} was left out: {reason}")
    about = {"num_prompts": NUM_PROMPTS, "prompt_tokens": PROMPT_TOKENS, "num_output": NUM_OUTPUT}
    result = {"machine": machine, "threads": options.threads, **about, "rounds": options.rounds}
    result |= {"engines": [json_of(seen) for seen in all_seen], "left_out": left_out}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all_seen else 1


def install(names: Sequence[str]) -> int:
    status = 0
    for name in names:
        try:
            print(f"{name}: {python_of(PEERS[name])}")
        except CannotInstall as error:
            print(error)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
