"""Persistent prompt cache: prefix-cache pages saved to a file and restored after a restart.

What is kept is the prefix cache: full pages, each with its text and the page it follows. Pages are only good for the
very model that computed them, so the file has a fingerprint: of the model's files, of how pages are stored, and of the
page of a text that is computed anew each time, so that another executor or another CPU is found out by its bits. Each
page has a hash over its content and all pages before it. Whatever does not fit is left, with the reason; the file is
mapped, not read, and no size in it is believed before it is the file's.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...tokenizer.sources import atomic_writer
from ..errors import InputError
from .execution.model_runner import Runner
from .sampling_params import SamplingParams

MAGIC = b"warploom pages 1\n"
MOST_BYTES = 1 << 30  # maximum bytes of pages in a file; the most recently used are kept
MOST_HEADER = 1 << 20
BATCH = 256  # pages copied at a time
DIGEST = 16
PROBE = ("prompt cache",)  # the salt of the text that is computed anew


def check(llm: Any) -> None:
    """Refuse models in several processes, or with a draft model or adapters."""
    if not isinstance(llm.engine.runner, Runner) or llm.adapters:
        raise InputError("prompt_cache needs a model in one process, without draft_model and adapters")


def save(llm: Any, path: Path) -> int:
    """Save the cached pages of an idle engine; return their number."""
    store, pool = llm.engine.runner.store, llm.engine.scheduler.pool
    mark = fingerprint(llm)  # first: it takes a page
    found = pool.published()[: max(MOST_BYTES // _page_bytes(store), 1)]
    salts: dict[Any, int] = {}
    places: dict[Any, int] = {}
    kept, parents = [], []
    for number, chain, (before, tokens) in found:
        if before in places:
            parents.append(places[before])
        elif isinstance(before, tuple) and before[1] != PROBE:
            parents.append(-1 - salts.setdefault(before[1], len(salts)))
        else:
            continue
        places[chain] = len(kept)
        kept.append((number, tokens))
    header = {"fingerprint": mark, "pages": len(kept), "salts": [repr(salt) for salt in salts]}
    written = json.dumps(header).encode()
    digests: list[bytes] = []
    with atomic_writer(path) as file:
        os.fchmod(file.fileno(), 0o600)  # it holds what people have asked
        file.write(MAGIC + len(written).to_bytes(8, "little") + written)
        file.write(np.array(parents, np.int32).tobytes())
        file.write(np.array([tokens for _, tokens in kept], np.int32).tobytes())
        for start in range(0, len(kept), BATCH):
            part = kept[start : start + BATCH]
            pages = _read(store, [number for number, _ in part])
            for (_, tokens), parent, page in zip(part, parents[start:], pages):
                digests.append(_digest(digests, parent, tokens, page))
                file.write(digests[-1] + page.tobytes())
    return len(kept)


def restore(llm: Any, path: Path) -> int:
    """Restore pages from a file, as many as fit; return their number. An unusable file raises InputError."""
    store, pool = llm.engine.runner.store, llm.engine.scheduler.pool
    header, parents, tokens, records = _open(path, fingerprint(llm), pool.page_size, _page_bytes(store))
    salts = [_salt(each) for each in header["salts"]]
    numbers: list[int] = []
    chains: list[Any] = []
    digests: list[bytes] = []
    for parent, text, record in zip(parents.tolist(), tokens.tolist(), records):
        if not -len(salts) <= parent < len(digests):
            break
        digests.append(_digest(digests, parent, text, record[DIGEST:]))
        if digests[-1] != record[:DIGEST].tobytes() or (number := pool.allocate()) is None:
            break
        before = chains[parent] if parent >= 0 else pool.root(salts[-1 - parent])
        numbers.append(number)
        chains.append(pool.publish(number, before, text, 0))
    for start in range(0, len(numbers), BATCH):
        part = numbers[start : start + BATCH]
        _write(store, part, records[start : start + len(part), DIGEST:])
    pool.release(numbers)  # last to first: the most recently used will be the last to go
    return len(numbers)


def fingerprint(llm: Any) -> str:
    """Hash of everything that pages depend on: model files, page format, and the bits of a sample page."""
    store, pool = llm.engine.runner.store, llm.engine.scheduler.pool
    source = llm._source
    files = [source] if isinstance(source, Path) and source.is_file() else []
    files = sorted(source.iterdir()) if isinstance(source, Path) and source.is_dir() else files
    stats = [
        (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.suffix in (".safetensors", ".gguf", ".bin")
    ]
    shape = [(len(part), *part.shape[2:]) for part in store.parts]
    probe = [7 * i % llm.config.vocab_size for i in range(pool.page_size + 1)]
    llm.engine.submit(probe, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), salt=PROBE).result()
    pages, _ = pool.match(probe[: pool.page_size], PROBE)
    bits = _read(store, pages).tobytes()
    pool.release(pages)
    what = repr((llm.config, stats, str(store.dtype), shape, pool.page_size))
    return hashlib.blake2b(what.encode() + bits, digest_size=32).hexdigest()


def _open(path: Path, mark: str, page_size: int, page_bytes: int) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """Open a file, check its header against the fingerprint `mark`, and map its arrays."""
    wrong = InputError(f"{path} is no file of pages, or was cut off")
    begin = len(MAGIC) + 8
    if path.stat().st_size < begin:
        raise wrong
    whole = np.memmap(path, np.uint8, "r")
    if whole[: len(MAGIC)].tobytes() != MAGIC:
        raise wrong
    size = int.from_bytes(whole[len(MAGIC) : begin].tobytes(), "little")
    if size > min(MOST_HEADER, len(whole) - begin):
        raise wrong
    try:
        header = json.loads(whole[begin : begin + size].tobytes())
        theirs, count, salts = header["fingerprint"], header["pages"], header["salts"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise wrong from None
    if theirs != mark:  # first: pages of another format have another size
        raise InputError(f"{path} is of another model, or computed it in another way")
    each = 4 + 4 * page_size + DIGEST + page_bytes
    if not isinstance(count, int) or not isinstance(salts, list) or len(whole) != begin + size + count * each:
        raise wrong
    rest, edges = whole[begin + size :], (4 * count, 4 * count * (1 + page_size))
    parents = np.frombuffer(rest[: edges[0]].tobytes(), np.int32)
    tokens = np.frombuffer(rest[edges[0] : edges[1]].tobytes(), np.int32).reshape(count, page_size)
    return header, parents, tokens, rest[edges[1] :].reshape(count, DIGEST + page_bytes)


def _salt(text: Any) -> Any:
    try:
        salt = ast.literal_eval(text)
        hash(salt)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise InputError("the prompt cache file holds a cache_salt that cannot be read") from None
    return salt


def _digest(digests: list[bytes], parent: int, tokens: Any, page: np.ndarray) -> bytes:
    before = digests[parent] if parent >= 0 else parent.to_bytes(8, "little", signed=True)
    return hashlib.blake2b(before + np.array(tokens, np.int32).tobytes() + page.tobytes(), digest_size=DIGEST).digest()


def _page_bytes(store: Any) -> int:
    return sum(part[:, 0].nbytes for part in store.parts)


def _read(store: Any, numbers: list[int]) -> np.ndarray:
    """Pages as bytes, one row each: keys of all layers, values, scales."""
    index = torch.tensor(numbers, device=store.keys.device)
    parts = [part[:, index].transpose(0, 1).flatten(1) for part in store.parts]
    return torch.cat(parts, 1).cpu().numpy()


def _write(store: Any, numbers: list[int], rows: np.ndarray) -> None:
    index = torch.tensor(numbers, device=store.keys.device)
    data = torch.from_numpy(np.array(rows)).to(store.keys.device)
    for target, part in zip(store.parts, data.split([part[:, 0].nbytes for part in store.parts], 1)):
        target[:, index] = part.unflatten(1, (target.shape[0], *target.shape[2:])).transpose(0, 1)
