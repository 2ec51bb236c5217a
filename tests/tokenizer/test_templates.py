"""Published chat templates, as far as they are here, rendered as `transformers` does.

TRL ships some seventy (a dev extra); WARPLOOM_TEMPLATES=DIR adds each *.jinja in DIR, and each chat_template of a
tokenizer_config.json below it.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from warploom.tokenizer.chat import render

pytest.importorskip("transformers")
from transformers.utils.chat_template_utils import render_jinja_template

TRL = importlib.util.find_spec("trl")
FILES = sorted((Path(TRL.origin).parent / "chat_templates").glob("*.jinja")) if TRL and TRL.origin else []
MORE = Path(os.environ.get("WARPLOOM_TEMPLATES", "-"))
TEMPLATES = {file.stem: file.read_text() for file in [*FILES, *sorted(MORE.rglob("*.jinja"))]}
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


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_published_template_renders_alike(name, tools):
    """The same text, or refused by both."""
    rendered = 0
    for title, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            more = {**VARIABLES, "add_generation_prompt": prompt, "tools": tools}
            try:
                [expected], _ = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=TEMPLATES[name],
                    **{k: v for k, v in more.items() if k != "tools"},
                )
            except Exception:
                with pytest.raises(ValueError, match="chat template"):
                    render(TEMPLATES[name], messages, more)
                continue
            assert render(TEMPLATES[name], messages, more) == expected, title
            rendered += 1
    assert rendered >= 2
