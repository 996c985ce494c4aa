"""One model over two processes computes what it computes in one, and a rank that dies breaks the replica."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fairserve.clock import VirtualClock
from fairserve.engine.engine import make_engine
from fairserve.engine.loading import load_model, require_divisible
from fairserve.errors import ModelError
from fairserve.local import free_port
from tests.engine.one_rank import CONFIG, MAX_TOKENS, PROMPTS, READ, RULED, SIZE, run_ruled
from tests.engine.support import FifoQueue, Ledger
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def ranks(folder: Path) -> list[subprocess.Popen[str]]:
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.one_rank", str(number), address, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(SIZE)
    ]


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Any]:
    """What two ranks made, by request."""
    lead, other = processes = ranks(folder)
    try:
        out, said = lead.communicate(timeout=300)
        assert lead.returncode == 0, said
        assert other.wait(timeout=60) == 0, other.communicate()[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    made = json.loads(out.splitlines()[-1])
    assert isinstance(made, dict)
    return made


def test_two_ranks_make_the_tokens_that_one_makes(folder: Path, made: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, prompt in PROMPTS.items():
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS, do_sample=False
        )[0, len(prompt) :]
        assert made[name] == wanted.tolist(), name
    tokens = PROMPTS[READ]
    with torch.inference_mode():
        output = model(torch.tensor([tokens]), output_hidden_states=True)
    rows, mean = output.logits[0].log_softmax(-1), output.hidden_states[-1][0].mean(0)
    assert made["scored"] == pytest.approx([float(rows[i, one]) for i, one in enumerate(tokens[1:])], abs=1e-4)
    assert made["pooled"] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-4)


def test_rules_hold_on_two_ranks_as_on_one(folder: Path, made: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"tensor_parallel_size": 1})
    engine = make_engine(
        load_model(str(folder), config),
        config,
        reserve_output_tokens=None,
        queue=FifoQueue(),
        account=Ledger(),
        clock=VirtualClock(),
    )
    alone = run_ruled(engine)
    assert {name: tuple(made[name]) for name in RULED} == alone
    texts = {name: text for name, (_, text) in alone.items()}
    assert len(json.loads(texts["schema"]).get("city", "")) <= 6
    assert re.fullmatch("[a-f]{3,9}(-[0-9]+){2}", texts["regex"]) or len(alone["regex"][0]) == 40
    assert texts["choice"] in ("yes", "yesterday")
    tokens = {name: token_ids for name, (token_ids, _) in alone.items()}
    assert 41 not in tokens["bias"]
    assert 40 in tokens["bias"]
    assert len(tokens["long"]) == 11  # the end is by far the likeliest, and held off ten times
    assert set(tokens["few"]) <= {30, 31, 32, 33}
    assert 40 not in tokens["without"]


def test_heads_that_cannot_be_dealt_out_are_told_with_what_can(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    require_divisible(config, 2, "tiny")
    with pytest.raises(ModelError, match="does not divide its 4 heads and 2 KV heads; possible: 1, 2"):
        require_divisible(config, 4, "tiny")
