"""Chat templates: Jinja in a sandbox, rendered as `transformers` does, safe against injected special tokens.

It comes with a model, so it is foreign code: it runs in Jinja's sandbox, with nothing in reach but its variables.

In the rendered text special tokens mark who speaks. What a user wrote must never become such a mark: a message that
contains `<|im_end|><|im_start|>system` is a text about markup, not a new turn. So every special token inside a message,
a tool's description or a key is fenced, a nonce on either side, before the template sees it; once it has rendered,
a special token that touches a fence is text. One fence is enough: a template that splits or cuts a message may part the
two, and what is left of them is dropped.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .base import Tokenizer

DEFAULT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GENERATION = ("generation_begins", "generation_ends")  # variables printed where these tags stand: nothing by default
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first or second


def render(source: str | None, messages: list[dict], variables: Mapping[str, Any]) -> str:
    """Render a chat template; `messages` are dicts with `role` and `content`."""
    given = {"tools": None, "documents": None, **variables, "messages": list(map(_name_reasoning, messages))}
    try:
        return compile_template(source or DEFAULT).render(given)
    except Exception as error:  # foreign code may raise anything
        said = str(error) or type(error).__name__
        raise InputError(f"the chat template refused these messages: {said}") from None


@lru_cache(maxsize=16)
def compile_template(source: str) -> Any:
    """Compile a chat template; a syntax error becomes one sentence."""
    import jinja2.nodes
    import jinja2.utils
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Jinja extension for `{% generation %}`, which marks assistant text for training; it renders as nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line) for name in GENERATION)
            return [begin, *body, end]

    class Namespace(jinja2.utils.Namespace):
        """Namespace that refuses private attributes: Jinja's own could reach __class__."""

        def __init__(self, *args, **kwargs):
            attributes = dict(*args, **kwargs)
            for name in attributes:
                refuse_private(name)
            super().__init__(attributes)

        def __setitem__(self, name, value):
            refuse_private(name)
            super().__setitem__(name, value)

    def refuse_private(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": _now, "namespace": Namespace}
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template does not compile: {error.message} (line {error.lineno})") from None


def encode_chat(
    tokenizer: "Tokenizer", messages: list[dict], /, continue_last: bool = False, **variables: Any
) -> list[int]:
    """Tokenize a conversation for generation; special tokens inside messages stay text.

    With `continue_last` they end with the last message's content instead, for the model to go on with.
    """
    special = tokenizer.special
    fence = Fence(special.ids.keys() - special.plain)
    try:
        messages, variables = fence.around(messages), fence.around(variables)
    except RecursionError:
        raise InputError("the messages are nested too deeply") from None
    if not continue_last:
        prompt = tokenizer.apply_chat_template(messages, **variables)
    else:
        end = secrets.token_hex(8)
        last = {**messages[-1], "content": messages[-1]["content"] + end}
        options = {**variables, "add_generation_prompt": False}
        prompt, found, _ = tokenizer.apply_chat_template([*messages[:-1], last], **options).rpartition(end)
        if not found:
            raise InputError("the chat template does not show the last message as it is: it cannot be continued")
    return [token for ids, _ in encode_rendered(tokenizer, fence, prompt) for token in ids]


def encode_rendered(
    tokenizer: "Tokenizer", fence: "Fence", text: str, spans: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[list[int], bool]]:
    """Tokenize a rendered text in pieces, each flagged if inside `spans`; no token crosses a span's border."""
    borders = sorted({border for span in spans for border in span})
    done, follows = 0, "start"
    for begin, end, token in [*find_marks(tokenizer, fence, text), (len(text), len(text), None)]:
        for cut in [*(border for border in borders if done < border < begin), begin]:
            learned = any(first <= done < last for first, last in spans)
            ids = tokenizer.encode_part(fence.remove(text[done:cut]), follows).tolist()
            yield ids, learned
            done, follows = cut, "text" if ids else follows
        if token is not None:
            yield [token], any(first <= begin < last for first, last in spans)
            done, follows = end, "added"


def find_marks(tokenizer: "Tokenizer", fence: "Fence", text: str) -> list[tuple[int, int, int]]:
    """Special tokens of a rendered text that the template put there: (begin, end, id)."""
    special = tokenizer.special
    return [
        (begin, end, special.ids[token])
        for begin, end, token in special.find(text, special.ids)
        if token not in special.plain and not fence.holds(text, begin, end)
    ]


class Fence:
    """Nonces before and behind every special token inside a message, to tell it from the template's own."""

    def __init__(self, marks: set[str]) -> None:
        self._open, self._close = secrets.token_hex(8), secrets.token_hex(8)
        longest_first = sorted(marks, key=lambda mark: (-len(mark), mark))
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def around(self, value: Any) -> Any:
        """Fence every string in a value, dict keys included."""
        if isinstance(value, str):
            return self._marks.sub(lambda mark: f"{self._open}{mark.group()}{self._close}", value)
        if isinstance(value, (list, tuple)):
            return [self.around(item) for item in value]
        if isinstance(value, Mapping):
            return {self.around(key): self.around(item) for key, item in value.items()}
        return value

    def holds(self, text: str, begin: int, end: int) -> bool:
        """Return whether that range of a rendered text is fenced."""
        return text.endswith(self._open, 0, begin) or text.startswith(self._close, end)

    def remove(self, text: str) -> str:
        """Remove the nonces."""
        return text.replace(self._open, "").replace(self._close, "")


def _name_reasoning(message: Any) -> Any:
    """Copy a message's reasoning to the field names that templates read."""
    if not isinstance(message, Mapping):
        return message
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
