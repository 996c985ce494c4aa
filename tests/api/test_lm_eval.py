"""lm-eval, unmodified, gets the same log-likelihoods and the same score from /v1/completions as from transformers.

It is no part of the development tools: its dependencies contradict the versions that everything else is tested with.
In an environment of its own: `pip install -e '.[eval]' pytest pytest-asyncio pytest-timeout openai`, then
`python -m pytest tests/api/test_lm_eval.py`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fairserve.api.app import create_app
from fairserve.api.served_model import ServedModel
from fairserve.api.service import OpenAIService
from fairserve.config import EMBEDDED_MODEL, EngineConfig, FairServeArgs
from tests.api.served import PATIENCE_S, Server

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: see the head of this file")
pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]

CONFIG = EngineConfig(max_num_seqs=8, kv_cache_tokens=4096)
QUESTIONS = [
    ("The capital of France is", ["London", "Paris", "Rome", "Cairo"], 1),
    ("Two plus two equals", ["three", "five", "four", "nine"], 2),
    ("Water freezes at zero degrees", ["Celsius", "Paris", "loudly", "Kelvin"], 0),
    ("The opposite of hot is", ["warm", "cold", "green", "late"], 1),
    ("A dog says woof and a cat says", ["moo", "woof", "meow", "hello"], 2),
    ("The sun rises in the", ["west", "north", "kitchen", "east"], 3),
    ("Who waits longest in a fair queue is served", ["never", "next", "tea", "yesterday"], 1),
    ("Seven days make a", ["week", "month", "minute", "sandwich"], 0),
]
TASK = """
task: common_sense
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def folder() -> str:
    from fairserve.engine.embedded import ensure_embedded

    return str(ensure_embedded(EMBEDDED_MODEL))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from tests.api.engine_backend import EngineBackend

    backend = EngineBackend(EMBEDDED_MODEL, CONFIG)
    args = FairServeArgs(engine=CONFIG)
    service = OpenAIService(args, [ServedModel(args, backend, backend.tokenizer, backend.max_model_len)], environ={})
    app = create_app(lambda: service)
    server = Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.has_begun.wait(PATIENCE_S)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/completions"
    server.should_exit = True
    thread.join(PATIENCE_S)
    backend.stop()


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (tmp_path / "items.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "common_sense.yaml").write_text(TASK.format(file=tmp_path / "items.json"))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(tasks: Any, kind: str, **model_args: Any) -> tuple[dict[str, float], list[list[tuple[float, bool]]]]:
    """Score by metric, and (log-likelihood, is greedy) of every answer to every question."""
    found = lm_eval.simple_evaluate(
        model=kind, model_args=model_args, tasks=["common_sense"], task_manager=tasks, bootstrap_iters=0
    )
    scores = {name: found["results"]["common_sense"][f"{name},none"] for name in ("acc", "acc_norm")}
    samples = sorted(found["samples"]["common_sense"], key=lambda sample: sample["doc_id"])
    return scores, [[tuple(answer) for answer in sample["filtered_resps"]] for sample in samples]


@pytest.mark.parametrize("sent", [{"num_concurrent": 4, "batch_size": 3}, {"tokenized_requests": False}])
def test_a_task_has_transformers_own_score_and_log_likelihoods(
    tasks: Any, url: str, folder: str, sent: dict[str, Any]
) -> None:
    wanted, wanted_answers = evaluated(tasks, "hf", pretrained=folder, dtype="float32", device="cpu", batch_size=1)
    given, answers = evaluated(
        tasks, "local-completions", model=EMBEDDED_MODEL, base_url=url, tokenizer=folder,
        tokenizer_backend="huggingface", **sent,
    )  # fmt: skip
    assert given == wanted
    assert wanted["acc"] > 0.5, "or the task tells nothing"
    for question, answer, reference in zip(QUESTIONS, answers, wanted_answers, strict=True):
        assert [value for value, _ in answer] == pytest.approx([value for value, _ in reference], abs=1e-3), question
        assert [greedy for _, greedy in answer] == [greedy for _, greedy in reference], question
