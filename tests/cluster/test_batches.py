"""A batch on the whole cluster: two ingress processes, one folder, and the lines through the fair router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from benchmarks import skew
from fairserve.config import BatchesConfig
from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

DOOR = "offline"
NUM_LINES = 24


@pytest.fixture
def served(serve_app: Callable[..., Served], tmp_path: Path) -> Iterator[Served]:
    """The main application, and a door of two ingress processes that keep files in a common folder."""
    served = serve_app("main", num_replicas=2, num_ingress_replicas=2)
    args = served.args.model_copy(update={"batches": BatchesConfig(directory=str(tmp_path / "kept"))})
    with skew.second_door(args, app=served.name, name=DOOR):
        yield served


async def test_a_batch_is_run_once_and_its_tokens_are_its_own_clients(served: Served) -> None:
    url = served.url.removesuffix(served.name) + DOOR
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="night", max_retries=2, timeout=600)
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "ignore_eos": True}
    lines = [
        {"custom_id": f"task-{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(NUM_LINES)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"night": "1"}
    )
    async with asyncio.timeout(120):
        while batch.status in ("validating", "in_progress", "finalizing"):
            await asyncio.sleep(0.2)
            batch = await client.batches.retrieve(batch.id)
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    output = (await client.files.content(batch.output_file_id or "")).text
    answers = [json.loads(line) for line in output.splitlines()]
    assert sorted(one["custom_id"] for one in answers) == sorted(line["custom_id"] for line in lines)
    told = [one["response"]["body"]["usage"] for one in answers]
    row = (await served.quiet())["clients"]["night+batch"]
    assert row["num_output"] == sum(one["completion_tokens"] for one in told) == NUM_LINES * 5
    assert row["num_input"] == sum(one["prompt_tokens"] for one in told)
    assert "night" not in (await served.quiet())["clients"]
