"""Base of request bodies: strict pydantic models with a field limit, where `null` means absent.

A field of OpenAI's that asks for something this server does not do is refused, with the reason: what was accepted has
been honored.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from .errors import invalid

MOST_FIELDS = 128
# Fields of OpenAI's that would change the answer and that nothing here could honor; why not.
REFUSED = {
    "suffix": "filling in between a prompt and a suffix needs a model trained for it",
    "best_of": "use n and choose by logprobs, or /v1/completions",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "modalities": "this model reads and writes text",
    "audio": "this model reads and writes text",
    "prediction": "start the server with --ngram-draft-tokens, which needs no prediction",
    "web_search_options": "this server reaches no network",
    "verbosity": "no model served here has been trained for it",
}
# Values that ask for what happens anyway.
HARMLESS = {
    "best_of": 1,
    "service_tier": ("auto", "default"),
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "continuous_usage_stats": False,
    "cache_prompt": True,
    "add_generation_prompt": True,
    "return_token_strs": (True, False),
}


def drop_nulls(data: Any) -> Any:
    """Remove null fields, which mean absent; refuse too many fields."""
    if not isinstance(data, dict):
        return data
    if len(data) > MOST_FIELDS:
        raise invalid(f"an object has {len(data)} fields; at most {MOST_FIELDS} are allowed")
    return {name: value for name, value in data.items() if value is not None}


class Body(BaseModel):
    """Strict request body: no unknown fields, no "5" for 5, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, data: Any) -> Any:
        data = drop_nulls(data)
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys()
        kept = {name: value for name, value in data.items() if name in known or not _harmless(name, value)}
        for name in kept.keys() & (REFUSED.keys() | HARMLESS.keys()) - known:
            raise invalid(_why_not(name), name, "unsupported_parameter")
        return kept

    @classmethod
    def unknown(cls, data: dict[str, Any]) -> list[str]:
        """Names of unknown fields."""
        return [name for name, value in data.items() if name not in cls.model_fields and not _harmless(name, value)]


def _harmless(name: str, value: Any) -> bool:
    allowed = HARMLESS.get(name)
    return name in HARMLESS and (value in allowed if isinstance(allowed, tuple) else value == allowed)


def _why_not(name: str) -> str:
    if name in REFUSED:
        return f"{name} is not supported: {REFUSED[name]}"
    return f"{name} is supported only as {HARMLESS[name]!r}"
