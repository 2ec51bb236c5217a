"""Tool calls and reasoning in the formats of many models: read, streamed and forced."""

import json
import random
import time
from pathlib import Path

import pytest

from warploom.engine.server.openai.message_reader import Delta, make_reader
from warploom.engine.server.openai.tool_formats import FORMATS, format_of, thoughts_of

from .conftest import CONTEXT, serving

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="these tests need httpx")

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "enum": [1, 20]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": SCHEMA, "note.1": {"type": "object", "properties": {"text": {"type": "string"}}}}
CALLS = [("weather", {"city": "Oslo", "days": 20}), ("note.1", {"text": 'a "b" {\n</x> é'})]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "ping"}}
ONE, TWO = (json.dumps(arguments, ensure_ascii=False) for _, arguments in CALLS)
RAW = CALLS[1][1]["text"]
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {ONE}}}\n</tool_call>\n'
    f'<tool_call>{{"arguments":{TWO}, "name":"note.1"}}</tool_call>',
    "llama3": f'{{"name": "weather", "parameters": {ONE}}}; {{"name": "note.1", "parameters": {TWO}}}',
    "mistral-list": f'[TOOL_CALLS][{{"name": "weather", "arguments": {ONE}, "id": "x"}}, '
    f'{{"name": "note.1", "arguments": {TWO}}}]',
    "mistral": f"[TOOL_CALLS]weather[ARGS]{ONE}[TOOL_CALLS]note.1[CALL_ID]a1[ARGS]{TWO}",
    "qwen3-coder": "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n20\n"
    f"</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=note.1>\n<parameter=text>\n{RAW}\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
    f"<arg_value>20</arg_value>\n</tool_call>\n<tool_call>note.1\n<arg_key>text</arg_key>\n<arg_value>{RAW}"
    "</arg_value>\n</tool_call>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    f"```json\n{ONE}\n```<｜tool▁call▁end｜>\n"
    f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>note.1\n```json\n{TWO}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-3.1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ONE}<｜tool▁call▁end｜>"
    f"<｜tool▁call▁begin｜>note.1<｜tool▁sep｜>{TWO}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "harmony": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ONE}<|end|><|start|>assistant "
    f"to=functions.note.1<|channel|>commentary json<|message|>{TWO}",
    "gemma": '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:20}<tool_call|>'
    f'<|tool_call>call:note.1{{text:<|"|>{RAW}<|"|>}}<tool_call|>',
}
ROWS = {row.name: row for row in FORMATS}
BAD = [
    '<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"x": 1e999}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"x": "\\ud83d"}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "unlisted", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": ' + "[" * 1500 + "]" * 1500 + "}</tool_call>",
    '<tool_call>{"name": "weather", "arguments": ' + "[" * 1500,
    "<tool_call>junk</tool_call> more <tool_call",
    '<tool_call>{"name": 5}</tool_call>',
]


def template_of(row):
    """A chat template that shows the row's marks, and hardly any prompt."""
    marks = " ".join([*row.marks, "tools", "tojson"]).replace("#}", "")
    return f"{{# {marks} #}}{{{{ messages[0].content }}}}:"


def read(reader, pieces):
    delta = Delta()
    for piece in pieces:
        delta += reader.read(piece, final=False)
    return delta + reader.read("")


def cut(text, rng):
    places = sorted(rng.choices(range(len(text) + 1), k=rng.choice([1, 4, len(text)])))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


def plain(delta):
    calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in delta.whole_calls()]
    assert [number for number, call in delta.calls if "id" in call] == [*range(len(calls))]
    return delta.reasoning, delta.content, calls


def reads_alike(make, text):
    """What a reader makes of a text, however it is cut."""
    rng, whole = random.Random(0), plain(read(make(), [text]))
    for _ in range(60):
        assert plain(read(make(), cut(text, rng))) == whole
    assert plain(read(make(), text)) == whole
    return whole


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_of_each_format_are_read_alike_in_pieces(name):
    row, before = ROWS[name], "" if ROWS[name].only_first else "I look it up.\n"
    if name == "harmony":
        before = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
    thoughts = row.thoughts if name == "harmony" else None
    said = reads_alike(lambda: make_reader(row, SCHEMAS, thoughts, None), before + WRITTEN[name])
    assert said == ("", "I look it up." if before else "", CALLS)


@pytest.mark.parametrize("name", [row.name for row in FORMATS if row.heads])
def test_arguments_come_as_they_are_written(name):
    """Cut anywhere, they are those of one piece; a half-written call has its name and half of its arguments."""
    row, before = ROWS[name], "" if ROWS[name].only_first else "I look it up.\n"

    def make():
        return make_reader(row, SCHEMAS, None, None, eager=True)

    text = forced(row, CALLS)
    assert reads_alike(make, before + text) == ("", before.strip(), CALLS)
    reader = make()
    delta = reader.read(before + text[: text.index("Oslo") + 1], final=False)
    ((_, first), *more) = delta.calls
    assert first["function"] == {"name": "weather", "arguments": ""} and len(more) == (row.style == "json")
    pieces = [call["function"]["arguments"] for _, call in make().read(before + text).calls]
    streamed = read(make(), before + text)
    assert len(streamed.calls) > len(pieces) and streamed.whole_calls()[0]["function"]["arguments"] == ONE


@pytest.mark.parametrize("name", [row.name for row in FORMATS if row.heads])
def test_cut_call_leaves_nothing_of_its_frame(name):
    """Wherever `max_tokens` cuts a forced text, what stands around the arguments is no content."""
    row = ROWS[name]
    text = forced(row, CALLS)
    for end in range(text.index(row.mark) + len(row.mark), len(text) + 1):
        said = make_reader(row, SCHEMAS, None, None, eager=True).read(text[:end])
        assert not said.content.strip(), text[:end]


def forced(row, calls):
    """Calls exactly as a grammar of the format has them written."""

    def one(name, arguments):
        pairs = {
            "json": json.dumps(arguments, ensure_ascii=False),
            "function": "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items()),
            "argument": "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in arguments.items()),
        }
        before, _, after = row.call.replace("NAME", name).rpartition("ARGS")
        return before + pairs[row.style] + after

    return row.begin + row.between.join(one(*call) for call in calls) + row.end


def test_every_format_is_recognized_by_its_own_template():
    assert set(WRITTEN) == set(ROWS)
    for row in FORMATS:
        assert format_of(template_of(row)) is row
    assert format_of("<tool_call> without") is None and format_of("tools in no known way") is None


def test_published_templates_have_their_formats():
    trl = pytest.importorskip("trl", reason="needs the chat templates that trl brings")
    published = {
        "hermes": ["qwen2_5", "qwen3", "qwen3_instruct_2507"],
        "qwen3-coder": ["qwen3_5_think", "qwen3_6"],
        "llama3": ["llama3_1", "llama3_2"],
        "glm": ["glm4moe"],
        "gemma": ["gemma4"],
        "harmony": ["gptoss"],
        None: ["deepseekv3", "phi3", "gemma3", "llama3"],
    }
    for wanted, names in published.items():
        for name in names:
            found = format_of((Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text())
            assert (found and found.name) == wanted, name


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_only_looks_like_a_call_stays_text(text):
    reasoning, content, calls = reads_alike(lambda: make_reader(ROWS["hermes"], SCHEMAS, None, None), text)
    assert (reasoning, content, calls) == ("", text, [])


HALVES = {"hermes": '<tool_call>{"', "mistral": "[TOOL_CALLS]f[ARGS]{", "mistral-list": "[TOOL_CALLS]["}


@pytest.mark.parametrize("name", HALVES)
def test_begun_calls_are_read_in_linear_time(name):
    """Each of them was read to the end of the text: a second for 40 kB, on the event loop."""

    def seconds(count):
        start = time.process_time()
        assert plain(read(make_reader(ROWS[name], SCHEMAS, None, None), [HALVES[name] * count]))[2] == []
        return time.process_time() - start

    seconds(10)
    assert min(seconds(2000) for _ in range(3)) < 12 * min(seconds(400) for _ in range(3))


@pytest.mark.parametrize("name", WRITTEN)
def test_random_texts_of_marks_are_read_alike_in_pieces(name):
    row, rng = ROWS[name], random.Random(1)
    words = [*row.opens, WRITTEN[name][:40], WRITTEN[name][-30:], " ", "\n", "x", "{", "}", '"', ";", *row.thoughts]
    for _ in range(30):
        text = "".join(rng.choices(words, k=8))
        for state in (None, "free", "inside"):
            reads_alike(lambda state=state: make_reader(row, SCHEMAS, row.thoughts, state), text)


def test_reasoning_is_split_from_the_answer():
    def said(text, state, row=None):
        return reads_alike(lambda: make_reader(row, SCHEMAS if row else {}, ("<think>", "</think>"), state), text)

    assert said("<think>\nhm\n\nhm\n</think>\n\nyes\n", "free") == ("hm\n\nhm", "yes\n", [])
    assert said("hm</think>yes", "inside") == ("hm", "yes", [])
    assert said("  yes <think>", "free") == ("", "  yes <think>", [])
    assert said("<think>cut", "free") == ("cut", "", [])
    called = said("<think>hm</think>\n\n" + WRITTEN["hermes"], "free", ROWS["hermes"])
    assert called == ("hm", "", CALLS)
    harmony = lambda: make_reader(None, {}, ROWS["harmony"].thoughts, "free")  # noqa: E731
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes"
    assert reads_alike(harmony, text) == ("hm", "yes", [])
    assert reads_alike(harmony, '{"no": "head"}') == ("", '{"no": "head"}', [])
    assert thoughts_of("no such thing") is None and thoughts_of("{{ '<think>' }}") == ("<think>", "</think>")


# -- over HTTP --------------------------------------------------------------------------------------------------------


def ask(client, monkeypatch, server, row, **body):
    monkeypatch.setattr(server.bridge.llm.tokenizer, "chat_template", template_of(row))
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [OTHER, TOOL],
        "seed": 3,
        "logit_bias": {"60": -50},
        **body,
    }
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_forced_arguments_are_streamed_in_pieces(client, server, monkeypatch):
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    runner, launch = server.bridge.llm.engine.runner, server.bridge.llm.engine.runner.launch

    def launch_once_delivered(plan):  # on a busy machine the event loop would find several tokens at once
        for _ in range(3):
            server.bridge._let_loop_turn()
        return launch(plan)

    monkeypatch.setattr(runner, "launch", launch_once_delivered)
    answer = ask(client, monkeypatch, server, ROWS["hermes"], stream=True, tools=[TOOL], tool_choice="required")
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    parts = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert parts[0]["id"] and parts[0]["function"] == {"name": "weather", "arguments": ""}
    assert len(parts) > 2 and all(part.keys() == {"index", "function"} for part in parts[1:])


def joined(stream):
    """The message that a stream's chunks add up to, and why it ended."""
    message, reason = {"content": "", "tool_calls": []}, None
    for line in stream.text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            reason = choice["finish_reason"] or reason
            message["content"] += choice["delta"].get("content") or ""
            message["tool_calls"] += [(call["index"], call) for call in choice["delta"].get("tool_calls", [])]
    message["tool_calls"] = Delta(calls=message["tool_calls"]).whole_calls()
    return message, reason


@pytest.mark.parametrize("name", WRITTEN)
def test_forced_call_satisfies_its_schema_in_each_format(name, client, server, monkeypatch):
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    row = ROWS[name]
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ({"tool_choice": "required", "tools": [TOOL], "parallel_tool_calls": False}, {"tool_choice": named}):
        whole = ask(client, monkeypatch, server, row, **choice).json()["choices"][0]
        (call,) = whole["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        assert call["function"]["name"] == "weather" and whole["finish_reason"] == "tool_calls"
        message, reason = joined(ask(client, monkeypatch, server, row, stream=True, **choice))
        assert reason == "tool_calls" and message["content"] == ""
        assert [each["function"] for each in message["tool_calls"]] == [call["function"]]


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_allowed_tools_bind_calls_and_leave_the_prompt(client, server, monkeypatch):
    """All tools are shown, so that the cached prefix serves whichever are allowed; only those are called."""
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    prompts = set()
    for name in ("weather", "ping"):
        for seed in range(4):
            choice = {"tool_choice": allowed("required", name), "seed": seed, "parallel_tool_calls": False}
            answer = ask(client, monkeypatch, server, ROWS["hermes"], **choice).json()
            (call,) = answer["choices"][0]["message"]["tool_calls"]
            assert call["function"]["name"] == name
            prompts.add(answer["usage"]["prompt_tokens"])
        flat = [{"type": "function", **tool["function"]} for tool in (OTHER, TOOL)]
        named = [{"type": "function", "name": name}, {"type": "web_search"}]
        choice = {"type": "allowed_tools", "mode": "required", "tools": named}
        said = client.post("/v1/responses", json={"input": "hi", "tools": flat, "tool_choice": choice}).json()
        assert {item["name"] for item in said["output"] if item["type"] == "function_call"} == {name}
    assert len(prompts) == 1
    free = ask(client, monkeypatch, server, ROWS["hermes"], max_tokens=4, tool_choice=allowed("auto", "ping")).json()
    assert {free["usage"]["prompt_tokens"]} == prompts


def test_call_of_a_tool_that_is_not_allowed_stays_text():
    from warploom.engine.server.openai.chat import plan_chat
    from warploom.engine.server.openai.requests import ChatRequest

    from .conftest import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = template_of(ROWS["hermes"])
    hi = [{"role": "user", "content": "hi"}]
    choice = allowed("auto", "note")
    tools = [TOOL, {"type": "function", "function": {"name": "note"}}]
    plan = plan_chat(tokenizer, ChatRequest(messages=hi, tools=tools, tool_choice=choice))
    said = [f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in ("note", "weather")]
    assert plain(plan.reader().read(said[0])) == ("", "", [("note", {})])
    assert plain(plan.reader().read(said[1])) == ("", said[1], [])
    assert len(plan.tools) == 2 and "note" in plan.trigger.grammar and "weather" not in plan.trigger.grammar


class Led:
    """A grammar behind a text that the model has to write first, token by token."""

    error, finished = None, False

    def __init__(self, bound, tokens):
        self.bound, self.left = bound, tokens

    @property
    def active(self):
        return bool(self.left) or self.bound.active

    def accept(self, token):
        self.left = self.left[1:]
        self.bound.accept(token)

    def mask(self, logits):
        if self.left:
            kept = logits[self.left[0]].clone()
            logits.fill_(-float("inf"))[self.left[0]] = kept
        else:
            self.bound.mask(logits)


SAID_BEFORE = {
    "llama3": " ",
    "harmony": "<|channel|>analysis<|message|>I say to=functions.x<|end|><|start|>assistant<|channel|>commentary ",
}


@pytest.mark.parametrize("name", [row.name for row in FORMATS])
def test_call_that_is_begun_freely_satisfies_its_schema(name, client, server, monkeypatch):
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    from warploom.engine.server.openai.chat import Trigger

    row, bind = ROWS[name], Trigger.bind
    lead = list((SAID_BEFORE.get(name, "Yes <tool ") + row.mark).encode())
    monkeypatch.setattr(Trigger, "bind", lambda self, *rest: lambda: Led(bind(self, *rest)(), lead))
    whole = ask(client, monkeypatch, server, row, tools=[TOOL]).json()["choices"][0]
    (call, *_) = whole["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    assert call["function"]["name"] == "weather"
    message, reason = joined(ask(client, monkeypatch, server, row, tools=[TOOL], stream=True))
    assert reason == whole["finish_reason"] and message["content"] == (whole["message"]["content"] or "")
    assert [each["function"] for each in message["tool_calls"]] == [
        each["function"] for each in whole["message"]["tool_calls"]
    ]
    server.assert_nothing_left()


def test_harmony_call_ends_with_its_special_token(monkeypatch):
    """gpt-oss writes its marks as tokens; the one behind a call ends the generation."""
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    from warploom.engine.config import ModelConfig
    from warploom.engine.model import Transformer
    from warploom.engine.server.openai.chat import Trigger
    from warploom.engine.serving import LLM
    from warploom.tokenizer import BPETokenizer

    marks = ["<|endoftext|>", *(f"<|{name}|>" for name in ["start", "end", "message", "channel", "constrain", "call"])]
    ids = {mark: 256 + number for number, mark in enumerate(marks)}
    tokenizer = BPETokenizer({bytes([byte]): byte for byte in range(256)}, [], ids, "gpt4")
    tokenizer.chat_template = template_of(ROWS["harmony"])
    said = f"{SAID_BEFORE['harmony']}to=functions."
    lead, bind = list(tokenizer.encode(said, tokenizer.special.ids)), Trigger.bind
    monkeypatch.setattr(Trigger, "bind", lambda self, *rest: lambda: Led(bind(self, *rest)(), lead))

    def make():
        model = Transformer(ModelConfig(vocab_size=264, d_model=32, n_layers=2, n_heads=2, max_seq_len=CONTEXT))
        llm = LLM(model.eval(), tokenizer)
        llm.engine.eos |= {ids["<|call|>"]}
        return llm

    with serving(make) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "seed": 1}
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "I say to=functions.x"


def test_tool_choice_that_cannot_be_met_is_refused(client, server, monkeypatch):
    monkeypatch.setattr(server.bridge.llm.tokenizer, "chat_template", template_of(ROWS["hermes"]))
    hi = {"messages": [{"role": "user", "content": "hi"}]}
    cases = [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "nobody"}}, "tools": [TOOL]},
        {"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}},
        {"tool_choice": allowed("auto", "weather", "nobody"), "tools": [TOOL]},
        {"reasoning_effort": "high"},
    ]
    for case in cases:
        refused = client.post("/v1/chat/completions", json={**hi, **case})
        assert refused.status_code == 400 and refused.json()["error"]["param"] in case, refused.text


STRANGE = [{"properties": []}, {"properties": {"a": 5, "b": {"enum": 7}}, "required": 3}, {"required": [[]]}]


@pytest.mark.parametrize("name", ["qwen3-coder", "glm", "gemma", "hermes"])
def test_strange_schemas_are_no_server_error(name, client, server, monkeypatch):
    monkeypatch.setattr(server.bridge.llm.tokenizer, "chat_template", template_of(ROWS[name]))
    for parameters in STRANGE:
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "max_tokens": 150, "seed": 1}
        for choice in ("required", "auto"):
            answer = client.post("/v1/chat/completions", json={**body, "tool_choice": choice})
            assert answer.status_code in (200, 400), answer.text
    for row in (ROWS["qwen3-coder"], ROWS["glm"]):
        read(make_reader(row, {"weather": STRANGE[0]}, None, None), [WRITTEN[row.name]])
    server.assert_nothing_left()


def test_json_comes_after_reasoning_where_the_model_reasons(client, server, monkeypatch):
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
    monkeypatch.setattr(server.bridge.llm.tokenizer, "chat_template", template)
    body = {"messages": [{"role": "user", "content": "hi"}], "seed": 1, "logit_bias": {"60": 12}}  # <
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for effort in ("none", "high"):
        answer = client.post("/v1/chat/completions", json={**body, "reasoning_effort": effort}).json()
        message = answer["choices"][0]["message"]
        if answer["choices"][0]["finish_reason"] == "stop":
            assert json.loads(message["content"])["city"] in ("Oslo", "Rome")
        assert effort == "high" or "reasoning_content" not in message
    server.assert_nothing_left()
