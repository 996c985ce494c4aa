"""What `test_openai_agents.py` asks of the Agents SDK, in a Python that has it, as JSON::

python agents_calls.py URL KEY
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import agents
import openai
from pydantic import BaseModel


class Weather(BaseModel):
    """Today's weather in a city."""

    city: str


@agents.function_tool
def weather(city: str) -> str:
    """Today's weather in a city."""
    return f"rain in {city}"


def kinds(result: Any) -> list[str]:
    return [item.type for item in result.new_items]


async def main(url: str, key: str) -> dict[str, Any]:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key=key, timeout=60, max_retries=0)
    model = agents.OpenAIResponsesModel(model="tiny", openai_client=client)
    plain = agents.Agent(name="plain", instructions="Be brief.", model=model)
    calling = agents.Agent(name="calling", model=model, tools=[weather])
    scored = agents.Agent(name="scored", model=model, model_settings=agents.ModelSettings(top_logprobs=1, store=False))
    typed = agents.Agent(name="typed", model=model, output_type=Weather)
    greeting = await agents.Runner.run(plain, "hi")
    called = await agents.Runner.run(calling, "hi")
    streamed = agents.Runner.run_streamed(calling, "hi")
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    again = await agents.Runner.run(plain, [*greeting.to_input_list(), {"role": "user", "content": "and?"}])
    tokens = (await agents.Runner.run(scored, "hi")).raw_responses[0].output[0].content[0].logprobs
    hosted = agents.Agent(name="hosted", model=model, tools=[agents.WebSearchTool()])
    error = ""
    try:
        await agents.Runner.run(hosted, "hi")
    except openai.BadRequestError as caught:
        error = str(caught.code)
    return {
        "text": greeting.final_output,
        "called": called.final_output,
        "items": kinds(called),
        "streamed": "".join(deltas),
        "streamed items": kinds(streamed),
        "again": again.final_output,
        "typed": (await agents.Runner.run(typed, "hi")).final_output.city,
        "tokens": len(tokens),
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2]))))
