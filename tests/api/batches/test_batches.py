"""Batches through the unmodified ``openai`` client."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import openai
import pytest

from fairserve.engine.request import GenerateRequest, RequestOutput, Usage
from fairserve.errors import ClientQueueFull, ModelFailed, ReplicaDied
from tests.api.batches.conftest import DAWN_S, Ingress, IngressMaker, chat_line
from tests.api.scripted import Step, words

DAY_S = 86_400


async def test_a_batch_answers_every_line_once_and_runs_beside_its_owner(ingress: Ingress) -> None:
    ingress.backend.script = words("Hello\u2028", " wörld")
    lines = [chat_line(f"task-{i}", "ä\u2028" * (i % 5)) for i in range(40)]
    batch = await ingress.batch(*lines, metadata={"night": "1"})
    assert (batch.status, batch.metadata, batch.request_counts.total) == ("validating", {"night": "1"}, 0)
    assert (batch.created_at, batch.expires_at) == (int(DAWN_S), int(DAWN_S) + DAY_S)
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    assert (done.status, done.error_file_id, done.errors) == ("completed", None, None)
    assert done.request_counts.model_dump() == {"total": 40, "completed": 40, "failed": 0}
    results = await ingress.results(done)
    assert results.keys() == {line["custom_id"] for line in lines}
    first = results["task-0"]
    assert (first["error"], first["response"]["status_code"]) == (None, 200)
    answer = openai.types.chat.ChatCompletion.model_validate(first["response"]["body"])
    assert answer.choices[0].message.content == "Hello\u2028 wörld"
    assert {(one.client, one.weight) for one in ingress.backend.requests} == {("ann+batch", 0.1)}
    assert done.completed_at and done.in_progress_at and done.finalizing_at


async def test_completions_are_run_too(ingress: Ingress) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "x"}}
    batch = await ingress.batch(line, endpoint="/v1/completions")
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    assert (await ingress.results(done))["a"]["response"]["body"]["object"] == "text_completion"


@pytest.mark.parametrize(("pooling", "status"), [("mean", 200), (None, 400)])
async def test_embeddings_are_run_too(ingress: Ingress, pooling: Any, status: int) -> None:
    service = ingress.batches._service
    service._models[0].pooling = pooling
    ingress.backend.script = lambda request: [
        RequestOutput(
            request.request_id, "", (), Usage(1, 0, 0), finish_reason="length", embedding=struct.pack("<2f", 0.6, 0.8)
        )
    ]
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "tiny", "input": "x"}}
    batch = await ingress.batch(line, endpoint="/v1/embeddings")
    await ingress.work()
    answer = (await ingress.results(await ingress.client().batches.retrieve(batch.id)))["a"]["response"]
    assert answer["status_code"] == status
    if pooling is None:
        assert answer["body"]["error"]["code"] == "embeddings_off"
    else:
        assert answer["body"]["data"][0]["embedding"] == pytest.approx([0.6, 0.8])


async def test_responses_are_run_too_and_their_errors_name_their_own_fields(ingress: Ingress) -> None:
    ingress.backend.script = words("Hello", " world", cached=3)

    def line(custom_id: str, **body: Any) -> dict[str, Any]:
        asked = {"model": "tiny", "input": "hi", **body}
        return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": asked}

    lines = [line("good", instructions="Be brief."), line("long", input="x" * 1_000), line("streamed", stream=True)]
    batch = await ingress.batch(*lines, line("cold", temperature=-1), endpoint="/v1/responses")
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    results = {name: one["response"] for name, one in (await ingress.results(done)).items()}
    answer = openai.types.responses.Response.model_validate(results["good"]["body"])
    assert (answer.output_text, answer.status) == ("Hello world", "completed")
    assert {name: one["body"]["error"]["param"] for name, one in results.items() if name != "good"} == {
        "long": "input", "streamed": "stream", "cold": "temperature",
    }  # fmt: skip
    assert answer.usage is not None and done.usage is not None
    assert done.usage.model_dump() == answer.usage.model_dump() | {"input_tokens_details": {"cached_tokens": 3}}


async def test_a_batch_says_what_its_answers_used_while_it_runs_and_for_good(ingress: Ingress) -> None:
    gate = asyncio.Event()

    def script(request: GenerateRequest) -> list[Step]:
        is_first = len(ingress.backend.requests) == 1
        return [*(() if is_first else [gate]), *words("Hello", " world", cached=4)(request)]

    ingress.backend.script = script
    batch = await ingress.batch(chat_line("a"), chat_line("b", "longer"), chat_line("hot", temperature=9))
    assert (batch.model, batch.usage) == ("tiny", openai.types.BatchUsage.model_validate(usage_of(0, 0, 0)))
    await ingress.look()
    await ingress.backend.until(lambda: len(ingress.backend.finished) == 1)
    await asyncio.sleep(0)
    num_a, num_b = (request.num_input for request in ingress.backend.requests)
    while (now := await ingress.client().batches.retrieve(batch.id)).usage == batch.usage:
        await ingress.look()  # its journal entry is written beside the event loop
    assert now.usage is not None and now.usage.model_dump() == usage_of(num_a, 4, 2)
    gate.set()
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    assert done.usage is not None and done.usage.model_dump() == usage_of(num_a + num_b, 8, 4)
    told = [one["response"]["body"].get("usage", {}) for one in (await ingress.results(done)).values()]
    assert done.usage.total_tokens == sum(one.get("total_tokens", 0) for one in told)
    (listed,) = (await ingress.client().batches.list()).data
    assert (listed.model, listed.usage) == ("tiny", done.usage)


def usage_of(num_input: int, num_cached: int, num_output: int) -> dict[str, Any]:
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": num_cached},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }


def forget_usage(root: Path) -> None:
    (final,) = root.rglob("final.json")
    final.write_text(json.dumps({k: v for k, v in json.loads(final.read_text()).items() if k != "usage"}))


async def test_a_batch_that_an_older_fairserve_finished_says_nothing_of_its_usage(
    ingress: Ingress, tmp_path: Path
) -> None:
    batch = await ingress.batch(chat_line("a"))
    await ingress.work()
    forget_usage(tmp_path)
    old = await ingress.client().batches.retrieve(batch.id)
    assert (old.status, old.usage) == ("completed", None)


async def test_a_line_with_a_wrong_body_is_an_error_line_and_the_others_go_on(ingress: Ingress) -> None:
    bad = [
        chat_line("no such model", model="other"),
        chat_line("too hot", temperature=9),
        chat_line("a stream", stream=True),
        chat_line("too long", "x" * 1_000),
    ]
    batch = await ingress.batch(*bad, chat_line("good"))
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    assert done.status == "completed"
    assert done.request_counts.model_dump() == {"total": 5, "completed": 1, "failed": 4}
    results = await ingress.results(done)
    told = {
        name: (one["response"]["status_code"], one["response"]["body"]["error"]["param"])
        for name, one in results.items()
        if name != "good"
    }
    assert told == {
        "no such model": (404, "model"),
        "too hot": (400, "temperature"),
        "a stream": (400, "stream"),
        "too long": (400, "messages"),
    }
    errors = (await ingress.client().files.content(done.error_file_id or "")).text
    assert "good" not in errors and len(errors.splitlines()) == 4


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        ((), [("empty_file", None, None)]),
        ((b"not json",), [("invalid_json_line", None, 1)]),
        ((b"[]", b"", b'{"custom_id": "a"}'),
         [("invalid_json_line", None, 1), ("missing_required_parameter", "method", 3)]),
        ((chat_line("a"), chat_line("b"), chat_line("a")), [("duplicate_custom_id", "custom_id", 3)]),
        ((chat_line("a") | {"url": "/v1/completions"},), [("url_mismatch", "url", 1)]),
        ((chat_line("a") | {"method": "GET"},), [("invalid_method", "method", 1)]),
        ((chat_line("a") | {"body": "x"},), [("invalid_type", "body", 1)]),
        ((chat_line(""),), [("invalid_custom_id", "custom_id", 1)]),
        ((chat_line("a") | {"priority": 1},), [("unknown_parameter", "priority", 1)]),
        ((chat_line("a", "x" * 3_000_000),), [("line_too_long", None, 1)]),
        (tuple(chat_line(str(i)) for i in range(6)), [("too_many_tasks", None, None)]),
    ],
)  # fmt: skip
async def test_a_wrong_line_fails_the_batch_by_its_number_and_nothing_is_run(
    make_ingress: IngressMaker, lines: tuple[Any, ...], problems: list[tuple[str, str | None, int | None]]
) -> None:
    ingress = make_ingress(max_lines=5)
    batch = await ingress.batch(*lines)
    await ingress.work()
    failed = await ingress.client().batches.retrieve(batch.id)
    assert (failed.status, failed.output_file_id) == ("failed", None)
    assert failed.errors is not None and failed.errors.data is not None
    assert [(one.code, one.param, one.line) for one in failed.errors.data] == problems
    assert not ingress.backend.requests


async def test_a_cancelled_batch_keeps_what_is_answered_and_names_the_rest(ingress: Ingress) -> None:
    stuck = asyncio.Event()

    def script(request: GenerateRequest) -> list[Step]:
        return list(words("fine")(request)) if len(ingress.backend.requests) <= 2 else [stuck]

    ingress.backend.script = script
    batch = await ingress.batch(*(chat_line(f"t{i}") for i in range(30)))
    await ingress.look()
    await ingress.backend.until(lambda: len(ingress.backend.requests) == 18)  # 16 run, 2 are answered
    client = ingress.client()
    await ingress.look()
    running = await client.batches.retrieve(batch.id)
    assert running.status == "in_progress" and running.request_counts.completed == 2
    asked = await client.batches.cancel(batch.id)
    assert asked.status == "cancelling" and asked.cancelling_at
    await ingress.work()
    done = await client.batches.retrieve(batch.id)
    assert done.status == "cancelled" and done.cancelled_at
    results = await ingress.results(done)
    codes = [one["error"] and one["error"]["code"] for one in results.values()]
    assert (len(results), codes.count(None), codes.count("batch_cancelled")) == (30, 2, 28)
    with pytest.raises(openai.BadRequestError, match="only one that is not finished can be cancelled"):
        await client.batches.cancel(batch.id)


async def test_a_batch_that_nobody_has_taken_up_can_be_cancelled(ingress: Ingress) -> None:
    batch = await ingress.batch(chat_line("a"))
    await ingress.client().batches.cancel(batch.id)
    await ingress.work()
    ended = await ingress.client().batches.retrieve(batch.id)
    assert ended.status in ("cancelled", "completed") and len(await ingress.results(ended)) == 1


async def test_what_is_not_answered_after_a_day_expires(ingress: Ingress) -> None:
    ingress.backend.script = lambda request: [asyncio.Event()]
    batch = await ingress.batch(chat_line("a"))
    await ingress.look()
    await ingress.backend.until(lambda: len(ingress.backend.requests) == 1)
    await ingress.look(DAY_S)
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    assert done.status == "expired" and done.expired_at == done.expires_at
    assert (await ingress.results(done))["a"]["error"]["code"] == "batch_expired"


async def test_a_refusal_is_waited_out_and_a_death_is_tried_again(ingress: Ingress) -> None:
    refused = ClientQueueFull("ann+batch", 3, 3, 7.0)
    ends: list[Step] = [refused, ReplicaDied("gone"), refused]

    def script(request: GenerateRequest) -> list[Step]:
        return [ends.pop()] if ends else list(words("at last")(request))

    ingress.backend.script = script
    batch = await ingress.batch(chat_line("a"))
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    assert done.request_counts.completed == 1 and ingress.waits_s == [7.0, 1.0, 7.0]


async def test_a_replica_that_dies_each_time_and_a_model_that_fails_make_error_lines(ingress: Ingress) -> None:
    def script(request: GenerateRequest) -> list[Step]:
        return [ModelFailed("no number")] if request.num_input > 60 else [ReplicaDied("gone")]

    ingress.backend.script = script
    batch = await ingress.batch(chat_line("poison"), chat_line("nan", "x" * 60))
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    results = await ingress.results(done)
    told = {name: one["response"]["body"]["error"]["code"] for name, one in results.items()}
    assert told == {"poison": "replica_failed", "nan": "model_error"} and ingress.waits_s == [1.0, 2.0, 4.0, 8.0]


async def test_no_more_lines_of_a_batch_run_at_a_time_than_the_setting_says(make_ingress: IngressMaker) -> None:
    ingress = make_ingress(max_running=3)
    gates = [asyncio.Event() for _ in range(9)]

    def script(request: GenerateRequest) -> list[Step]:
        return [gates[len(ingress.backend.requests) - 1], *words("ok")(request)]

    ingress.backend.script = script
    batch = await ingress.batch(*(chat_line(f"t{i}") for i in range(9)))
    await ingress.look()
    for i, gate in enumerate(gates):
        await ingress.backend.until(lambda i=i: len(ingress.backend.requests) == min(i + 3, 9))  # type: ignore[misc]
        await asyncio.sleep(0)
        assert len(ingress.backend.requests) - len(ingress.backend.finished) <= 3
        gate.set()
    await ingress.work()
    assert (await ingress.client().batches.retrieve(batch.id)).request_counts.completed == 9


async def test_batches_are_listed_newest_first_in_pages(ingress: Ingress) -> None:
    made = []
    for _ in range(5):
        made.append((await ingress.batch(chat_line("a"))).id)
        ingress.clock.advance(1)
    client = ingress.client()
    page = await client.batches.list(limit=2)
    assert [one.id for one in page.data] == made[:2:-1] and page.has_more
    assert [one.id async for one in client.batches.list(limit=2)] == made[::-1]
    with pytest.raises(openai.BadRequestError, match="limit"):
        await client.batches.list(limit=101)


async def test_another_clients_files_and_batches_are_not_there(ingress: Ingress) -> None:
    batch = await ingress.batch(chat_line("a"))
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    bob = ingress.client("bob")
    for call in (
        lambda: bob.batches.retrieve(batch.id),
        lambda: bob.batches.cancel(batch.id),
        lambda: bob.files.retrieve(batch.input_file_id),
        lambda: bob.files.content(done.output_file_id or ""),
        lambda: bob.files.delete(batch.input_file_id),
        lambda: bob.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
        ),
    ):
        with pytest.raises(openai.NotFoundError):
            await call()
    assert not (await bob.batches.list()).data and not (await bob.files.list()).data


async def test_a_client_may_have_so_many_unfinished_batches(make_ingress: IngressMaker) -> None:
    ingress = make_ingress(max_client_batches=2)
    for _ in range(2):
        await ingress.batch(chat_line("a"))
    with pytest.raises(openai.BadRequestError, match="2 unfinished batches"):
        await ingress.batch(chat_line("a"))
    await ingress.batch(chat_line("a"), key="bob")
    await ingress.work()
    await ingress.work()
    await ingress.batch(chat_line("a"))


async def test_a_deleted_input_does_not_disturb_its_batch(ingress: Ingress) -> None:
    batch = await ingress.batch(chat_line("a"))
    await ingress.client().files.delete(batch.input_file_id)
    await ingress.work()
    assert (await ingress.client().batches.retrieve(batch.id)).status == "completed"


async def test_what_a_line_may_be_labelled_is_what_its_owners_key_allows(make_ingress: IngressMaker) -> None:
    keys = [{"client": "acme/ann", "key": "secret-of-ann", "weight": 4.0, "applications": ["night"], "max_waiting": 9}]
    ingress = make_ingress(api={"keys": keys}, weight=0.5)
    wrong, right = chat_line("a", metadata={"application": "day"}), chat_line("b", metadata={"interaction_id": "i1"})
    batch = await ingress.batch(wrong, right, key="secret-of-ann")
    await ingress.work()
    done = await ingress.client("secret-of-ann").batches.retrieve(batch.id)
    results = await ingress.results(done, "secret-of-ann")
    assert results["a"]["response"]["body"]["error"]["code"] == "unknown_application"
    (one,) = ingress.backend.requests
    assert (one.client, one.weight, one.application, one.interaction, one.max_waiting) == (
        "acme/ann+batch", 2.0, "night", "i1", 9,
    )  # fmt: skip


async def test_a_service_without_a_directory_says_so_and_asks_for_the_key_first(make_service: Any) -> None:
    from fairserve.api.app import create_app
    from tests.api.conftest import http_of

    service = make_service(keys=[{"client": "ann", "key": "secret-of-ann"}])
    app = create_app(lambda: service, batches_provider=lambda: None)
    async with http_of(app) as http:
        for path in ("/v1/files", "/v1/batches", "/v1/files/x/content"):
            assert (await http.get(path)).status_code == 401
            answer = await http.get(path, headers={"authorization": "Bearer secret-of-ann"})
            assert answer.status_code == 404 and "batches.directory" in json.loads(answer.text)["error"]["message"]
