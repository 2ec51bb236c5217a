"""Model name resolution: a directory, a `.gguf` file, or a Hub id `org/name[@revision]`.

Hub ids go through `huggingface_hub`: its cache, its tokens (HF_TOKEN), its offline mode (HF_HUB_OFFLINE), its progress
bars. Of a repository only what a model directory holds is fetched: configuration, tokenizer, and one set of weights.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from ..errors import InputError

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
TEXTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "adapter_config.json",
)  # fmt: skip
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def resolve_model(name: str | os.PathLike, weights: bool = True) -> Path:
    """Return the directory with a model's files, downloaded from the Hub if need be; without `weights` only the small
    ones."""
    path = Path(name)
    if path.exists():
        return path
    found = HUB_ID.fullmatch(str(name))
    if found is None or path.suffix == ".gguf":
        raise InputError(f"{name} is not a directory, a .gguf file or a Hub id (org/name or org/name@revision)")
    directory = _fetch(found["repository"], found["revision"], TEXTS + (SAFETENSORS if weights else ()))
    if weights and not any(directory.glob("*model*.safetensors")):
        directory = _fetch(found["repository"], found["revision"], (*TEXTS, "pytorch_model.bin"))
    return directory


@functools.lru_cache(maxsize=32)  # a command asks several times, and each would ask the Hub whether all is fresh
def _fetch(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise InputError(
            f"{repository} is no directory here; to fetch it from the Hub, pip install huggingface_hub"
        ) from None
    where = repository if revision is None else f"{repository}@{revision}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise InputError(
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repository} is neither a directory here nor a model on the Hub (or it is private)"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repository} has no revision {revision!r} on the Hub") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        offline = "HF_HUB_OFFLINE is set" if _is_offline() else f"the Hub cannot be reached ({type(error).__name__})"
        raise InputError(
            f"{where} is no directory here, it is not in the Hub's cache, and {offline}: fetch it once online"
        ) from None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
