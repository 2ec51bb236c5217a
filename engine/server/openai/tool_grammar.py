"""Grammars (llguidance's Lark) for tool calls, and for reasoning before a constrained answer.

`tool_choice` required, or the name of a tool, is a grammar of one or several calls in the model's own format, with
arguments that satisfy the tool's schema. A model that reasons may do so first: a grammar that forbade it would make it
answer without having thought.
"""

from __future__ import annotations

import json
from typing import Any

from .tool_formats import Schemas, ToolFormat, is_text, properties_of, thoughts_of

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}


class Lark:
    """Grammar builder; special tokens inside strings become tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._rules = tokenizer, []

    def rule(self, body: str, options: str = "") -> str:
        """Add a rule; return its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def text(self, text: str) -> str:
        """Exactly this text."""
        special = self._tokenizer.special
        parts = special.split(text, special.ids)
        return " ".join(
            json.dumps(part, ensure_ascii=False) if token is None else f"<[{token}]>" for part, token in parts
        )

    def until(self, close: str) -> str:
        """Any text up to and including this one."""
        ids = self._tokenizer.special.ids
        if mark := next((mark for mark in ids if close.startswith(mark)), None):
            return f"/(?s:.*)/ {self.text(mark)} {self.text(close[len(mark) :])}"
        return self.rule("/(?s:.*)/", f"[suffix={json.dumps(close, ensure_ascii=False)}]")

    def json(self, schema: dict) -> str:
        """JSON that satisfies a schema, in the spacing that models use."""
        return self.rule(f"%json {json.dumps({'x-guidance': COMPACT, **schema})}")

    def one_of(self, choices: list[str]) -> str:
        """Alternatives."""
        return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"

    def source(self, start: str) -> str:
        """Source of the grammar."""
        return "\n".join([f"start: {start}", *self._rules])


def call_grammar(tokenizer: Any, row: ToolFormat, schemas: Schemas, parallel: bool, reasoning: str | None) -> str:
    """One call of these tools, or several, after optional reasoning."""
    lark = Lark(tokenizer)
    calls = lark.one_of([_call(lark, row, name, schema) for name, schema in schemas.items()])
    one = lark.rule(calls)
    several = f"({lark.text(row.between)} {one})*" if parallel and row.name != "harmony" else ""
    thought = _thought(lark, row.thoughts, reasoning)
    return lark.source(f"{thought} {lark.text(row.begin)} {one} {several} {lark.text(row.end)}")


def bound_grammar(tokenizer: Any, row: ToolFormat, schemas: Schemas) -> str:
    """A call from its trigger on; several where the format has a list of them."""
    lark = Lark(tokenizer)
    special = any(token is not None for _, token in tokenizer.special.split(row.mark, tokenizer.special.ids))
    mark = lark.text(row.mark) if special else lark.until(row.mark)
    skipped = "" if row.begin else row.mark
    one = lark.rule(lark.one_of([_call(lark, row, name, schema, skipped) for name, schema in schemas.items()]))
    if not row.begin:
        return lark.source(f"{mark} {one} {lark.text(row.close)}")
    begin = lark.text(row.begin.removeprefix(row.mark))
    return lark.source(f"{mark} {begin} {one} ({lark.text(row.between)} {one})* {lark.text(row.end)}")


def answer_grammar(tokenizer: Any, schema: dict, reasoning: str) -> str:
    """JSON that satisfies a schema, after optional reasoning."""
    lark, pair = Lark(tokenizer), thoughts_of(tokenizer.chat_template) or ("", "")
    final = lark.text("<|channel|>final<|message|>") if pair[0].startswith("<|channel|>") else ""
    plain = {"x-guidance": {"whitespace_flexible": False}, **schema}
    return lark.source(f"{_thought(lark, pair, reasoning)} {final} {lark.json(plain)}")


def _thought(lark: Lark, pair: tuple[str, str], reasoning: str | None) -> str:
    if reasoning is None:
        return ""
    body = f"{lark.until(pair[1])} /\\n*/"
    return body if reasoning == "inside" else f"({lark.text(pair[0])} {body})?"


def _call(lark: Lark, row: ToolFormat, name: str, schema: dict, skipped: str = "") -> str:
    before, _, after = row.call.rpartition("ARGS")
    ways = row.begun if skipped and row.begun else (before,)
    begin = lark.one_of([_beginning(lark, way.replace("NAME", name, 1), skipped) for way in ways])
    return lark.rule(f"{begin} {_ARGUMENTS[row.style](lark, schema)} {lark.text(after)}")


def _beginning(lark: Lark, text: str, skipped: str) -> str:
    text = text.removeprefix(skipped)
    space = "/\\s{0,2}/" if skipped and text[:1].isspace() else ""  # models are not of one mind about it
    return f"{space} {lark.text(text.lstrip() if space else text)}"


def _object(schema: dict) -> dict:
    return {"type": "object", **schema}


def _tags(before: str, between: str, after: str) -> Any:
    def arguments(lark: Lark, schema: dict) -> str:
        parts = []
        for name, kind in properties_of(schema).items():
            kind = _defined(kind, schema)
            if not is_text(kind):
                value = f"{lark.json(kind)} {lark.text(after)}"
            elif "enum" in kind:
                value = f"{lark.one_of([lark.text(each) for each in kind['enum']])} {lark.text(after)}"
            else:
                value = lark.until(after)
            part = f"{lark.text(before + name + between)} {value}"
            parts.append(part if name in schema.get("required", ()) else f"({part})?")
        return " ".join(parts)

    return arguments


def _defined(schema: Any, whole: dict) -> dict:
    """Property schema with the definitions it may refer to."""
    schema = schema if isinstance(schema, dict) else {}
    return {**schema, **{name: whole[name] for name in ("$defs", "definitions") if name in whole}}


def _gemma(lark: Lark, schema: dict) -> str:
    parts, first = [], True
    properties = sorted(properties_of(schema).items())
    needed = [pair for pair in properties if pair[0] in schema.get("required", ())]
    for name, kind in needed or properties[:1]:  # an optional one would need a comma that depends on the others
        parts.append(f"{lark.text(('' if first else ',') + name + ':')} {_gemma_value(lark, kind)}")
        first = False
    return f'"{{" {" ".join(parts)} "}}"'


def _gemma_value(lark: Lark, schema: dict) -> str:
    quote = '<|"|>'
    if "enum" in schema and is_text(schema):
        return lark.one_of([lark.text(f"{quote}{each}{quote}") for each in schema["enum"]])
    if schema.get("type") == "array":
        item = lark.rule(_gemma_value(lark, schema.get("items", {"type": "string"})))
        return f'"[" ({item} ("," {item})*)? "]"'
    if schema.get("type") == "object":
        return _gemma(lark, schema)
    if schema.get("type") in ("integer", "number", "boolean", "null"):
        return lark.json(schema)
    return f"{lark.text(quote)} {lark.until(quote)}"


_ARGUMENTS = {
    "json": lambda lark, schema: lark.json(_object(schema)),
    "function": _tags("<parameter=", ">\n", "\n</parameter>\n"),
    "argument": _tags("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    "gemma": _gemma,
}
