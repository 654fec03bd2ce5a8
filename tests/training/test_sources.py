import json
import sys

import pytest
import zstandard

from loglinear.training.sources import read_documents


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
