"""Inputs of a run: token files, tokenizer and architecture, found or made."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...tokenizer.files import read_stop_ids
from ..config import ModelConfig
from ..data.conversations import open_conversations, write_conversations
from ..data.corpus import Corpus
from ..data.hf_datasets import fetch_rows, is_hub_id
from ..data.sources import files, stdlib
from ..data.tokens import END, TokenData, file_hash, text_of, write_token_data
from ..errors import InputError
from ..formats import model_info
from ..formats.model_info import base_of, check_vocabulary, load_config
from ..formats.model_source import resolve_model
from ..tasks import PREFIX as TASKS
from ..tasks import GeneratedTask, open_task
from ..throttle import throttled
from .config import TrainConfig


@dataclass(frozen=True)
class RunInputs:
    """The data, tokenizer and architecture of a run."""

    data: TokenData
    tokenizer: Any
    model: ModelConfig


def prepare(config: TrainConfig, note: Callable[[str], None], reuse: bool = False) -> RunInputs:
    """Prepare a run's data, tokenizer and architecture, consistent with each other; raw text is tokenized to OUT/data.

    With `reuse`, tokens that are already there are not made again.
    """
    data = open_data(config, note, reuse)
    if data.meta.pairs != (config.loss != "cross_entropy"):
        holds = "preference pairs: give loss dpo or ipo" if data.meta.pairs else "no preference pairs"
        raise InputError(f"loss={config.loss}, but {config.data} holds {holds}")
    tokenizer = data.tokenizer()
    model = architecture(config, tokenizer.vocab_size)
    if config.init_from:
        start = resolve_model(config.init_from, weights=False)
        _check_same_tokenizer(start, data)
        tokenizer.special.stops |= read_stop_ids(base_of(start))
    check_vocabulary(tokenizer, model, f"the tokenizer that made {data.directory}")
    if config.context and config.context > model.max_seq_len:
        raise InputError(
            f"context={config.context} is longer than the model's max_seq_len={model.max_seq_len}: give a shorter one, "
            f"or, to a new model, max_seq_len={config.context}"
        )
    return RunInputs(data, tokenizer, model)


def architecture(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The architecture that a run names; `vocab_size` fills in where it leaves the vocabulary open."""
    if config.init_from:
        return load_config(config.init_from)
    if isinstance(config.model, ModelConfig):
        return config.model
    changes = dict(config.model or {})
    changes["vocab_size"] = changes.get("vocab_size") or vocab_size
    if config.context:
        changes.setdefault("max_seq_len", config.context)
    return ModelConfig.from_dict({**ModelConfig.preset(config.preset).to_dict(), **changes})


def _check_same_tokenizer(directory: Path, data: TokenData) -> None:
    path, made = directory / "tokenizer.json", data.meta.tokenizer_sha256
    if path.is_file() and made not in (file_hash(path), _hash_as_saved(directory)):
        raise InputError(
            f"{data.directory} was tokenized with another tokenizer than {directory}: "
            f"make the dataset with --tokenizer {directory}"
        )


def _hash_as_saved(directory: Path) -> str:
    """Hash of a directory's tokenizer.json as this library would write it: other programs order keys otherwise."""
    from ...tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        load_tokenizer(directory).save(scratch)
        return file_hash(Path(scratch) / "tokenizer.json")


def open_data(config: TrainConfig, note: Callable[[str], None], reuse: bool) -> TokenData:
    """Open the token files `config.data`, or make them from the text it names."""
    if (Path(config.data) / "meta.json").is_file():
        return TokenData(config.data)
    made = Path(config.out) / "data"
    if reuse and (made / "meta.json").is_file():
        data = TokenData(made)
        if not _is_source(config.data, data.meta.source):
            raise InputError(f"{made} was made of {data.meta.source}, not of {config.data}: choose another out")
        if Path(config.data).is_file() and Path(config.data).stat().st_mtime > (made / "meta.json").stat().st_mtime:
            note(f"{config.data} has changed since {made} was made of it: the run goes on with the tokens of then")
        return data
    source = config.data
    if is_hub_id(source):
        note(f"fetching {source} from the hub …")
        source = str(fetch_rows(source, Path(config.out) / "download"))
    if source.startswith(TASKS) and config.init_from and _converses(config.init_from):
        source = str(_solved(source).write_conversations(Path(config.out) / "download" / "problems.jsonl"))
    made_here = source == "stdlib" or source.startswith(TASKS)
    chats = None if made_here else open_conversations(source)
    corpus = chats or _corpus(source)
    text = chats.texts() if chats else text_of(corpus, 0, config.splits)
    tokenizer = open_tokenizer(config, text, note)
    note(f"tokenizing {corpus.name} …")
    if made.exists():
        shutil.rmtree(made)
    report = throttled(lambda done: note(f"tokenizing {corpus.name}: {done:,} bytes"))
    write = write_conversations if chats else write_token_data
    data = write(corpus, tokenizer, made, config.splits, on_progress=report)
    sizes = ", ".join(f"{name} {info.tokens:,}" for name, info in data.meta.splits.items() if info.tokens)
    note(f"tokens: {sizes}{_learned_share(data)}{_unknown_share(data, tokenizer)}")
    return data


def _is_source(data: str, source: str) -> bool:
    """Return whether token files `data` were made from `source`, wherever both now lie; Hub and task sources are copies
    under other names."""
    name = Path(data).name
    return not name or name in Path(source).parts or data.startswith(TASKS) or is_hub_id(data)


def _corpus(source: str) -> Corpus:
    """Open the corpus that `data` names: the standard library, a task's solved problems, or files."""
    if source.startswith(TASKS):
        return _solved(source).corpus()
    return stdlib() if source == "stdlib" else files([source])


def _solved(source: str) -> GeneratedTask:
    task = open_task(source)
    if not isinstance(task, GeneratedTask):
        raise InputError(f"data={source} has no solved problems to learn from; a built-in task has")
    return task


def _converses(model: str) -> bool:
    """Return whether a model has a chat template for conversations, so that a task's questions become messages."""
    tokenizer = model_info.read_tokenizer(resolve_model(model, weights=False))
    return bool(tokenizer and tokenizer.chat_template)


def _unknown_share(data: TokenData, tokenizer: Any) -> str:
    """Warning about unknown characters or words, where they are a hundredth or more of the first text."""
    unknown = getattr(tokenizer, "unknown_id", None)
    tokens = np.asarray(data.split("train").tokens[: 1 << 20])
    share = float(np.mean(tokens == unknown)) if unknown is not None and len(tokens) else 0.0
    return f"; {share:.0%} are unknown to its tokenizer" if share >= 0.01 else ""


def _learned_share(data: TokenData) -> str:
    splits = [info for info in data.meta.splits.values() if info.learned is not None]
    tokens = sum(info.tokens for info in splits)
    return f"; {sum(info.learned for info in splits) / tokens:.0%} of them learned" if tokens else ""


def open_tokenizer(config: TrainConfig, text: Iterable[str], note: Callable[[str], None]) -> Any:
    """Load the tokenizer a run names, or train it on `text`."""
    source = config.init_from if config.init_from and config.tokenizer == "bpe" else config.tokenizer
    vocab_size = architecture(config, ModelConfig.preset(config.preset).vocab_size).vocab_size
    return make_tokenizer(source, text, vocab_size, note)


def make_tokenizer(source: str, text: Any, vocab_size: int, note: Callable[[str], None]) -> Any:
    """Train `bpe`, `char` or `word` on `text`, or load a directory, tokenizer.json or tiktoken file."""
    from ... import tokenizer as tokenizers

    if source == "char":
        return tokenizers.CharTokenizer.train(text)
    if source == "word":
        return tokenizers.WordTokenizer.train(text, vocab_size)
    if source == "bpe":
        note(f"training a BPE tokenizer of {vocab_size} tokens …")
        return tokenizers.BPETokenizer.train(text, vocab_size, pattern="gpt4", special_tokens=(END,))
    try:
        path = resolve_model(source, weights=False)
    except InputError as error:
        raise InputError(f"tokenizer {source!r} is not bpe, char or word, and {error}") from None
    if path.suffix == ".tiktoken":
        return tokenizers.BPETokenizer.from_tiktoken(path, pattern="gpt4", special_tokens={})
    if (path / "merges.txt").is_file() and not (path / "tokenizer.json").is_file():
        return tokenizers.BPETokenizer.from_gpt2_files(path / "vocab.json", path / "merges.txt")
    return model_info.open_tokenizer(path)
