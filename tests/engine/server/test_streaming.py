"""The streaming law through HTTP: joined deltas are the text; no empty chunk, no broken character, no stop string."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

httpx = pytest.importorskip("httpx", reason="these tests need httpx")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
OPEN, CLOSE = "<tool_call>", "</tool_call>"


def read(client, path, body):
    """All events of a stream; the last one must be the end mark."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


stops = st.lists(st.text(st.characters(max_codepoint=126), min_size=1, max_size=2), max_size=3)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), stop=stops, tokens=st.integers(1, 60), echo=st.booleans(), scored=st.booleans())
def test_joined_chunks_are_the_whole_answer(server, seed, stop, tokens, echo, scored):
    body = {"prompt": "é↗", "seed": seed, "stop": stop, "max_tokens": tokens, "echo": echo, "temperature": 0.7}
    body["logprobs"] = 1 if scored else None
    with httpx.Client(base_url=server.url, timeout=60) as client:
        whole = client.post("/v1/completions", json=body).json()["choices"][0]
        chunks = [event["choices"][0] for event in read(client, "/v1/completions", body)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    assert all(chunk["text"] and chunk["finish_reason"] is None for chunk in chunks[:-1])
    assert not any(mark in whole["text"].removeprefix("é↗" if echo else "") for mark in stop)
    if scored:
        for field, values in whole["logprobs"].items():
            assert [value for chunk in chunks for value in chunk["logprobs"][field]] == values
        assert len(whole["logprobs"]["tokens"]) == len(whole["logprobs"]["text_offset"])


texts = st.lists(
    st.one_of(
        st.text(alphabet="<tool_cal>/{}\n ab", max_size=20),
        st.just(f'{OPEN}{{"name": "look", "arguments": {{"q": "x"}}}}{CLOSE}'),
        st.just(f"{OPEN}not json{CLOSE}"),
        st.just(OPEN),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=200)
@given(texts, st.data())
def test_tool_calls_read_alike_however_cut(text, data):
    """Tool calls are read alike however the text is cut."""
    from warploom.engine.server.openai.message_reader import Delta, make_reader
    from warploom.engine.server.openai.tool_formats import format_of

    def read_all(pieces):
        reader, said = make_reader(format_of(f"tools {OPEN}"), {"look": {}}, None, None), Delta()
        for piece in pieces:
            said += reader.read(piece, final=False)
        said += reader.read("")
        return said.content, [(number, call["function"]) for number, call in said.calls]

    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    assert read_all(pieces) == read_all([text])


def test_a_tool_call_becomes_a_message_with_tool_calls(client):
    """The model is random, so its text is dictated: it has one choice."""
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "?"}], "tools": [tool], "choice": [call], "max_tokens": 100}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    function = choice["message"]["tool_calls"][0]["function"]
    assert function["name"] == "weather" and json.loads(function["arguments"]) == {"city": "Bern"}
    deltas = [event["choices"][0]["delta"] for event in read(client, "/v1/chat/completions", body)]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["function"] for call in calls] == [function] and calls[0]["index"] == 0
    assert not any(delta.get("content") for delta in deltas)
