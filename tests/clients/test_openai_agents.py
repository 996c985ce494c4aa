"""The unmodified OpenAI Agents SDK over /v1/responses, in an environment of its own: it wants a newer urllib3 than the
one that fairserve is tested with. FAIRSERVE_AGENTS_PYTHON names the Python that has it::

    python -m venv /tmp/agents && /tmp/agents/bin/pip install openai-agents
    FAIRSERVE_AGENTS_PYTHON=/tmp/agents/bin/python make test ARGS=tests/clients/test_openai_agents.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.api.served import API_KEY, Served

VARIABLE = "FAIRSERVE_AGENTS_PYTHON"
SCRIPT = Path(__file__).parent / "agents_calls.py"


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no Python with openai-agents")
def test_agents_answer_call_functions_and_stream(served: Served) -> None:
    command = [os.environ[VARIABLE], str(SCRIPT), served.url, API_KEY]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={"PATH": os.environ["PATH"]}, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    loop = ["message_output_item", "tool_call_item", "tool_call_output_item", "message_output_item"]
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "text": "Hello world",
        "called": "It rains in Oslo.",
        "items": loop,
        "streamed": "Let me look.It rains in Oslo.",
        "streamed items": loop,
        "again": "Hello world",
        "typed": "Oslo",
        "tokens": 2,
        "error": "unsupported_tool",
    }
