"""Chat templates: the Jinja program that turns a list of messages into a prompt.

It comes with a model, so it is foreign code: it runs in Jinja's sandbox, with nothing in reach but its variables.

In the rendered text special tokens mark who speaks. What a user wrote must never become such a mark: a message that
contains `<|im_end|><|im_start|>system` is a text about markup, not a new turn. So every special token inside a message
is fenced with a nonce before the template sees it; after it has rendered, what stood between fences is encoded as
ordinary text, and the rest with special tokens.
"""

import secrets
from collections.abc import Callable
from datetime import datetime
from typing import Any

DEFAULT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str | None) -> None:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _to_json
        self._template = environment.from_string(source or DEFAULT)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt of a conversation: `messages` are dicts with `role` and `content`."""
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except TemplateError as error:
            raise ValueError(f"the chat template refused these messages: {error}") from None


def encode_chat(tokenizer: Any, messages: list[dict], **variables: Any) -> list[int]:
    """The token ids that ask a model for the next message; nothing inside a message becomes a special token."""
    nonce = secrets.token_hex(8)
    fence = _fence(tokenizer, nonce)
    prompt = tokenizer.apply_chat_template(_each_string(messages, fence), **_each_string(variables, fence))
    tokens: list[int] = []
    for number, stretch in enumerate(prompt.split(nonce)):
        tokens += tokenizer.encode(stretch, allowed_special="none" if number % 2 else "all")
    return tokens


def _fence(tokenizer: Any, nonce: str) -> Callable[[str], str]:
    marks = sorted(set(tokenizer.special_tokens) - tokenizer.special.plain, key=len, reverse=True)

    def fence(text: str) -> str:
        done = ""
        while found := min((mark for mark in marks if mark in text), key=text.index, default=None):
            before, _, text = text.partition(found)
            done += f"{before}{nonce}{found}{nonce}"
        return done + text

    return fence


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_each_string(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _each_string(item, change) for key, item in value.items()}
    return value


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
