"""Datasets from the Hugging Face Hub, streamed into one local JSON-lines file.

A large download breaks sooner or later, so it must be able to go on. Rows stream from the hub into
`KEEP/documents.jsonl`; now and then `KEEP/state.json` notes how long that file is and where in the stream it ends (the
state that `datasets` gives). Whatever ends the download, the same command cuts the file to the noted length, puts the
stream back to its place, and goes on: no row is lost, none comes twice. Reading the text again, as training a tokenizer
does, then costs no network.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ...tokenizer.sources import write_text
from ..errors import InputError
from .corpus import Corpus
from .text_files import json_texts

HUB = {
    "tinystories": {"path": "roneneldan/TinyStories"},
    "openwebtext": {"path": "Skylion007/openwebtext"},
    "wikitext": {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1"},
}
HUB_ID = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(/(?P<name>[\w.-]+))?(:(?P<split>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
TITLE = re.compile(r"\s*= [^=].*[^=] =\s*$")
OFTEN = 1000  # rows from one note of the state to the next


def hub(
    source: str,
    keep: str | Path,
    limit: int | None = None,
    data_files: dict | list | str | None = None,
    kind: str = "json",
    on_progress: Callable[[int], None] = lambda documents: None,
) -> Corpus:
    """A Hub dataset of at most `limit` documents, downloaded to the folder `keep` on first use.

    `data_files` (of a `kind`: json, text, parquet) reads local copies instead. `on_progress` hears of new documents.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"source {source!r} needs the package datasets: pip install 'warploom[data]'") from error
    where: dict[str, Any] = HUB[source] if data_files is None else {"path": kind, "data_files": data_files}
    path = Path(keep) / "documents.jsonl"
    begins = TITLE.match if source == "wikitext" else None

    def read() -> Iterator[Iterable[str]]:
        download(
            lambda: datasets.load_dataset(**where, split="train", streaming=True), path, limit, begins, on_progress
        )
        texts = json_texts(path, "text")
        return itertools.islice(articles(texts) if begins else ([text] for text in texts), limit)

    return Corpus(source, read)


def is_hub_id(name: str) -> bool:
    """Return whether a name is a Hub dataset, org/name[/subset][:split][@revision], and no local path."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists() and not Path(name).parent.is_dir()


def fetch_rows(name: str, keep: str | Path) -> Path:
    """Download a Hub dataset as JSON lines to `keep` (split `train` by default); return the file."""
    found = HUB_ID.fullmatch(name)
    if found is None:
        raise InputError(f"{name!r} is no data set of the hub: org/name[/subset][:split][@revision]")
    asked = {key: value for key, value in found.groupdict().items() if value is not None}
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name!r} is no file here; as a data set it needs: pip install 'warploom[data]'") from error
    own = re.sub(r"[^\w.-]+", "--", name)
    path = Path(keep) / own / f"{own}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download(lambda: datasets.load_dataset(**{"split": "train", **asked}, streaming=True), path, None, columns=dict)
    except OSError as error:
        where = "there is no data set of that name, or it cannot be reached"
        raise InputError(f"{name!r} is no file here, and on the hub {where}: {_first_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the data set {name!r} cannot be read: {_first_line(error)}") from error
    return path


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def download(
    open_stream: Callable,
    path: Path,
    limit: int | None,
    begins: Callable[[str], object] | None = None,
    on_progress: Callable[[int], None] = lambda documents: None,
    columns: Callable[[dict], dict] = lambda row: {"text": row["text"]},
) -> None:
    """Stream rows into `path`, continuing an interrupted download; no-op when complete.

    `begins` says whether a row begins a new document (None: every row is one), `columns` what of a row is kept.
    """
    note = path.with_name("state.json")
    state = (
        json.loads(note.read_text()) if note.is_file() else {"bytes": 0, "documents": 0, "stream": None, "all": False}
    )
    enough = float("inf") if limit is None else limit + (begins is not None)  # where the next begins, the last one ends
    if state["all"] or state["documents"] >= enough:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open_stream()
    if state["stream"] is not None:
        stream.load_state_dict(state["stream"])
    with open(path, "ab") as file:
        file.truncate(state["bytes"])

        def remember(everything: bool = False) -> None:
            file.flush()
            os.fsync(file.fileno())
            state.update(bytes=file.tell(), documents=documents, stream=stream.state_dict(), all=everything)
            write_text(note, json.dumps(state))

        documents = state["documents"]
        for count, row in enumerate(stream, 1):
            documents += begins is None or bool(begins(row["text"]))
            file.write(json.dumps(columns(row), default=str).encode() + b"\n")
            if documents >= enough:
                return remember()
            if count % OFTEN == 0:
                remember()
                on_progress(documents)
        remember(everything=True)


def articles(lines: Iterable[str]) -> Iterator[list[str]]:
    """Join Wikitext's lines into articles; one begins at its title, ` = Title = ` (sections have more equals signs)."""
    article: list[str] = []
    for line in lines:
        if article and TITLE.match(line):
            yield article
            article = []
        if article or line.strip():
            article.append(line)
    if article:
        yield article
