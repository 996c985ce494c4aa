"""The load generators that people run traces with against an OpenAI URL, unmodified. Each wants packages of its own, so
each lives in an environment of its own, which a variable names by its Python::

    python -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf
    FAIRSERVE_AIPERF_PYTHON=/tmp/aiperf/bin/python make test ARGS=tests/clients/test_load_generators.py

The model here says as many tokens as it is asked for, one letter each, and the tokenizer makes a token of each byte.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.trace_slice import rows
from fairserve.engine.request import GenerateRequest
from fairserve.simulate.records import Arrival
from tests.api import tool_kit
from tests.api.scripted import Step, byte_tokenizer, words
from tests.api.served import API_KEY, Served

PATIENCE_S = 400
NUM = 20
REVISION = "0" * 40


def needs(variable: str) -> pytest.MarkDecorator:
    name = variable.removeprefix("FAIRSERVE_").removesuffix("_PYTHON").lower().replace("_", "-")
    return pytest.mark.skipif(variable not in os.environ, reason=f"{variable} names no Python with {name}")


def as_many_as_asked(request: GenerateRequest) -> Sequence[Step]:
    return words(*["a"] * request.sampling.max_tokens, finish="length")(request)


@pytest.fixture
def target(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The service, which has forgotten who asked before."""
    monkeypatch.setattr(served.backend, "script", as_many_as_asked)
    served.backend.requests.clear()
    return served


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's, in the layout of a hub's cache, as ``fairserve/tiny``: aiperf takes a folder for small runs only."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "hub" / "models--fairserve--tiny"
    folder = repository / "snapshots" / REVISION
    byte_tokenizer(tool_kit.HERMES).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return folder


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A piece of a workload, as ``python -m benchmarks.trace_slice`` writes it; each prompt begins alike."""
    arrivals = [Arrival(f"{i}", i * 0.05, "ann", 20 + i, 3 + i % 3, 3 + i % 3, prefix=(7,)) for i in range(NUM)]
    path = tmp_path / "slice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(arrivals)))
    return path


def generate(variable: str, program: str, arguments: Sequence[str], folder: Path, **environ: str) -> str:
    """Run it in ``folder``; what it printed."""
    path = Path(os.environ[variable]).parent
    environ |= {"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(folder), "COLUMNS": "200"}
    command = [str(path / program), *arguments]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, env=environ, cwd=folder, check=False
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    return ran.stdout + ran.stderr


def sent(target: Served) -> list[tuple[int, bool]]:
    """Of each request: the output that it asked for, and whether it wanted no less."""
    return sorted((one.sampling.max_tokens, one.sampling.ignore_eos) for one in target.backend.requests)


# ------------------------------------------------------------------------------------------------------------- aiperf


@needs("FAIRSERVE_AIPERF_PYTHON")
@pytest.mark.parametrize("kind", ["chat", "completions"])
@pytest.mark.parametrize("streaming", [True, False])
def test_aiperf_replays_a_trace(
    target: Served, tokenizer: Path, trace: Path, tmp_path: Path, kind: str, streaming: bool
) -> None:
    arguments = [
        "profile", "--model", "tiny", "--url", target.url, "--api-key", API_KEY, "--endpoint-type", kind,
        "--tokenizer", "fairserve/tiny", "--input-file", str(trace), "--custom-dataset-type", "mooncake_trace",
        "--isl-block-size", "16", "--fixed-schedule", "--use-server-token-count", "--extra-inputs", "ignore_eos:true",
        "--wait-for-model-timeout", "60", "--wait-for-model-mode", "models", "--ui", "none", "--artifact-dir", "out",
        *(["--streaming"] if streaming else []),
    ]  # fmt: skip
    home = str(tokenizer.parents[3])
    generate("FAIRSERVE_AIPERF_PYTHON", "aiperf", arguments, tmp_path, HF_HOME=home, HF_HUB_OFFLINE="1")
    records = [json.loads(line) for line in (tmp_path / "out" / "profile_export.jsonl").read_text().splitlines()]
    assert [record.get("error") for record in records] == [None] * NUM
    assert sent(target) == sorted((3 + i % 3, True) for i in range(NUM))
    told = sorted(record["metrics"]["usage_completion_tokens"]["value"] for record in records)
    assert told == [most for most, _ in sent(target)]
    asked = sorted(one.num_input for one in target.backend.requests)
    assert sorted(record["metrics"]["usage_prompt_tokens"]["value"] for record in records) == asked
    assert ("time_to_first_token" in records[0]["metrics"]) == streaming


# ----------------------------------------------------------------------------------------------------------- guidellm


@needs("FAIRSERVE_GUIDELLM_PYTHON")
@pytest.mark.parametrize(
    ("route", "stream"),
    [
        ("/v1/chat/completions", "true"),
        ("/v1/chat/completions", "false"),
        ("/v1/completions", "true"),
        ("/v1/responses", "true"),
    ],
)
def test_guidellm_replays_a_trace(
    target: Served, tokenizer: Path, trace: Path, tmp_path: Path, route: str, stream: str
) -> None:
    source = {"kind": "json_file", "path": str(trace)}
    data = {"kind": "mooncake", "source": source, "hash_id_block_size": 16, "time_scale": 0.001}  # it reads seconds
    backend = f"target={target.url},model=tiny,api_key={API_KEY},request_format={route},stream={stream}"
    arguments = [
        "run", "--backend", f"kind=openai_http,{backend}", "--profile", "kind=replay",
        "--constraint", f"kind=max_requests,count={NUM}", "--tokenizer", f"kind=hf_auto,model={tokenizer}",
        "--data", json.dumps(data), "--disable-progress", "--output", "kind=json,path=out.json",
    ]  # fmt: skip
    generate("FAIRSERVE_GUIDELLM_PYTHON", "guidellm", arguments, tmp_path, HF_HUB_OFFLINE="1")
    requests = json.loads((tmp_path / "out.json").read_text())["benchmarks"][0]["requests"]
    assert (len(requests["successful"]), requests["errored"], requests["incomplete"]) == (NUM, [], [])
    assert sent(target) == sorted((3 + i % 3, True) for i in range(NUM))
    assert sorted(one["output_tokens"] for one in requests["successful"]) == [most for most, _ in sent(target)]
    asked = sorted(one.num_input for one in target.backend.requests)
    assert sorted(one["prompt_tokens"] for one in requests["successful"]) == asked


# ----------------------------------------------------------------------------------------------------- inference-perf


@needs("FAIRSERVE_INFERENCE_PERF_PYTHON")
@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("streaming", [True, False])
def test_inference_perf_loads_at_a_constant_rate(target: Served, tmp_path: Path, kind: str, streaming: bool) -> None:
    # A byte alone may be no text, and it wants prompts that are as long again when they are read back: words are.
    vocabulary = {word: i for i, word in enumerate(["<|end|>", "?", *(f"w{i}" for i in range(100))])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="?", eos_token="<|end|>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    prompts = {"num_groups": 4, "num_prompts_per_group": 5, "system_prompt_len": 16, "question_len": 8, "output_len": 4}
    config = {
        "api": {"type": kind, "streaming": streaming},
        "server": {
            "type": "vllm", "model_name": "tiny", "base_url": target.url, "ignore_eos": True, "api_key": API_KEY,
        },
        "tokenizer": {"pretrained_model_name_or_path": str(folder)},
        "data": {"type": "shared_prefix", "shared_prefix": prompts},  # "random" knows completions alone
        "load": {"type": "constant", "stages": [{"rate": 5, "duration": NUM // 5}], "num_workers": 1},
        "report": {"request_lifecycle": {"summary": True, "use_server_output_tokens": True}},
        "storage": {"local_storage": {"path": "out"}},
    }  # fmt: skip
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    arguments = ["--config_file", "config.yml"]
    generate("FAIRSERVE_INFERENCE_PERF_PYTHON", "inference-perf", arguments, tmp_path, HF_HUB_OFFLINE="1")
    summary = json.loads((tmp_path / "out" / "summary_lifecycle_metrics.json").read_text())
    assert (summary["successes"]["count"], summary["failures"]["count"]) == (NUM, 0)
    assert len(target.backend.requests) == NUM
    assert sent(target) == [(4, True)] * NUM
    told = summary["successes"]  # its other lengths are its own tokenizer's
    asked = sum(one.num_input for one in target.backend.requests)
    assert (told["prompt_tokens"]["total"], told["output_tokens"]["total"]) == (asked, 4 * NUM)
