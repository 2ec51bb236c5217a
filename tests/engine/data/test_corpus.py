import bz2
import gzip
import io
import json
import lzma
import resource
import subprocess
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.engine.data.corpus import cut
from warploom.engine.data.sources import files, open_corpus, stdlib
from warploom.engine.errors import InputError


def texts(source):
    return ["".join(blocks) for blocks in source.read()]


def test_corpus_reads_text_jsonl_gzip_globs(tmp_path):
    """Text json lines gzip and globs are read as documents."""
    (tmp_path / "a.txt").write_text("first\r\n", newline="")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "second"}) + "\n\n" + json.dumps({"text": "third"}))
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("fourth")
    assert texts(files([tmp_path / "*"])) == ["first\r\n", "second", "third", "fourth"]
    assert texts(files([tmp_path])) == texts(files([tmp_path / "*"]))
    assert texts(files([tmp_path / "b.jsonl"], limit=1)) == ["second"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"text\0more", "is a binary file"),
        ("a.txt", b"\xff\xfe\x80", "not UTF-8"),
        ("a.jsonl", b'{"body": "x"}', "has? ?a field 'text'|with a field 'text'"),
        ("a.jsonl", b'{"text": 3}', "must be a string"),
        ("a.txt.gz", b"not gzip", "not a complete gzip"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_it(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        list(files([path]).passages())
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_compressed_files_are_read_whole(tmp_path):
    """Each compression by its suffix, of several frames where a file has them."""
    text = "學而時習之\n" * 1000
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    try:
        import zstandard

        packers[".zst"] = zstandard.ZstdCompressor().compress
    except ImportError:
        pass
    for suffix, pack in packers.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(pack(text.encode()) + pack(b"end"))
        assert texts(files([path])) == [text + "end"], suffix
        path.write_bytes(b"not compressed")
        with pytest.raises(InputError, match="is not a complete"):
            texts(files([path]))
    rows = tmp_path / "rows.jsonl.xz"
    rows.write_bytes(lzma.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert texts(files([rows])) == ["one", "two"]


def pack_zstandard(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def pack_parquet(data):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"text": data.decode().splitlines()}), sink := io.BytesIO())
    return sink.getvalue()


PACKERS = {
    "a.txt.gz": gzip.compress,
    "a.txt.bz2": bz2.compress,
    "a.txt.xz": lzma.compress,
    "a.txt.zst": pack_zstandard,
    "a.parquet": pack_parquet,
}


@pytest.mark.parametrize("name", PACKERS)
def test_truncated_file_is_refused_wherever_it_was_cut(tmp_path, name):
    """In one sentence that names it; a second frame that is missing as a whole nobody can miss."""
    path, part = tmp_path / name, PACKERS[name]("".join(f"line {n * n % 97} of it\n" for n in range(500)).encode())
    packed = part if name == "a.parquet" else part + part
    cuts = {*range(0, len(packed), 1 + len(packed) // 60), *range(len(packed) - 9, len(packed))} - {len(part)}
    for cut_at in sorted(cuts):
        path.write_bytes(packed[:cut_at])
        with pytest.raises(InputError, match=r"is not a complete|is empty") as error:
            texts(files([path]))
        assert str(path) in str(error.value) and "\n" not in str(error.value), cut_at
    path.write_bytes(packed)
    assert "".join(texts(files([path]))).count("line") == 500 * (len(packed) // len(part))


def test_window_that_a_forged_header_asks_for_is_not_allocated(tmp_path):
    """4 GiB by xz's largest dictionary, 2 GiB by a Zstandard frame."""
    xz = bytearray(lzma.compress(b"text"))
    xz[16] = 40  # the block header's dictionary size
    xz[20:24] = zlib.crc32(xz[12:20]).to_bytes(4, "little")
    (tmp_path / "a.txt.xz").write_bytes(xz)
    zstandard = bytes.fromhex("28b52ffd 00 a8 210000 74657874")  # magic, descriptor, window, one raw block
    (tmp_path / "a.txt.zst").write_bytes(zstandard)
    for name in ("a.txt.xz", "a.txt.zst"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(InputError, match=f"{name} would take more than .* MiB to unpack"):
            texts(files([tmp_path / name]))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_json_array_is_a_table(tmp_path):
    """An array of objects with the field is rows, as lines in a .json are; any other .json is text."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert texts(files([path])) == ["one", "two"]
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts(files([path])) == ["one", "two"]
    for other in ('{\n "text": "one"\n}', "[1, 2]", '[{"name": "x"}]', "[unfinished", ""):
        path.write_text(other)
        if other != "[unfinished":
            assert texts(files([path])) == [other]
            continue
        with pytest.raises(InputError, match="not a JSON array"):
            texts(files([path]))


def test_parquet_rows_are_documents(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), path)
    assert texts(files([path])) == ["one", "two"]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="not a complete parquet"):
        texts(files([path]))


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "人".encode())
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}')
    assert texts(files([tmp_path])) == ["人", "x"]


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        ("學而時習之，不亦說乎？" * 9, "gb18030", "GB18030"),
        ("人", "utf-16", "UTF-16"),
        ("déjà vu", "cp1252", "WINDOWS-1252"),
    ],
)
def test_other_encoding_names_the_command(tmp_path, text, encoding, name):
    """The sentence ends with a command that makes the file readable."""
    path = tmp_path / "novel.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=f"perhaps {name}") as error:
        texts(files([path]))
    subprocess.run(str(error.value).partition("convert it, ")[2], shell=True, check=True)
    assert texts(files([tmp_path / "novel-utf8.txt"])) == [text]


def test_unknown_names_say_what_is_valid(tmp_path):
    with pytest.raises(ValueError, match="no file matches"):
        files([tmp_path / "*.txt"])
    with pytest.raises(ValueError, match="stdlib, file, tinystories"):
        open_corpus("moon")


def test_stdlib_corpus_is_large_and_ordered():
    """The standard library is a large corpus of python in a fixed order."""
    first, second = (texts(stdlib(limit=30)) for _ in range(2))
    assert first == second and len(first) == 30
    assert sum("import" in text for text in first) > 15
    assert sum(len(text) for text in texts(stdlib())) > 5_000_000


@settings(max_examples=60)
@given(st.text(alphabet="ab \n你.", max_size=300), st.integers(1, 40), st.integers(1, 50))
def test_cutting_loses_nothing_and_keeps_passages_short(text, size, block):
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    passages = list(cut(blocks, size))
    assert "".join(passages) == text
    assert all(0 < len(passage) <= 2 * size for passage in passages)


def test_passages_are_cut_before_words_that_begin_a_line():
    text = "def f():\n    return 1\n" * 50
    passages = list(cut([text], 100))
    assert len(passages) > 5
    assert all(passage.startswith("def") for passage in passages)


def test_documents_keep_place_copies_share_it(tmp_path):
    """Many documents keep their place and copies share it."""
    documents = [f"document {i % 60}" for i in range(120)]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    places = {}
    for passage in files([path]).passages():
        assert passage.ends
        assert places.setdefault(passage.text, passage.place) == passage.place
    assert len(set(places.values())) == 60


def test_one_long_document_is_split_by_position(tmp_path):
    (tmp_path / "novel.txt").write_text("".join(f"line {i}\n" for i in range(2000)))
    passages = list(files([tmp_path / "novel.txt"]).passages())
    places = [passage.place for passage in passages]
    assert places == sorted(places) and places[0] < 0.02 and places[-1] > 0.98
    assert [passage.ends for passage in passages] == [False] * (len(passages) - 1) + [True]


def test_splits_of_few_short_documents_stay_whole(tmp_path):
    """A few short documents stay whole and share out the splits among them."""
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document number {i} "}) for i in range(20)))
    passages = list(files([path]).passages())
    assert [passage.text for passage in passages] == [f"document number {i} " for i in range(20)]
    assert [sum(passage.place < edge for passage in passages) for edge in (0.5, 0.8, 0.9)] == [10, 16, 18]
