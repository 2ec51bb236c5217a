"""Published chat templates, as far as they are here, rendered as `transformers` does.

TRL ships some seventy (a dev extra), axolotl forty and unsloth twenty (`pip install --no-deps axolotl unsloth` is
enough: their files are read, not run); WARPLOOM_TEMPLATES=DIR adds each *.jinja in DIR, and each chat_template of a
tokenizer_config.json below it. What such templates are written in is tested construct by construct in any case.
"""

import ast
import importlib.util
import json
import os
from pathlib import Path

import pytest

from warploom.tokenizer.chat import render

pytest.importorskip("transformers")
from transformers.utils.chat_template_utils import render_jinja_template


def file_of(package, path):
    """A file or folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / path if spec and spec.origin else Path("-")


def constants_of(file):
    """The texts that a module gives to names ending with _template."""
    for node in ast.parse(file.read_text()).body if file.is_file() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_template"):
            try:
                text = ast.literal_eval(node.value)
            except ValueError:  # made of others
                continue
            if isinstance(text, str) and "{%" in text:
                yield node.targets[0].id, text


MORE = Path(os.environ.get("WARPLOOM_TEMPLATES", "-"))
FOLDERS = {
    "trl": file_of("trl", "chat_templates"),
    "axolotl": file_of("axolotl", "utils/chat_templates/templates"),
    "more": MORE,
}
TEMPLATES = {
    f"{package}: {file.stem}": file.read_text()
    for package, folder in FOLDERS.items()
    for file in sorted(folder.rglob("*.jinja"))
}
TEMPLATES |= {f"unsloth: {name}": text for name, text in constants_of(file_of("unsloth", "chat_templates.py"))}
for file in sorted(MORE.rglob("tokenizer_config.json")):
    if isinstance(template := json.loads(file.read_text()).get("chat_template"), str):
        TEMPLATES[file.parent.name] = template

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place <now>, in °C.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"place": "Köln"}}}
USER = {"role": "user", "content": "  Hi, <b>you</b>! "}
ANSWER = {"role": "assistant", "content": "Hello.\n"}
CONVERSATIONS = {
    "a question": [USER],
    "system": [{"role": "system", "content": "Be kind."}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "And?"}],
    "answered": [USER, ANSWER],
    "reasoning": [USER, ANSWER | {"reasoning_content": "I think."}, USER],
    "calls": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": '{"degrees": 3}'},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
}
VARIABLES = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


# Each as a template of its own; "raises" where both refuse it.
CONSTRUCTS = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tojson": "{{ tools | tojson }}{{ {'é': [1, 2.5, none, true], 'a': '<b>&\\''} | tojson }}",
    "tojson, indent": "{{ {'b': [1, {}], 'a': []} | tojson(indent=2) }}",
    "tojson, arguments": "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
    "strftime_now": "{{ strftime_now('%Y-%m-%d') }}",
    "raise_exception": "{{ raise_exception('no') }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{{ loop.last }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "namespace, underscore": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "underscore of an object": "{{ messages.__class__.__mro__ }}",
    "changing a list": "{{ messages.append(1) }}",
    "macro": "{% macro say(m, end='!') %}{{ m.role }}{{ end }}{{ caller() if caller }}{% endmacro %}"
    "{{ say(messages[0]) }}{% call say(messages[-1], end='?') %}inner{% endcall %}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "tests": "{% for x in [1, 'a', none, {}, [], true] %}{{ x is string }}{{ x is mapping }}{{ x is iterable }}"
    "{{ x is sequence }}{{ x is none }}{{ x is number }}{{ x is boolean }}{% endfor %}{{ y is defined }}",
    "slices": "{{ messages[::-1][0].role }}{{ messages[1:] | length }}{{ 'abc'[-1] }}",
    "methods": "{{ ' a</think>b'.split('</think>')[-1].strip().rstrip('\\n').startswith('b') }}{{ 'a'.upper() }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}"
    "{{ ' x ' | trim }}{{ [1, 2] | join(', ') }}{{ 'a' | replace('a', 'b') }}{{ y | default('z') }}{{ 3 | string }}",
    "whitespace": "  {%- if true -%}  a  {%- endif %}\n  {% if true %}\n b\n  {% endif %}\n{{- 'c' }}\n",
    "set block": "{% set x %}{{ bos_token }}in{% endset %}{{ x }}{{ x | length }}",
    "absent": "{{ documents is none }}{{ tools is none }}{{ y }}|{{ eos_token }}{{ add_generation_prompt }}",
    "inline condition": "{{ 'a' if tools else 'b' }}{{ 'c' if not messages }}{{ 1 ~ 'd' }}{{ 7 // 2 }}",
    "include": "{% include 'other' %}",
    "not a template": "{% if %}",
}
REFUSED = {"raise_exception", "namespace, underscore", "underscore of an object", "changing a list", "include"}


def both_render(template, messages, tools, prompt):
    """Their text and ours; None where one refuses."""
    more = {**VARIABLES, "add_generation_prompt": prompt}
    try:
        [theirs], _ = render_jinja_template([messages], tools=tools, chat_template=template, **more)
    except Exception:
        theirs = None
    try:
        ours = render(template, messages, {**more, "tools": tools})
    except ValueError as error:
        assert "chat template" in str(error)
        ours = None
    return theirs, ours


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_construct_renders_alike(name):
    for tools in (None, [WEATHER]):
        theirs, ours = both_render(CONSTRUCTS[name], CONVERSATIONS["calls"], tools, True)
        assert ours == theirs
        assert (ours is None) == (name in REFUSED | {"not a template"})


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_published_template_renders_alike(name, tools):
    """The same text, or refused by both."""
    rendered = 0
    for title, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            theirs, ours = both_render(TEMPLATES[name], messages, tools, prompt)
            assert ours == theirs, title
            rendered += ours is not None
    assert rendered >= 2
