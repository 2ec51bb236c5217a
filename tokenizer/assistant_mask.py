"""Assistant mask: the loss mask of a conversation, for any chat template.

A model is to learn what the assistant says, and to stop; not the questions, nor the template's headers. Some templates
mark that by `{% generation %}` tags; nearly all stock ones do not, and a mask by tags is then all zeros. So each
assistant message is fenced, a nonce before and another behind it, and the template rendered:

    <|im_start|>assistant\n⟨Blue.⟩<|im_end|>\n

A span of what is learned begins where the prompt for this message ends (so it holds what a template puts before the
content, such as an empty <think>), or at the fence where that prompt is no beginning of the rendered text. It ends
behind the content with the special token that follows, the end of the turn. A message of tool calls alone is fenced at
its last call, and ends with the first token that ends a turn.

Special tokens inside messages stay text (see `chat.py`), and spans are cut out before tokens are made: the ids up to a
span are those that ask for the message when the model is served.
"""

import re
import secrets
from typing import TYPE_CHECKING, Any

from .chat import GENERATION, Fence, encode_rendered, find_marks
from .errors import InputError

if TYPE_CHECKING:
    from .base import Tokenizer

TAGS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


def encode_conversation(
    tokenizer: "Tokenizer", messages: list[dict], /, **variables: Any
) -> tuple[list[int], list[bool]]:
    """Tokenize a conversation; return the ids and the loss mask.

    An assistant message with `weight` 0 is not learned. Raises InputError where nothing is.
    """
    special = tokenizer.special
    fence = Fence(special.ids.keys() - special.plain)
    given = fence.around(messages), {**fence.around(variables), "add_generation_prompt": False}
    find = _tagged_spans if TAGS.search(tokenizer.chat_template or "") else _fenced_spans
    text, spans = find(tokenizer, fence, *given)
    pieces = list(encode_rendered(tokenizer, fence, text, spans))
    learned = [learned for ids, learned in pieces for _ in ids]
    if not any(learned):
        raise InputError("nothing in it is learned: it has no assistant message with text or tool calls")
    return [token for ids, _ in pieces for token in ids], learned


class _Places:
    """Nonces for the ends of spans: inserted into strings, located in the rendered text."""

    def __init__(self) -> None:
        self.nonce = secrets.token_hex(8)
        self.pattern = re.compile(rf"{self.nonce}([be])(\d+)z")

    def begin(self, number: int | str) -> str:
        return f"{self.nonce}b{number}z"

    def end(self, number: int | str) -> str:
        return f"{self.nonce}e{number}z"

    def take(self, rendered: str) -> tuple[str, dict[tuple[str, int], list[int]]]:
        """Remove the nonces; return the text and the positions of each."""
        found: dict[tuple[str, int], list[int]] = {}
        parts, done, at = [], 0, 0
        for match in self.pattern.finditer(rendered):
            parts.append(rendered[done : match.start()])
            at += match.start() - done
            done = match.end()
            found.setdefault((match[1], int(match[2])), []).append(at)
        return "".join([*parts, rendered[done:]]), found


def _tagged_spans(tokenizer, fence, messages, variables) -> tuple[str, list[tuple[int, int]]]:
    """Assistant spans by the template's `{% generation %}` tags."""
    places = _Places()
    marked = dict(zip(GENERATION, (places.begin(0), places.end(0))))
    text, found = places.take(tokenizer.apply_chat_template(messages, **variables, **marked))
    spans = list(zip(found.get(("b", 0), []), found.get(("e", 0), [])))
    said = [message for message in messages if message.get("role") == "assistant"]
    if all(map(_is_learned, said)):
        return text, spans
    if len(spans) != len(said):
        raise InputError(f"the chat template marks {len(spans)} stretches for {len(said)} assistant messages")
    return text, [span for span, message in zip(spans, said) if _is_learned(message)]


def _fenced_spans(tokenizer, fence, messages, variables) -> tuple[str, list[tuple[int, int]]]:
    """Assistant spans by fencing messages with nonces."""
    places = _Places()
    marked = [_mark(message, places, number) for number, message in enumerate(messages)]
    text, found = places.take(tokenizer.apply_chat_template(marked, **variables))
    if text != tokenizer.apply_chat_template(messages, **variables):
        raise InputError(f"the chat template depends on the words of an assistant message{_ADVICE}")
    marks = find_marks(tokenizer, fence, text)
    stops = tokenizer.special.stop_ids()
    spans = []
    for number, message in enumerate(messages):
        if marked[number] is message:
            continue
        ends = found.get(("e", number), [])
        if len(ends) != 1:
            raise InputError(f"the chat template shows message {number + 1} {len(ends)} times{_ADVICE}")
        begin = _end_of_prompt(tokenizer, messages[:number], variables, text, ends[0])
        begin = found.get(("b", number), [None])[0] if begin is None else begin
        if begin is None:
            raise InputError(f"the chat template shows message {number + 1} without its beginning{_ADVICE}")
        if _is_learned(message):
            spans.append((begin, _end_of_turn(text, ends[0], marks, stops if message.get("tool_calls") else None)))
    return text, spans


_ADVICE = ", so what is learned cannot be found: mark it by {% generation %} … {% endgeneration %} in the template"


def _is_learned(message: dict) -> bool:
    return message.get("weight", 1) != 0


def _mark(message: dict, places: _Places, number: int) -> dict:
    """Assistant message with nonces around its content, or behind the name of its last tool call."""
    if message.get("role") != "assistant":
        return message
    content, calls = message.get("content"), message.get("tool_calls")
    begin, end = places.begin(number), "" if calls else places.end(number)
    changed = {}
    if isinstance(content, str) and content.strip():
        changed["content"] = _around(content, begin, end)
    elif isinstance(content, list) and (texts := [i for i, part in enumerate(content) if part.get("text")]):
        parts = list(content)
        for index, before, behind in ((texts[0], begin, ""), (texts[-1], "", end)):
            parts[index] = {**parts[index], "text": _around(parts[index]["text"], before, behind)}
        changed["content"] = parts
    elif not calls:
        raise InputError(f"message {number + 1} is an assistant's and says nothing")
    if calls:
        last = calls[-1]
        called = last.get("function", last)
        named = {**called, "name": called["name"] + places.end(number)}
        changed["tool_calls"] = [*calls[:-1], {**last, "function": named} if "function" in last else named]
    return {**message, **changed}


def _around(text: str, begin: str, end: str) -> str:
    """Insert nonces around a text, inside its surrounding white space, which templates may trim."""
    inner = text.strip()
    start = text.index(inner)
    return f"{text[:start]}{begin}{inner}{end}{text[start + len(inner) :]}"


def _end_of_prompt(tokenizer, before, variables, text: str, limit: int) -> int | None:
    """End of the generation prompt, if the rendered text begins with it."""
    try:
        prompt = tokenizer.apply_chat_template(before, **{**variables, "add_generation_prompt": True})
    except ValueError:  # some templates refuse a conversation that begins with an answer
        return None
    return len(prompt) if text.startswith(prompt) and len(prompt) <= limit else None


def _end_of_turn(text: str, at: int, marks: list[tuple[int, int, int]], stops: frozenset[int] | None) -> int:
    """End of the end-of-turn token behind a message; with `stops`, the first of these that follows."""
    behind = [mark for mark in marks if mark[0] >= at]
    if stops is not None:
        behind = [mark for mark in behind if mark[2] in stops] or behind
    elif behind and text[at : behind[0][0]].strip():
        return at
    return behind[0][1] if behind else len(text) if stops is not None else at
