"""Tool-call formats of model families, one row each, recognized by the chat template.

    Hermes, Qwen       <tool_call>{"name": "f", "arguments": {…}}</tool_call>
    Llama 3            {"name": "f", "parameters": {…}}
    Mistral            [TOOL_CALLS][{"name": "f", "arguments": {…}}]   or   [TOOL_CALLS]f[ARGS]{…}
    Qwen3-Coder        <tool_call><function=f><parameter=x>…</parameter></function></tool_call>
    GLM                <tool_call>f<arg_key>x</arg_key><arg_value>…</arg_value></tool_call>
    DeepSeek           <｜tool▁call▁begin｜>f<｜tool▁sep｜>{…}<｜tool▁call▁end｜>
    gpt-oss (harmony)  <|channel|>commentary to=functions.f <|message|>{…}
    Gemma 4            <|tool_call>call:f{x:<|"|>…<|"|>}<tool_call|>

A row says how a call is found (`opens`), read (`scan`) and forced (`call`, NAME and ARGS standing for what varies).
`tool_grammar.py` makes grammars of it, `message_reader.py` reads what the model writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex
from pydantic_core import from_json

Schemas = Mapping[str, dict]  # of a tool's arguments, by its name
Call = tuple[str, dict]  # a name and arguments
# What stands at the beginning of a text: a length, and the calls that it is (none: text); None: more must come.
Scan = tuple[int, list[Call]] | None
Scanner = Callable[[str, Schemas, bool], Scan]
TEXT: Scan = (1, [])  # it only began like a call
BEGINNING = 4096  # characters that tell whether something is JSON


def scan_json(head: str, tail: str) -> Scanner:
    """Scanner of JSON between two patterns: arguments if the head has a group `name`, else a call or a list."""
    heads, tails = regex.compile(head), regex.compile(tail)

    def scan(text: str, schemas: Schemas, final: bool) -> Scan:
        begin = heads.match(text, partial=not final)
        if begin is None:
            return TEXT
        end = None if begin.partial else end_of_json(text, begin.end())
        if end is None:
            return TEXT if final else None
        value = read_json(text[begin.end() : end])
        close = tails.match(text, end, partial=not final)
        if close is not None and close.partial:
            return None
        name = begin.groupdict().get("name")
        given = value if name is None else {"name": name, "arguments": value}
        calls = [_call(each) for each in (given if isinstance(given, list) else [given])]
        return max(close.end() if close else end, 1), [call for call in calls if call] if all(calls) else []

    return scan


# Tags of an argument by style: what its opening tag begins with, its closing tag, and both around name and value.
PAIRS = {
    "function": (
        "<parameter=",
        "</parameter>",
        regex.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", regex.DOTALL),
    ),
    "argument": (
        "<arg_key>",
        "</arg_value>",
        regex.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", regex.DOTALL),
    ),
}


def scan_tagged(close: str, name: str, style: str) -> Scanner:
    """Scanner of tagged arguments; the schema tells strings from JSON values."""
    closes, names, pairs = regex.compile(close), regex.compile(name), PAIRS[style][2]

    def scan(text: str, schemas: Schemas, final: bool) -> Scan:
        end = closes.search(text)
        if end is None:
            return TEXT if final else None
        called = names.match(text)
        if called is None:
            return end.end(), []
        known = properties_of(schemas.get(called[1], {}))
        found = pairs.findall(text, called.end(), end.start())
        return end.end(), [(called[1], {key: typed(value, known.get(key)) for key, value in found})]

    return scan


def scan_gemma(text: str, schemas: Schemas, final: bool) -> Scan:
    """Scanner of Gemma's notation: JSON with bare keys and marks instead of quotes."""
    begin = regex.match(r"<\|tool_call>call:([\w.-]+)(?={)", text, partial=not final)
    if begin is None:
        return TEXT
    parts = text[begin.end() :].split('<|"|>')
    for number, part in enumerate(parts[::2]):
        if (close := part.find("<tool_call|>")) >= 0:
            parts = [*parts[: 2 * number], part[:close]]
            break
    else:
        return TEXT if final else None
    end = begin.end() + len('<|"|>'.join(parts)) + len("<tool_call|>")
    keyed = (regex.sub(r"([{,]\s*)([\w.-]+)\s*:", r'\1"\2":', part) for part in parts)
    value = read_json("".join(json.dumps(parts[i]) if i % 2 else part for i, part in enumerate(keyed)))
    return end, [(begin[1], value)] if isinstance(value, dict) else []


def end_of_json(text: str, start: int) -> int | None:
    """End of the JSON object or list at `start`, if complete; for anything else, `start`.

    Its beginning is parsed first: a text of marks, each before a bracket, would else be read to its end from every one.
    """
    if start == len(text):
        return None
    if text[start] not in "{[" or not _may_be_json(text[start : start + BEGINNING]):
        return start
    depth = 0
    for found in _BRACKETS.finditer(text, start):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0], 0)
        if not depth:
            return found.end()
    return None


def _may_be_json(text: str) -> bool:
    try:
        from_json(text, allow_partial=True)
    except ValueError:
        return False
    return True


def read_json(text: str) -> Any:
    """Parse JSON that any client can read (no NaN, no lone surrogates, at most 200 levels); else None."""
    try:
        value = from_json(text, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is infinite
    except ValueError:
        return None
    return value


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def typed(text: str, schema: Any) -> Any:
    """Convert a tag's text to the type in its schema."""
    if isinstance(schema, dict) and is_text(schema):
        return text
    value = read_json(text)
    return text if value is None and text.strip() != "null" else value


def is_text(schema: dict) -> bool:
    """Return whether a schema describes only a string."""
    choices = schema.get("enum")
    listed = isinstance(choices, list) and bool(choices) and all(isinstance(value, str) for value in choices)
    return listed or (choices is None and schema.get("type") == "string")


def properties_of(schema: dict) -> dict:
    """Properties of an object schema; robust against anything a client sends."""
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


_BRACKETS = regex.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', regex.DOTALL)


@dataclass(frozen=True)
class ToolFormat:
    """Tool-call format of a model family."""

    name: str
    marks: tuple[str, ...]
    """Strings that every chat template of the format holds."""
    opens: tuple[str, ...]
    """Strings that a call may begin with."""
    call: str
    """A call, as a grammar forces it."""
    scan: Scanner
    begin: str = ""
    between: str = ""
    end: str = ""
    close: str = ""
    """Text behind the last call."""
    only_first: bool = False
    """Calls stand at the beginning of the message or behind another one, since `opens` may mean anything elsewhere."""
    style: str = "json"
    """Notation of arguments: json, function, argument (pairs of tags) or gemma."""
    thoughts: tuple[str, str] = ("<think>", "</think>")
    """Marks around the reasoning."""
    trigger: str = ""
    """Marker that begins calls and nothing else, where that is not the first of `opens`."""
    begun: tuple[str, ...] = ()
    """Headers that may precede the arguments of a call under `tool_choice: auto`, where `call` has but one."""
    quiet: tuple[str, str] | None = None
    """Marks around text in which no call begins, as often as there is some."""

    @property
    def mark(self) -> str:
        """Marker that only a call begins with."""
        return self.trigger or self.opens[0]

    @cached_property
    def heads(self) -> tuple[regex.Pattern, regex.Pattern, regex.Pattern | None] | None:
        """Patterns of a forced call: up to its arguments, its end, and both where another follows in a list."""
        if self.style == "gemma" or self.name == "harmony":
            return None
        before, _, rest = self.call.partition("NAME")
        between, _, after = rest.rpartition("ARGS")
        head = rf"{_spaced(before)}(?P<name>[\w.-]{{1,64}}){_spaced(between)}"
        ahead = r"(?=\{)" if self.style == "json" else "(?=<)"
        tail = _spaced(after) + (_spaced(self.end) if self.end else r"(?:\s*;)?" if self.only_first else "")
        following = regex.compile(_spaced(after + self.between) + head + ahead) if self.end else None
        begin = rf"(?:{_spaced(self.begin)})?" if self.begin else ""
        return regex.compile(begin + head + ahead), regex.compile(tail), following


def _spaced(text: str) -> str:
    """Pattern of a text with flexible white space."""
    return r"\s*".join(map(regex.escape, regex.split(r"\s+", text)))


_NAME = r"(?P<name>[\w.-]{1,64})"
FORMATS = (
    ToolFormat(
        "gemma",
        ("<|tool_call>",),
        ("<|tool_call>",),
        "<|tool_call>call:NAMEARGS<tool_call|>",
        scan_gemma,
        style="gemma",
        thoughts=("<|channel>thought\n", "<channel|>"),
    ),
    ToolFormat(
        "harmony",
        ("<|channel|>", "<|message|>"),
        ("<|channel|>",),
        " to=functions.NAME<|channel|>commentary <|constrain|>json<|message|>ARGS",
        scan_json(r"", ""),
        close="<|call|>",
        thoughts=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        trigger="to=functions.",
        begun=tuple(
            f"to=functions.NAME{channel}{kind}<|message|>"
            for channel in ("", "<|channel|>commentary")
            for kind in ("", " json", " <|constrain|>json", "<|constrain|>json")
        ),
        quiet=("<|message|>", "<|end|>"),
    ),
    ToolFormat(
        "deepseek",
        ("<｜tool▁calls▁begin｜>", "```json"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGS\n```<｜tool▁call▁end｜>",
        scan_json(
            rf"(<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>\w+<｜tool▁sep｜>{_NAME}\s*```json\s*",
            r"\s*```<｜tool▁call▁end｜>",
        ),
        begin="<｜tool▁calls▁begin｜>",
        between="\n",
        end="<｜tool▁calls▁end｜>",
        close="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        "deepseek-3.1",
        ("<｜tool▁calls▁begin｜>",),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGS<｜tool▁call▁end｜>",
        scan_json(
            rf"(<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>{_NAME}<｜tool▁sep｜>",
            r"\s*<｜tool▁call▁end｜>",
        ),
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
        close="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]", "[ARGS]"),
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]NAME[ARGS]ARGS",
        scan_json(rf"\[TOOL_CALLS\]{_NAME}(\[CALL_ID\]\w+)?\[ARGS\]\s*", ""),
        thoughts=("[THINK]", "[/THINK]"),
    ),
    ToolFormat(
        "mistral-list",
        ("[TOOL_CALLS]",),
        ("[TOOL_CALLS]",),
        '{"name": "NAME", "arguments": ARGS}',
        scan_json(r"\[TOOL_CALLS\]\s*", ""),
        begin="[TOOL_CALLS][",
        between=", ",
        end="]",
    ),
    ToolFormat(
        "qwen3-coder",
        ("<tool_call>", "<function="),
        ("<tool_call>",),
        "<tool_call>\n<function=NAME>\nARGS</function>\n</tool_call>",
        scan_tagged(
            r"</function>\s*</tool_call>",
            r"<tool_call>\s*<function=([^>]+)>",
            "function",
        ),
        between="\n",
        style="function",
    ),
    ToolFormat(
        "glm",
        ("<tool_call>", "<arg_key>"),
        ("<tool_call>",),
        "<tool_call>NAME\nARGS</tool_call>",
        scan_tagged(
            r"</tool_call>",
            r"<tool_call>\s*([\w.-]+)",
            "argument",
        ),
        between="\n",
        style="argument",
    ),
    ToolFormat(
        "hermes",
        ("<tool_call>",),
        ("<tool_call>",),
        '<tool_call>\n{"name": "NAME", "arguments": ARGS}\n</tool_call>',
        scan_json(r"<tool_call>\s*", r"\s*</tool_call>"),
        between="\n",
    ),
    ToolFormat(
        "llama3",
        ('{"name": ', '"parameters": '),
        ("<|python_tag|>", "{"),
        '{"name": "NAME", "parameters": ARGS}',
        scan_json(r"(<\|python_tag\|>)?\s*", r"\s*;"),
        between="; ",
        only_first=True,
        trigger='{"name": "',
    ),
)


def format_of(template: str | None) -> ToolFormat | None:
    """Tool-call format of a chat template; None if it has no tools or an unknown format."""
    if not template or "tools" not in template:
        return None
    return next((row for row in FORMATS if all(mark in template for mark in row.marks)), None)


def thoughts_of(template: str | None) -> tuple[str, str] | None:
    """Reasoning marks of a chat template, if it has reasoning."""
    row = format_of(template)
    marks = (row.thoughts,) if row else ()
    known = (*marks, ("<think>", "</think>"), FORMATS[1].thoughts)
    return next((pair for pair in known if _shows(template or "", pair)), None)


def _shows(template: str, pair: tuple[str, str]) -> bool:
    if pair == FORMATS[1].thoughts:  # in pieces
        return all(mark in template for mark in FORMATS[1].marks)
    return any(mark.strip() in template for mark in pair)
