"""A piece of a recorded workload, in the format in which load generators replay one over HTTP::

    python -m benchmarks.trace_slice mooncake_conversation.jsonl.gz slice.jsonl \\
        --format mooncake --max-tokens 600 --limit 50

One JSON object a line, as Mooncake's own traces have it, which ``aiperf`` (``--custom-dataset-type mooncake_trace``)
and ``guidellm`` (``--data kind=mooncake``) read: ``timestamp`` (ms), ``input_length``, ``output_length``, and
``hash_ids``, one for each 16 tokens of input; equal ones stand for equal text. Any trace that ``fairserve simulate``
reads can be cut. Requests that are too long are dropped, never clipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fairserve.errors import ConfigError
from fairserve.simulate.records import PREFIX_BLOCK, Arrival
from fairserve.simulate.traces import load_trace


def rows(arrivals: Sequence[Arrival]) -> Iterator[dict[str, Any]]:
    """A row for each request, the first at time 0. What is not known to be shared has a hash of its own."""
    fresh = itertools.count(1 + max((known for one in arrivals for known in one.prefix), default=-1))
    for one in arrivals:
        num_blocks = -(-one.num_input // PREFIX_BLOCK)
        known = one.prefix[:num_blocks]
        yield {
            "timestamp": round((one.arrival_s - arrivals[0].arrival_s) * 1000),
            "input_length": one.num_input,
            "output_length": one.num_output,
            "hash_ids": [*known, *itertools.islice(fresh, num_blocks - len(known))],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    what = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("python -m benchmarks.trace_slice", description=what)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", choices=["plain", "mooncake"], default="plain", help="of the trace")
    parser.add_argument("--max-tokens", type=int, help="input and output together; longer requests are dropped")
    parser.add_argument("--start-s", type=float, default=0.0, help="of the trace's own time to leave out")
    parser.add_argument("--time-scale", type=float, default=1.0, help="0.5: twice as fast")
    parser.add_argument("--limit", type=int, help="only so many requests, the first to arrive")
    options = parser.parse_args(arguments)
    wanted = {name: value for name, value in vars(options).items() if name not in ("trace", "out")}
    try:
        found = load_trace(options.trace, **wanted)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows(found.arrivals)))
    except (ConfigError, OSError) as error:
        sys.exit(f"trace_slice: {error}")
    dropped = f"{found.num_too_long} of {found.num_read} dropped as too long"
    print(f"{options.out}: {len(found.arrivals)} requests, hash_ids of {PREFIX_BLOCK} tokens; {dropped}")


if __name__ == "__main__":
    main()
