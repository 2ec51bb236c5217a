"""Static pages without external resources: API reference at /docs, landing page at /."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from ..config import ServerConfig

STYLE = """
:root { color-scheme: light dark; --soft: color-mix(in srgb, currentColor 9%, transparent); }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; font-family: ui-monospace, monospace; }
h2 b { color: #7c5cff; margin-right: .5rem; } code, pre { font: .88em/1.5 ui-monospace, monospace; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 8px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } td, th { text-align: left; vertical-align: top;
padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--soft); } small { opacity: .7; }
"""


def docs_page(schema: dict[str, Any]) -> str:
    """API reference from the OpenAPI description."""
    routes = [
        _route(schema, method, path, operation)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    intro = "The machine-readable description is at <a href='openapi.json'>/openapi.json</a>."
    return _page("warploom: the HTTP interface", f"<p>{intro}</p>{''.join(routes)}")


def landing_page(config: ServerConfig) -> str:
    """Landing page where there is no playground."""
    missing = "The playground was left out with --no-ui."
    if config.ui:
        missing = "For a playground on this page: <code>pip install gradio</code>, and start the server again."
    body = {"model": config.name, "prompt": "Once upon a time", "max_tokens": 40}
    command = f"curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{json.dumps(body)}'"
    links = " · ".join(f"<a href='{path}'>/{path}</a>" for path in ("docs", "health", "metrics", "v1/models"))
    return _page(
        f"warploom serves {escape(config.name)}", f"<p>{links}</p><pre>{escape(command)}</pre><p>{missing}</p>"
    )


def _route(schema: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    table = _fields(schema, body) if body else ""
    statuses = ", ".join(operation["responses"])
    about = escape(operation.get("description", ""))
    return f"<h2><b>{method.upper()}</b>{escape(path)}</h2><p>{about} <small>Answers: {statuses}.</small></p>{table}"


def _fields(schema: dict[str, Any], body: dict[str, Any]) -> str:
    model = _follow(schema, body)
    needed = set(model.get("required", ()))
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(schema, field))}</td>"
        f"<td>{'needed' if name in needed else _default(field)}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in model["properties"].items()
    ]
    return f"<table><tr><th>field<th>type<th>default<th></tr>{''.join(rows)}</table>"


def _kind(schema: dict[str, Any], field: dict[str, Any]) -> str:
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_kind(schema, option) for option in options if option.get("type") != "null")
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[1]
    if "enum" in field or "const" in field:
        return " | ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(schema, field['items'])}"
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    limits = f" {low} to {high}" if low is not None and high is not None and abs(high) < 2**31 - 1 else ""
    return field.get("type", "any") + limits


def _default(field: dict[str, Any]) -> str:
    return escape(json.dumps(field["default"])) if field.get("default") is not None else ""


def _follow(schema: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    return schema["components"]["schemas"][reference["$ref"].rsplit("/", 1)[1]]


def _page(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}</html>"
    )
