import gzip
import json
import os
import sys

import pytest
import zstandard

from loglinear.data.sources import read_documents


def read(*sources):
    return {document.name: document.text for document in read_documents(map(str, sources))}


def test_folder_gives_known_suffixes_in_a_fixed_order_and_whole(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub" / "a.py").write_text("a = 1\n" * 10_000)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "c.md.zst").write_bytes(zstandard.compress(b"# sea"))
    assert read(tmp_path) == {"b.txt": "bee", "c.md.zst": "# sea", "sub/a.py": "a = 1\n" * 10_000}


def test_jsonl_lines_are_documents_also_compressed(tmp_path):
    rows = [{"text": "one"}, {"text": ""}, {"text": "th\u2028ree"}]
    data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(data))
    assert read(tmp_path / "rows.jsonl.zst") == {"rows.jsonl.zst:1": "one", "rows.jsonl.zst:3": "th\u2028ree"}


def test_glob_and_single_file_of_any_suffix(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "one.c").write_text("int one;")
    (tmp_path / "two.c").write_text("int two;")
    assert read(tmp_path / "**" / "*.c") == {"x/one.c": "int one;", "two.c": "int two;"}
    assert read(tmp_path / "two.c") == {"two.c": "int two;"}


def test_name_from_a_glob_stays_when_other_files_come(tmp_path):
    (tmp_path / "x" / "deep").mkdir(parents=True)
    (tmp_path / "x" / "deep" / "one.c").write_text("int one;")
    before = read(tmp_path / "**" / "*.c")
    (tmp_path / "two.c").write_text("int two;")
    assert before.keys() <= read(tmp_path / "**" / "*.c").keys()


def test_stdlib_has_sources_and_help_topics_but_no_tests():
    documents = read("stdlib")
    assert "class JSONDecoder" in documents["json/decoder.py"]
    assert len(documents["pydoc_data/STRINGS" if "pydoc_data/STRINGS" in documents else "pydoc_data/strings"]) > 100
    assert not any("test" in name.split("/")[:-1] or name.startswith("pydoc_data/topics") for name in documents)


def test_datasets_library_by_name(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "alpha"}\n{"text": "beta"}\n')
    assert list(read(f"datasets:{tmp_path}").values()) == ["alpha", "beta"]


def test_missing_datasets_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'loglinear\[datasets\]'"):
        read("datasets:any/name")


def corrupt_zst(path):
    path.write_bytes(b"not zstd at all")


def truncated_zst(path):
    path.write_bytes(zstandard.compress(bytes(range(1, 128)) * 4000)[:-20])


def corrupt_gz(path):
    path.write_bytes(b"not gzip at all")


def truncated_gz(path):
    path.write_bytes(gzip.compress(bytes(range(1, 128)) * 4000)[:-20])


BAD = {
    "binary.txt": (lambda path: path.write_bytes(b"ab\0cd"), "is binary"),
    "latin.txt": (lambda path: path.write_bytes("caf\xe9".encode("latin-1")), "not UTF-8 text"),
    "empty.txt": (lambda path: path.write_text(""), "holds no text"),
    "broken.jsonl": (lambda path: path.write_text('{"text": "a"}\n{"text": '), "line 2 is not JSON"),
    "nested.jsonl": (lambda path: path.write_text("[" * 100_000), "line 1 is not JSON"),
    "number.jsonl": (lambda path: path.write_text("9" * 5000), "line 1 (is not JSON|has no)"),
    "fields.jsonl": (lambda path: path.write_text('{"body": "a"}'), 'line 1 has no "text" string'),
    "corrupt.txt.zst": (corrupt_zst, "not a whole zstd file"),
    "truncated.txt.zst": (truncated_zst, "not a whole zstd file"),
    "corrupt.txt.gz": (corrupt_gz, "not a whole gzip file"),
    "truncated.txt.gz": (truncated_gz, "not a whole gzip file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_clear_line_that_names_it(tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_path_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="neither a file, a folder nor a glob"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        read(tmp_path)


def test_gzip_is_read_as_zstd_is(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}'))
    assert read(tmp_path) == {"a.txt.gz": "one", "b.jsonl.gz:1": "two"}


@pytest.mark.parametrize("source", ["", "-", "https://example.org/a.txt", "s3://bucket/a.txt"])
def test_what_is_no_path_says_what_to_do(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("of the current folder")
    with pytest.raises(ValueError, match="must not be empty|standard input is not read|URLs are not read"):
        read(source)


def test_a_subfolder_that_cannot_be_read_is_named_and_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"closed cannot be read: Permission denied"):
        read(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("a")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert read(tmp_path / "data") == {"link/a.txt": "a"}
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="back is .*data again, through a link"):
        read(tmp_path / "data")


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"b.txt cannot be read: No such file"):
        read(tmp_path)


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "caf\udce9.txt").write_text("a")
    with pytest.raises(ValueError, match=r"caf\\udce9.txt' has a name that is not UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize("value", ["7", "null"])
def test_a_text_column_without_text_is_one_line(tmp_path, value):
    (tmp_path / "train.jsonl").write_text(f'{{"text": {value}, "n": 1}}\n')
    with pytest.raises(ValueError, match="row 0 must have a string as 'text', got (7|None)"):
        read(f"datasets:{tmp_path}")
