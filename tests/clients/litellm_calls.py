"""What `test_litellm.py` asks of litellm, in a Python that has it, as JSON: python litellm_calls.py URL KEY TOOLS."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm


def main(url: str, key: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    hi = [{"role": "user", "content": "hi"}]
    to: dict[str, Any] = {"model": "openai/tiny", "api_base": url + "/v1", "api_key": key, "timeout": 60}

    def asked(**more: Any) -> Any:
        return litellm.completion(**to | {"messages": hi, "num_retries": 0} | more)

    def told(choice: Any) -> list[Any]:
        return [[call.function.name, json.loads(call.function.arguments)] for call in choice.message.tool_calls or []]

    plain = asked()
    chunks = list(asked(stream=True, stream_options={"include_usage": True}))
    called = asked(tools=tools).choices[0]
    streamed = litellm.stream_chunk_builder(list(asked(tools=tools, stream=True)), messages=hi)
    result = {"role": "tool", "tool_call_id": called.message.tool_calls[0].id, "content": "rain"}
    error = ""
    try:
        asked(model="openai/other")
    except litellm.NotFoundError as caught:
        error = type(caught).__name__
    return {
        "text": plain.choices[0].message.content,
        "tokens": plain.usage.completion_tokens,
        "async": asyncio.run(litellm.acompletion(**to, messages=hi)).choices[0].message.content,
        "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "completion": litellm.text_completion(**to | {"model": "text-completion-openai/tiny"}, prompt="<|x|>")
        .choices[0]
        .text,
        "calls": told(called),
        "finish": called.finish_reason,
        "streamed calls": told(streamed.choices[0]),
        "answer": asked(messages=[*hi, called.message, result], tools=tools).choices[0].message.content,
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
