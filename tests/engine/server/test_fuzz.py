"""Random requests over every route and field: whatever they say, the server's answer is never a 5xx and it lives on.

A hundred and fifty by default; WARPLOOM_FUZZ=50000 asks for as many.
"""

import os
import random

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="these tests need httpx")

REQUESTS = int(os.environ.get("WARPLOOM_FUZZ", "150"))
TEXTS = [
    "Once",
    "def f(x):",
    "\n\n",
    "é😀",
    "\x00",
    "a" * 300,
    '{"a":',
    "<|im_end|>",
    " ",
    "<tool_call>",
    "</think>",
    "",
]
SCHEMAS = [
    {},
    {"type": "object"},
    {"type": "integer"},
    {"enum": ["a", 1]},
    {"type": "wrong"},
    {"$ref": "#/x"},
    [],
    None,
]


def make_request(rng):
    def text():
        return rng.choice(TEXTS)

    def maybe(fields, share=0.25):
        return {name: make() for name, make in fields.items() if rng.random() < share}

    def content(kind="text"):
        parts = [{"type": kind, "text": text()}, {"type": "image_url"}, {"type": kind}, 5]
        return rng.choice([text(), text(), [rng.choice(parts)], None])

    def tool(flat=False):
        names = ["f", "g.h", "", "a" * 65, "é"]
        function = {"name": rng.choice(names), **maybe({"parameters": lambda: rng.choice(SCHEMAS)}, 0.7)}
        anthropic = {"name": function["name"], "input_schema": rng.choice(SCHEMAS)}
        other = {"type": rng.choice(["web_search", "namespace", 5])}
        return rng.choice([{"type": "function", **(function if flat else {"function": function})}, anthropic, other])

    def choice():
        named = {"type": "function", "function": {"name": "f"}}
        return rng.choice(["auto", "none", "required", named, {"type": "any"}, {"type": "tool", "name": "f"}])

    def message():
        call = {"type": "function", "function": {"name": text(), "arguments": rng.choice(["{}", "[]", "{", '{"a":1}'])}}
        extra = {"tool_calls": lambda: [call], "tool_call_id": text, "reasoning_content": text, "name": text}
        role = rng.choice(["user", "user", "assistant", "system", "tool", "developer", "nobody"])
        return {"role": role, "content": content(), **maybe(extra, 0.1)}

    def item():
        kinds = [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}, {"type": "reasoning"}]
        kinds += [{"type": "function_call_output", "call_id": "1", "output": content()}, message(), message()]
        return rng.choice(kinds)

    def block():
        kinds = [{"type": "tool_use", "id": "1", "name": "f", "input": rng.choice([{}, 5])}, {"type": "thinking"}]
        kinds += [{"type": "tool_result", "tool_use_id": "1", "content": content()}, {"type": "text", "text": text()}]
        return {"role": rng.choice(["user", "assistant"]), "content": rng.choice([text(), [rng.choice(kinds)]])}

    numbers = {
        "temperature": lambda: rng.choice([0, 1e-40, 0.5, 2, 3, "1"]),
        "top_p": lambda: rng.choice([0, 1e-3, 0.9, 1]),
        "top_k": lambda: rng.choice([-1, 0, 1, 2**31 - 1, 2**31]),
    }
    sampling = {
        **numbers,
        "min_p": lambda: rng.random(),
        "repetition_penalty": lambda: rng.choice([0.01, 1, 10]),
        "n": lambda: rng.choice([1, 2, 3]),
        "min_tokens": lambda: rng.choice([0, 1, 3, 99]),
        "priority": lambda: rng.choice([0, 5, -1]),
        "cache_salt": text,
        "truncate_prompt_tokens": lambda: rng.choice([-1, 0, 1, 9]),
        "stop": lambda: rng.choice(["e", ["a", "\n"], "", []]),
        "logit_bias": lambda: {str(rng.randrange(300)): rng.uniform(-100, 100)},
        "regex": lambda: rng.choice(["a*", "(", "[a-z]{1,3}"]),
        "choice": lambda: rng.choice([["a", "ab"], [], ["😀"]]),
        "response_format": lambda: {"type": "json_schema", "json_schema": {"schema": rng.choice(SCHEMAS)}},
        "stream": lambda: True,
        "unknown": lambda: 1,
    }
    chat = {
        "tools": lambda: [tool() for _ in range(rng.choice([1, 2]))],
        "tool_choice": choice,
        "parallel_tool_calls": lambda: rng.choice([True, False]),
        "reasoning_effort": lambda: rng.choice(["none", "high", "x"]),
        "chat_template_kwargs": lambda: rng.choice([{"self": 1}, {"enable_thinking": False}, {"tools": 1}, {}]),
        "continue_final_message": lambda: True,
        "add_generation_prompt": lambda: False,
        "logprobs": lambda: True,
    }
    few = {"max_tokens": rng.choice([1, 2, 7, 30, 500])}
    agent = {**numbers, "tools": lambda: [tool(flat=True)], "tool_choice": choice, "stream": lambda: True}
    items = [item() for _ in range(rng.choice([0, 1, 2, 3]))]
    turns = {"messages": [block() for _ in range(rng.choice([0, 1, 2, 3]))], **few}
    more = {
        "instructions": text,
        "text": lambda: {"format": {"type": "json_object"}},
        "reasoning": lambda: {"effort": 5},
    }
    pooling = {
        "pooling": lambda: rng.choice(["mean", "last", "max"]),
        "encoding_format": lambda: rng.choice(["float", "base64", "hex"]),
        "dimensions": lambda: rng.choice([32, 1, 0]),
        "truncate_prompt_tokens": lambda: rng.choice([-1, 0, 9]),
    }
    return rng.choice(
        [
            ("/v1/completions", {"prompt": rng.choice([text(), [1, 2], [300], [[]], []]), **few, **maybe(sampling)}),
            (
                "/v1/chat/completions",
                {
                    "messages": [message() for _ in range(rng.choice([0, 1, 2]))],
                    **few,
                    **maybe({**sampling, **chat}, 0.12),
                },
            ),
            (
                "/v1/responses",
                {"input": rng.choice([text(), items]), "max_output_tokens": 9, **maybe(more)},
            ),
            ("/v1/messages", {**turns, **maybe({**agent, "system": text, "thinking": lambda: {"type": "enabled"}})}),
            ("/v1/messages/count_tokens", turns),
            (
                "/v1/embeddings",
                {"input": rng.choice([text(), [1, 2], [300], [text(), text()], [[]]]), **maybe(pooling)},
            ),
            ("/v1/score", {"text_1": text(), "text_2": rng.choice([text(), [text(), text()]]), **maybe(pooling)}),
        ]
    )


@pytest.mark.timeout(300 + REQUESTS // 20)
def test_random_requests_never_cause_a_server_error(client, server):
    rng, statuses = random.Random(int(os.environ.get("WARPLOOM_FUZZ_SEED", "0"))), {}
    for _ in range(REQUESTS):
        path, body = make_request(rng)
        answer = client.post(path, json=body)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500 and "engine failed" not in answer.text, (path, body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"], (path, body)
    assert {200, 400} <= statuses.keys()
    server.assert_nothing_left()
