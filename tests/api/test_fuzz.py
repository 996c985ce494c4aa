"""Requests made from our own OpenAPI descriptions, right ones and wrong ones: no 500, no hang, answers as described.

FAIRSERVE_FUZZ_EXAMPLES=500 tries that many of each kind for each operation; here a few, always the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from fairserve.cluster.live_settings import LIVE_PATHS
from fairserve.dispatch.controls import Control
from tests.api import tool_kit
from tests.api.served import ADMIN_KEY, API_KEY, Served

NUM_EXAMPLES = int(os.environ.get("FAIRSERVE_FUZZ_EXAMPLES", "8"))
PATIENCE_S = 30.0
"""An answer that takes longer is a hang."""
CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.unsupported_method,
    checks.negative_data_rejection,
)
OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "POST /tokenize",
    "POST /detokenize",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "GET /v1/responses/{response_id}/input_items",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "POST /v1/files",
    "GET /v1/files",
    "GET /v1/files/{file_id}",
    "GET /v1/files/{file_id}/content",
    "DELETE /v1/files/{file_id}",
    "POST /v1/batches",
    "GET /v1/batches",
    "GET /v1/batches/{batch_id}",
    "POST /v1/batches/{batch_id}/cancel",
)
ADMIN_OPERATIONS = (
    "GET /models",
    "GET /overview",
    "GET /clients",
    "GET /clients/{name}",
    "PATCH /clients/{name}",
    "GET /counters",
    "GET /replicas",
    "GET /history",
    "GET /usage",
    "GET /events",
    "GET /audit",
    "GET /keys",
    "POST /keys",
    "DELETE /keys/{id}",
    "GET /settings",
    "PATCH /settings",
)
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
TAKE_ANYTHING = (
    "GET /health",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "GET /v1/responses/{response_id}/input_items",
    "GET /v1/files/{file_id}",
    "GET /v1/files/{file_id}/content",
    "DELETE /v1/files/{file_id}",
    "GET /v1/batches/{batch_id}",
    "POST /v1/batches/{batch_id}/cancel",
    "POST /v1/files",  # wrong parts that a form cannot hold are not sent at all; see batches/test_files.py
)
TRIED = [(name, RIGHT) for name in (*OPERATIONS, *ADMIN_OPERATIONS)] + [
    (name, WRONG) for name in (*OPERATIONS, *ADMIN_OPERATIONS) if name not in TAKE_ANYTHING
]
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    store = tmp_path_factory.mktemp("fuzz") / "store.sqlite"
    with Served(store, chat_template=tool_kit.HERMES, context=2_000).running() as served:
        yield served


@pytest.fixture(scope="module")
def operations(served: Served) -> dict[str, Any]:
    """Verb and path -> the operation as schemathesis reads it; those of the admin API by their own paths."""
    found: dict[str, Any] = {}
    for key, path in ((API_KEY, "/openapi.json"), (ADMIN_KEY, "/admin/v1/openapi.json")):
        headers = {"Authorization": f"Bearer {key}"}
        schema = schemathesis.openapi.from_url(served.url + path, headers=headers)
        for one in schema.get_all_operations():
            operation = one.ok()
            found[f"{operation.method.upper()} {operation.path}"] = (operation, headers)
    return found


def test_every_operation_that_is_described_is_tried(operations: dict[str, Any]) -> None:
    assert set(operations) == {*OPERATIONS, *ADMIN_OPERATIONS}


@pytest.mark.parametrize(("name", "mode"), TRIED, ids=str)
def test_every_answer_is_as_described(operations: dict[str, Any], name: str, mode: GenerationMode) -> None:
    operation, headers = operations[name]

    @FUZZ
    @given(case=operation.as_strategy(generation_mode=mode))
    def answered(case: Any) -> None:
        # An empty list in a query is not sent at all, and what is left of it may be right.
        assume(mode is RIGHT or all(value not in ([], {}, None) for value in (case.query or {}).values()))
        response = case.call(headers=headers, timeout=PATIENCE_S)
        case.validate_response(response, checks=CHECKS, headers=headers)

    answered()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(), SCALARS, max_size=3)
LARGE = st.sampled_from([10**19, 10**40, 10**400, 1e308, 5e-324, -1])


@pytest.mark.parametrize("path", LIVE_PATHS)
def test_no_value_of_a_live_setting_breaks_what_is_read_afterwards(served: Served, path: str) -> None:
    with httpx.Client(base_url=served.url + "/admin/v1", timeout=PATIENCE_S) as http:
        http.headers["authorization"] = f"Bearer {ADMIN_KEY}"

        @FUZZ
        @given(value=VALUES | LARGE)
        def changed(value: Any) -> None:
            answer = http.patch("/settings", json={path: value})
            assert answer.status_code < 500, (value, answer.text)
            assert http.get("/overview").status_code == 200, value

        try:
            changed()
        finally:
            assert http.patch("/settings", json={path: None}).status_code == 200


@pytest.mark.parametrize("field", sorted(Control.__dataclass_fields__))
def test_no_value_of_a_clients_control_breaks_what_is_read_afterwards(served: Served, field: str) -> None:
    with httpx.Client(base_url=served.url + "/admin/v1", timeout=PATIENCE_S) as http:
        http.headers["authorization"] = f"Bearer {ADMIN_KEY}"

        @FUZZ
        @given(value=VALUES | LARGE)
        def changed(value: Any) -> None:
            answer = http.patch("/clients/zoe", json={field: value})
            assert answer.status_code < 500, (value, answer.text)
            assert http.get("/clients/zoe").status_code in (200, 404), value

        try:
            changed()
        finally:
            http.patch("/clients/zoe", json={field: None})
