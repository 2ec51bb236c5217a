"""Request bodies of the OpenAI protocol, with vLLM's extensions.

A field that is not written down here is refused by name (`body.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import Self

from ...errors import InputError
from ...serving import SamplingParams
from ..request_body import FIRST_ERROR, at_most
from .body import Body
from .conversation import Message, Tool, ToolChoice
from .errors import from_input_error, invalid

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], FIRST_ERROR, Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]  # a text that may begin one is looked at again and again
Texts = Annotated[list[str], FIRST_ERROR, Field(min_length=1)]
Rows = Annotated[list[TokenIds], FIRST_ERROR, Field(min_length=1)]
Limit = Annotated[int, Field(ge=-1, le=2**31 - 1)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


def _prompt_kind(value: Any) -> str | None:
    """Discriminator of `Prompt`'s union, by the first element: trying each arm costs an error an element."""
    if isinstance(value, str):
        return "a text"
    first = value[0] if isinstance(value, list) and value else None
    kinds = {int: "token ids", float: "token ids", str: "several texts", list: "several rows"}
    return kinds.get(type(first))


Prompt = Annotated[
    Annotated[str, Tag("a text")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[Texts, Tag("several texts")]
    | Annotated[Rows, Tag("several rows")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a text, a list of token ids, or a list of either, and not empty",
    ),
]


def listed(prompt: Any) -> list[str | list[int]]:
    """Normalize one prompt or several to a list."""
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


class StreamOptions(Body):
    """OpenAI's stream_options."""

    include_usage: bool = Field(False, description="A last chunk with the token counts.")
    include_obfuscation: Literal[False] = Field(False, description="Chunks are not padded.")


class JsonSchema(Body):
    """A named JSON schema."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer satisfies the schema in any case.")


class ResponseFormat(Body):
    """Response format: text, any JSON object, or a JSON schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="The schema in llama.cpp's spelling.")

    def grammar(self) -> dict[str, Any] | None:
        """Schema that the text must satisfy, if any."""
        if self.type == "text":
            return None
        if self.schema_ is not None and self.json_schema is None:
            return self.schema_
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise invalid("response_format of type json_schema needs json_schema.schema", "response_format")
        return self.json_schema.schema_


class StructuredOutputs(Body):
    """vLLM's structured_outputs: one kind of constraint."""

    json_: dict[str, Any] | Text | None = Field(None, alias="json", description="A JSON schema, or its text.")
    json_object: bool = False
    regex: Text | None = None
    choice: Annotated[list[Text], FIRST_ERROR, Field(min_length=1)] | None = None
    grammar: Text | None = Field(None, description="Lark, or llama.cpp's GBNF.")


class Sampling(Body):
    """Sampling fields common to completions and chat."""

    model: str | None = Field(None, description="The served model's name, or nothing.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="Keep the k most likely tokens; 0 or -1 keeps all.")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], at_most(1024)] | None = Field(
        None, max_length=1024, description="Added to the logits of these token ids."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Same request and seed, same tokens.")
    n: int = Field(1, ge=1, le=128)
    min_tokens: int = Field(0, ge=0, le=2**31 - 1, description="Tokens before one may end the text.")
    stop: Stop | Annotated[list[Stop], FIRST_ERROR, Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], FIRST_ERROR, Field(max_length=64)] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    regex: Text | None = Field(None, description="The text matches this regular expression.")
    choice: Annotated[list[Text], FIRST_ERROR, Field(min_length=1)] | None = Field(
        None, description="The text is one of these strings."
    )
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = Field(None, description="The same in vLLM's older spelling.")
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], FIRST_ERROR, Field(min_length=1)] | None = None
    guided_grammar: Text | None = None
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=100,
        description="vLLM's: the prompt's log-probabilities, and those of so many likely tokens.",
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="Keep only so many of the prompt's last tokens; -1: what the context has room for."
    )
    priority: int = Field(0, ge=0, le=100, description="Each step lets requests of the next 30 seconds go first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Cached prefixes are shared only with requests of the same salt."
    )
    user: str | None = Field(None, description="Written to the access log; changes nothing else.")
    metadata: Annotated[dict[str, str], at_most(64)] | None = Field(
        None, max_length=64, description="For the caller's own records; changes nothing."
    )
    store: bool = Field(False, description="Nothing is stored: true is named in the header x-warploom-ignored.")
    safety_identifier: str | None = Field(None, description="Changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Changes nothing: prefixes are found by their tokens.")
    prompt_cache_retention: str | None = Field(None, description="Changes nothing.")

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def grammar(self) -> dict[str, Any]:
        """Constraint on the text as a field of `SamplingParams`, from whichever spelling was used."""
        other = self.structured_outputs or StructuredOutputs()
        given = {
            "response_format": ("json_schema", self.response_format and self.response_format.grammar()),
            "structured_outputs.json_object": ("json_schema", {"type": "object"} if other.json_object else None),
            "structured_outputs.json": ("json_schema", other.json_),
            "guided_json": ("json_schema", self.guided_json),
            "regex": ("regex", self.regex),
            "choice": ("choice", self.choice),
        }
        for field in ("regex", "choice", "grammar"):
            given[f"structured_outputs.{field}"] = (field, getattr(other, field))
            given[f"guided_{field}"] = (field, getattr(self, f"guided_{field}"))
        given = {name: wish for name, wish in given.items() if wish[1] is not None}
        if len(given) > 1:
            raise invalid(f"only one of these can be given: {', '.join(given)}", min(given).partition(".")[0])
        return dict(given.values())

    def check(self) -> None:
        """Check combinations of fields."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is allowed only with stream=true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs cannot be streamed: ask for them with stream=false", "prompt_logprobs")

    @property
    def limit(self) -> int | None:
        """Maximum tokens to generate, -1 for what the context holds; None if the request leaves it open."""
        named = {name: getattr(self, name, None) for name in ("max_tokens", "max_completion_tokens", "n_predict")}
        given = {name: value for name, value in named.items() if value is not None}
        if len(set(given.values())) > 1:
            says = " contradicts ".join(f"{name}={value}" for name, value in given.items())
            raise invalid(f"{says}: give one", next(iter(given)))
        return next(iter(given.values()), None)

    def ignored(self) -> list[str]:
        """Names of ignored fields."""
        return ["store"] if self.store else []

    def with_defaults(self, defaults: dict[str, Any]) -> Self:
        """Copy with the model's defaults for fields that were left open."""
        return self.model_copy(update={k: v for k, v in defaults.items() if k not in self.model_fields_set})

    def params(self, n: int, logprobs: int | None, **others: Any) -> SamplingParams:
        """Convert to `SamplingParams`."""
        self.check()
        try:
            return SamplingParams(
                max_tokens=None if self.limit == -1 else self.limit,
                temperature=self.temperature,
                top_k=max(self.top_k, 0),
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
                stop=self.stop or (),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=self.ignore_eos,
                seed=self.seed,
                min_tokens=self.min_tokens,
                n=n,
                logprobs=logprobs,
                **self.grammar(),
                **others,
            )
        except InputError as error:
            raise from_input_error(error) from None


class CompletionRequest(Sampling):
    """Continue a text, or several."""

    prompt: Prompt
    max_tokens: Limit | None = Field(None, description="Default: 16; -1: what the context holds.")
    n_predict: Limit | None = Field(None, description="llama.cpp's name of max_tokens.")
    best_of: int | None = Field(
        None, ge=1, le=128, description="Generate so many, and answer the n of the highest log-probability a token."
    )
    echo: bool = Field(False, description="Put the prompt in front of the text.")
    add_special_tokens: Literal[True] = Field(True, description="What the tokenizer puts before every text.")
    logprobs: int | None = Field(None, ge=0, le=100)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        return listed(self.prompt)

    def sampling(self) -> SamplingParams:
        """`SamplingParams` of each prompt."""
        if self.best_of is not None and self.best_of < self.n:
            raise invalid(f"best_of is {self.best_of}, less than n, {self.n}", "best_of")
        if self.stream and self.best_of is not None and self.best_of > self.n:
            raise invalid("best_of cannot be streamed: which is best is known at the end", "best_of")
        ranked = 0 if self.best_of is not None and self.logprobs is None else self.logprobs
        echoed = self.logprobs if self.echo else None
        scored = max((top for top in (echoed, self.prompt_logprobs) if top is not None), default=None)
        return self.params(self.best_of or self.n, ranked, echo=self.echo, prompt_logprobs=scored)


class ChatRequest(Sampling):
    """The next message of a conversation."""

    messages: Annotated[list[Message], FIRST_ERROR, Field(min_length=1)]
    max_tokens: Limit | None = Field(None, description="The old name of max_completion_tokens.")
    max_completion_tokens: Limit | None = Field(None, description="Default, and -1: what the context holds.")
    n_predict: Limit | None = Field(None, description="llama.cpp's name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], FIRST_ERROR, Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = Field(
        None,
        description="required and a function's name force a call, with arguments that satisfy the schema; "
        "allowed_tools names those of the tools that may be called.",
    )
    parallel_tool_calls: bool = Field(True, description="Several calls in one message.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="Where the model's chat template has a switch for it."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")
    add_generation_prompt: bool = Field(True, description="Ask for a new message.")
    add_special_tokens: Literal[False] = Field(False, description="The chat template writes them.")
    continue_final_message: bool = Field(False, description="Continue the last message, which is the assistant's.")

    def sampling(self) -> SamplingParams:
        """Convert to `SamplingParams`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or last.tool_calls or not last.text):
            message = "continue_final_message needs a last message of the assistant's, with text and no tool_calls"
            raise invalid(message, "continue_final_message")
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self.params(self.n, top, prompt_logprobs=self.prompt_logprobs)


class GenerateRequest(Body):
    """Minimal request: token ids or text in, token ids and text out."""

    idx: Rows | None = Field(None, description="Token ids, a row a prompt.")
    prompt: str | Texts | None = None
    max_new_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Default: 100.")
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, from whichever field."""
        if (self.idx is None) == (self.prompt is None):
            raise invalid("give either idx (rows of token ids) or prompt (a text)", "idx")
        return self.idx or ([self.prompt] if isinstance(self.prompt, str) else self.prompt)

    def sampling(self) -> SamplingParams:
        """`SamplingParams` of each prompt."""
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_k, self.top_p, seed=self.seed)


class TokenizeRequest(Body):
    """Text or conversation to tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FIRST_ERROR, Field(min_length=1)] | None = None
    add_special_tokens: Literal[True] = Field(True, description="What the tokenizer puts before every text.")


class DetokenizeRequest(Body):
    """Token ids to decode."""

    model: str | None = None
    tokens: Annotated[list[TokenId], FIRST_ERROR]
