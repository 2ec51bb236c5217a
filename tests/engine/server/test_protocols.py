"""Responses and Messages through their vendors' own clients, and agents' loops over a model that follows a script."""

import json

import pytest

from .conftest import serving

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("llguidance", reason="the script is a grammar")
httpx = pytest.importorskip("httpx", reason="these tests need httpx")
openai = pytest.importorskip("openai", reason="needs openai")
anthropic = pytest.importorskip("anthropic", reason="needs anthropic")

TEMPLATE = "{# <tool_call> <think> tojson tools #}{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}:"
CALL = '<think>look</think>Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
ANSWER = "It is sunny in Bern."
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture(scope="module")
def scripted():
    """A model that calls the tool, and answers once it has the result."""
    from warploom.engine.server import handlers

    plan_chat = handlers.plan_chat

    def script(tokenizer, body, *rest):
        plan = plan_chat(tokenizer, body, *rest)
        done = body.messages[-1].role == "tool" or not body.tools
        return handlers.replace(plan, grammar={"choice": (ANSWER if done else CALL,)})

    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(handlers, "plan_chat", script)
        server.bridge.llm.tokenizer.chat_template = TEMPLATE
        yield server


@pytest.fixture
def api(scripted):
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as api:
        yield api


@pytest.fixture
def claude(scripted):
    with anthropic.Anthropic(base_url=scripted.url, api_key="none", max_retries=0) as claude:
        yield claude


def test_responses_client_streams_what_it_gets_whole(api):
    whole = api.responses.create(model="tiny", input="hi", instructions="be brief")
    assert whole.output_text == ANSWER and whole.status == "completed" and whole.usage.output_tokens == len(ANSWER)
    events = list(api.responses.create(model="tiny", input=[{"role": "user", "content": "hi"}], stream=True))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].response.output_text == ANSWER
    with api.responses.stream(model="tiny", input="hi") as stream:
        assert stream.get_final_response().output_text == ANSWER
    cut = api.responses.create(model="tiny", input="hi", max_output_tokens=4)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output_text == ANSWER[:4]


@pytest.mark.parametrize("stream", [False, True])
def test_responses_loop_calls_a_tool_and_answers(api, stream):
    tools = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]
    items = [{"role": "user", "content": "weather in Bern?"}]

    def ask():
        options = {"model": "tiny", "input": items, "tools": tools, "store": False}
        if not stream:
            return api.responses.create(**options)
        with api.responses.stream(**options) as events:
            return events.get_final_response()

    first = ask()
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    call = first.output[-1]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Bern"})
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert ask().output_text == ANSWER


def test_responses_pass_over_tools_they_do_not_know(scripted):
    body = {
        "input": "hi",
        "tools": [{"type": "web_search"}, {"type": "namespace", "tools": []}],
        "prompt_cache_key": "x",
    }
    answer = httpx.post(f"{scripted.url}/v1/responses", json={**body, "reasoning": {"effort": "high"}}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-warploom-ignored"] == "prompt_cache_key, tools.web_search, tools.namespace"
    refused = httpx.post(f"{scripted.url}/v1/responses", json={"input": "hi", "previous_response_id": "x"}, timeout=60)
    assert refused.status_code == 400 and "keeps no conversations" in refused.json()["error"]["message"]


def test_messages_client_streams_what_it_gets_whole(claude):
    ask = {"model": "tiny", "max_tokens": 4000, "messages": [{"role": "user", "content": "hi"}], "system": "be brief"}
    whole = claude.messages.create(**ask)
    assert [block.text for block in whole.content] == [ANSWER] and whole.stop_reason == "end_turn"
    assert whole.usage.output_tokens == len(ANSWER)
    with claude.messages.stream(**ask) as stream:
        assert "".join(stream.text_stream) == ANSWER
        assert stream.get_final_message().usage.output_tokens == len(ANSWER)
    cut = claude.messages.create(**{**ask, "max_tokens": 4})
    assert cut.content[0].text == ANSWER[:4] and cut.stop_reason == "max_tokens"
    stopped = claude.messages.create(**ask, stop_sequences=["in B"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "in B")
    count = claude.messages.count_tokens(model="tiny", messages=ask["messages"], system=ask["system"])
    assert count.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_messages_loop_calls_a_tool_and_answers(claude, stream):
    tools = [{"name": "weather", "input_schema": PARAMETERS, "cache_control": {"type": "ephemeral"}}]
    tools.append({"type": "web_search_20250305", "name": "web_search"})
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather?", "cache_control": {"type": "ephemeral"}}]}
    ]

    def ask():
        options = {"model": "tiny", "max_tokens": 300, "messages": messages, "tools": tools}
        if not stream:
            return claude.messages.create(**options)
        with claude.messages.stream(**options) as events:
            return events.get_final_message()

    first = ask()
    assert [block.type for block in first.content] == [
        "thinking",
        "text",
        "tool_use",
    ] and first.stop_reason == "tool_use"
    call = first.content[-1]
    assert (call.name, call.input) == ("weather", {"city": "Bern"})
    messages.append({"role": "assistant", "content": [block.model_dump() for block in first.content]})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    messages.append({"role": "user", "content": [result]})
    last = ask()
    assert last.content[0].text == ANSWER and last.stop_reason == "end_turn"


def test_chat_loop_through_langchain_calls_a_tool(scripted):
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    from langchain_core.messages import HumanMessage, ToolMessage

    chat = langchain.ChatOpenAI(model="tiny", base_url=f"{scripted.url}/v1", api_key="none")
    tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    turns = [HumanMessage("weather?")]
    turns.append(chat.bind_tools([tool]).invoke(turns))
    (call,) = turns[-1].tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Bern"})
    turns.append(ToolMessage("sunny", tool_call_id=call["id"]))
    assert chat.bind_tools([tool]).invoke(turns).content == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_agent_of_pydantic_ai_calls_its_tool(scripted, stream):
    pytest.importorskip("pydantic_ai", reason="needs pydantic-ai-slim")
    models = pytest.importorskip("pydantic_ai.models.openai", reason="needs pydantic-ai-slim[openai]")
    from pydantic_ai import Agent
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{scripted.url}/v1", api_key="none")
    agent, asked = Agent(models.OpenAIChatModel("tiny", provider=provider)), []

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "sunny"

    async def read(_, events):
        async for _ in events:
            pass

    said = agent.run_sync("weather?", event_stream_handler=read if stream else None).output
    assert (asked, said) == (["Bern"], ANSWER)


def test_errors_are_of_the_clients_own_classes(claude, api):
    with pytest.raises(anthropic.BadRequestError, match="image"):
        part = [{"type": "image", "source": {"type": "url", "url": "http://x"}}]
        claude.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": part}])
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", max_tokens=9, messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="input"):
        api.responses.create(model="tiny", input=[{"type": "item_reference", "id": "x"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        api.responses.create(model="tiny", input="x", temperature=9)


def test_key_is_taken_from_either_header():
    with serving(keys=("secret",)) as server:
        ask = {"max_tokens": 3, "messages": [{"role": "user", "content": "x"}]}
        for headers, status in (({"x-api-key": "secret"}, 200), ({"x-api-key": "wrong"}, 401), ({}, 401)):
            assert httpx.post(f"{server.url}/v1/messages", json=ask, headers=headers, timeout=60).status_code == status
