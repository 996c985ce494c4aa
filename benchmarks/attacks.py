"""What an attacker gains by idling, bursts, false names, aborts, crumbs and lies, under seven policies.

    python -m benchmarks.attacks [--seeds 5] [--jobs 2] [--only sybil] [--out out]

Two simulated replicas (step times of Llama-2-7B on an A10G), four honest clients and an attacker that together ask for
about 1.75 times what the replicas give, 180 s. Each attack (``attack_cases.py``) is run twice under every policy, with
the same seed and the same requests of the victims: once the attacker is honest, once it is not.

**Gain**: useful service that the attacker received / what it received as an honest client with the same demand, under
the same policy. Service is n_in + 2 n_out over the tokens that were really computed for it, under all its names, within
the attack's window: from 30 s to the end, or for a burst the time after it. Input that it had to send again for the
same answer is not useful. 1.00: nothing gained; below 1: a loss. The mean over the seeds, and half its 95 % interval.
Only ``flood`` wants more than the honest client: under FCFS shares follow demand, and no other row can show it.

**Victims**: service that the four received / what they received beside the honest client; and the TTFT p90 of the two
who ask for less than their share, again as a ratio, over their requests that arrive in the window (those without a
first token count with their age). A scheduler owes a short wait only to these.

**Verdict** on ours: a gain of at most 1.05; where the cluster did more work and the victims lost nothing, the gain over
that of the two victims who, like the attacker, ask for more than their share. An attack that can be made only once
(idle, then burst) earns a *lead*, not a rate: there the most that the attacker ever gained on such a victim, while it
waited, is compared with the bound 2 (U + S) of ``fairness/bounds.py`` as that run measured it, seed by seed. ``known``
marks what does not hold and why.

``published`` and ``published wsc`` are VTC and FairServe by the rules of their authors' code (``published.py``). rpm is
FCFS behind 50 requests a minute. Under ours the keys of one tenant are named tenant/key; the others know no tenants. A
``-`` stands where a policy cannot tell the attack from honest behaviour, so that both runs are the same one, and where
the question is whether ours needs prediction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.attack_cases import ATTACKS, Attack, Surroundings
from benchmarks.attack_runs import COLUMNS, OURS, Job, Seen, Window
from benchmarks.machine import describe_machine
from fairserve.simulate.seeds import Estimate, estimate

MOST_GAIN = 1.05


@dataclass(frozen=True, slots=True)
class Cell:
    """One attack under one policy, over the seeds; each number a mean of ratios, attacked / honest."""

    gain: Estimate
    victims: float
    rivals: float
    ttft: float
    honest: tuple[Seen, ...]
    attacked: tuple[Seen, ...]

    @property
    def keeps_the_bound(self) -> bool:
        return all(seen.lead <= seen.bound for seen in self.attacked)

    @property
    def keeps_its_share(self) -> bool:
        costs_nobody = self.victims >= 1.0 and self.gain.mean <= MOST_GAIN * self.rivals
        return self.gain.mean <= MOST_GAIN or costs_nobody

    @classmethod
    def of(cls, honest: Sequence[Seen], attacked: Sequence[Seen]) -> Cell:
        def ratios(figure: str) -> list[float]:
            return [getattr(b, figure) / max(getattr(a, figure), 1e-9) for a, b in zip(honest, attacked, strict=True)]

        gain = estimate(ratios("attacker"))
        assert gain is not None
        victims, rivals, ttft = (statistics.fmean(ratios(figure)) for figure in ("victims", "rivals", "ttft_p90_s"))
        return cls(gain, victims, rivals, ttft, tuple(honest), tuple(attacked))


Cells = Mapping[tuple[str, str], Cell]


def run_all(attacks: Sequence[Attack], num_seeds: int, num_processes: int) -> Cells:
    """By attack and policy."""
    first_of: dict[Surroundings, Attack] = {}  # whose honest run is everybody's
    windows: dict[str, set[Window]] = {}
    for attack in attacks:
        first = first_of.setdefault(attack.surroundings, attack)
        windows.setdefault(first.name, set()).add(attack.window_s)
    jobs: dict[Job, None] = {}
    pairs = []
    for attack in attacks:
        first = first_of[attack.surroundings]
        for column in attack.columns:
            pair = []
            for name, is_honest in ((first.name, True), (attack.name, False)):
                looks = tuple(sorted(windows[name])) if is_honest else (attack.window_s,)
                pair.append([Job(name, column, seed, is_honest, looks) for seed in range(1, num_seeds + 1)])
            pairs.append((attack, column, pair))
            jobs.update(dict.fromkeys((*pair[0], *pair[1])))
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        seen = dict(zip(jobs, pool.map(Job.run, jobs), strict=True))
    return {
        (attack.name, column): Cell.of(*([seen[job][attack.window_s] for job in side] for side in pair))
        for attack, column, pair in pairs
    }


# -- report ------------------------------------------------------------------------------------------------------------


def table(attacks: Sequence[Attack], cells: Cells) -> str:
    """One row per attack; a cell is gain (and half its 95 % interval), victims' service, victims' TTFT p90."""
    columns = [name for name in COLUMNS if any(name in attack.columns for attack in attacks)]
    rows = [["gain / victims' service / TTFT p90", *columns]]
    rows += [[attack.name, *(_text(cells.get((attack.name, name))) for name in columns)] for attack in attacks]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    spread = f"±{cell.gain.half_width:.2f}" if cell.gain.half_width is not None else ""
    return f"{cell.gain.mean:.2f}{spread} / {cell.victims:.2f} / {cell.ttft:.1f}"


@dataclass(frozen=True, slots=True)
class Verdict:
    attack: str
    holds: bool
    why: str
    known: str

    def __str__(self) -> str:
        word = "holds" if self.holds else "known" if self.known else "BROKEN"
        return f"{word:6} {self.attack}: {self.why}" + (f" ({self.known})" if word == "known" else "")


def verdicts(attacks: Sequence[Attack], cells: Cells) -> list[Verdict]:
    made = []
    for attack in attacks:
        ours = {name: cells[attack.name, name] for name in attack.columns if name in OURS}
        if attack.is_one_time:
            holds = all(cell.keeps_the_bound for cell in ours.values())
            worst = {name: max(cell.attacked, key=lambda seen: seen.lead - seen.bound) for name, cell in ours.items()}
            why = ", ".join(f"{name} led by {seen.lead:,.0f} of {seen.bound:,.0f}" for name, seen in worst.items())
        else:
            holds = all(cell.keeps_its_share for cell in ours.values())
            why = ", ".join(
                f"{name} gained {cell.gain.mean:.2f}"
                + (f" (busy victims {cell.rivals:.2f})" if holds and cell.gain.mean > MOST_GAIN else "")
                for name, cell in ours.items()
            )
        made.append(Verdict(attack.name, holds, why, attack.known))
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="attacks", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of everything, each with another seed (default 5)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--only", default="", help="only attacks with this in their name")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for attacks.json (default out)")
    options = parser.parse_args(argv)
    attacks = [attack for name, attack in ATTACKS.items() if options.only in name]
    if not attacks or options.seeds < 1 or options.jobs < 1:
        parser.error(f"nothing to run: at least one seed, one job and one of the attacks {'; '.join(ATTACKS)}")
    began_s = time.monotonic()
    cells = run_all(attacks, options.seeds, options.jobs)
    judged = verdicts(attacks, cells)
    print(table(attacks, cells), end="\n\n")
    print(*judged, sep="\n")
    print(f"\n{options.seeds} seeds, {time.monotonic() - began_s:.0f} s with {options.jobs} processes")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [{"attack": name, "policy": column, **asdict(cell)} for (name, column), cell in cells.items()]
    data = {"machine": describe_machine(), "verdicts": [asdict(verdict) for verdict in judged], "rows": rows}
    (options.out / "attacks.json").write_text(json.dumps(data, indent=1) + "\n")
    return 0 if all(verdict.holds or verdict.known for verdict in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
