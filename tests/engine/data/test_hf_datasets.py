"""Public data sets, by local files of the same formats: nothing here touches the network."""

import json

import pytest

from warploom.engine.data import hf_datasets as hubs
from warploom.engine.data.hf_datasets import hub

datasets = pytest.importorskip("datasets", reason="the data extra is not installed")


def texts(source):
    return ["".join(blocks) for blocks in source.read()]


def shards(folder, rows, count, kind):
    paths = []
    for index in range(count):
        table = datasets.Dataset.from_dict({"text": rows[index::count]})
        paths.append(str(folder / f"{index}.{kind}"))
        (table.to_parquet if kind == "parquet" else table.to_json)(paths[-1])
    return paths


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_download_that_breaks_goes_on_where_it_stopped(tmp_path, monkeypatch, kind):
    rows = [f"story {i}" for i in range(100)]
    where = {"data_files": shards(tmp_path, rows, 3, kind), "kind": kind}
    whole = texts(hub("tinystories", tmp_path / "whole", **where))
    assert sorted(whole) == sorted(rows)
    monkeypatch.setattr(hubs, "OFTEN", 7)
    read = []

    def break_off(documents):
        read.append(documents)
        if len(read) in (2, 5):
            raise ConnectionError("the cable was pulled")

    for _ in range(2):
        with pytest.raises(ConnectionError):
            texts(hub("tinystories", tmp_path / "broken", on_progress=break_off, **where))
    assert texts(hub("tinystories", tmp_path / "broken", on_progress=break_off, **where)) == whole
    assert read == sorted(read) and len(read) == len(set(read))  # it never began anew


def test_hub_downloads_only_what_is_asked_once(tmp_path):
    """No more is downloaded than asked for and none of it twice."""
    where = {"data_files": shards(tmp_path, [f"story {i}" for i in range(9)], 1, "json")}
    source = hub("tinystories", tmp_path / "some", limit=3, **where)
    assert texts(source) == ["story 0", "story 1", "story 2"] == texts(source)
    assert len((tmp_path / "some" / "documents.jsonl").read_text().splitlines()) == 3
    assert texts(hub("tinystories", tmp_path / "some", limit=5, **where)) == [f"story {i}" for i in range(5)]


def test_wikitext_lines_are_joined_into_articles(tmp_path):
    lines = ["", " = Cats = \n", "", " They purr . \n", " = = Kinds = = \n", " Many . \n", " = Dogs = \n", " = = = \n"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    found = texts(hub("wikitext", tmp_path / "all", data_files=str(path)))
    assert found == ["".join(lines[1:6]), "".join(lines[6:])]
    assert texts(hub("wikitext", tmp_path / "first", limit=1, data_files=str(path))) == found[:1]
    assert texts(hub("wikitext", tmp_path / "first", data_files=str(path))) == found
