"""The unmodified ``litellm`` package, in an environment of its own: it wants older versions of what fairserve is tested
with (openai, filelock, huggingface-hub), and for functions ``mcp``, which it does not bring.
FAIRSERVE_LITELLM_PYTHON names the Python that has it::

    python -m venv /tmp/litellm && /tmp/litellm/bin/pip install litellm mcp
    FAIRSERVE_LITELLM_PYTHON=/tmp/litellm/bin/python make test ARGS=tests/clients/test_litellm.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.api.served import API_KEY, Served
from tests.api.tool_kit import TOOLS

VARIABLE = "FAIRSERVE_LITELLM_PYTHON"
SCRIPT = Path(__file__).parent / "litellm_calls.py"


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no Python with litellm")
def test_litellm_chats_streams_and_calls_functions(served: Served) -> None:
    command = [os.environ[VARIABLE], str(SCRIPT), served.url, API_KEY, json.dumps(TOOLS)]
    environ = {"PATH": os.environ["PATH"], "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    weather = [["weather", {"city": "Oslo"}]]
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "text": "Hello world",
        "tokens": 2,
        "async": "Hello world",
        "stream": "Hello world",
        "completion": "Hello world",
        "calls": weather,
        "finish": "tool_calls",
        "streamed calls": weather,
        "answer": "It rains in Oslo.",
        "error": "NotFoundError",
    }
