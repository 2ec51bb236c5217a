"""Sampling defaults that a model directory's generation_config.json recommends."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...tokenizer.files import read_json
from ..errors import InputError
from .openai.requests import Sampling

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
logger = logging.getLogger("warploom.server")


def sampling_defaults(llm: Any) -> dict[str, Any]:
    """Fields of a request, with the values that the model's authors recommend for those it leaves open."""
    source = getattr(llm, "_source", None)
    return _read(str(source)) if isinstance(source, (str, Path)) else {}


@lru_cache(maxsize=8)
def _read(source: str) -> dict[str, Any]:
    file = Path(source) / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        values = read_json(file)
        found = {name: values[name] for name in FIELDS if values.get(name) is not None}
        return {name: getattr(Sampling.model_validate(found), name) for name in found}
    except (InputError, ValidationError, AttributeError) as error:
        logger.warning("%s has no usable sampling defaults: %s", file, str(error).splitlines()[0])
        return {}
