"""metadata.csv and metadata.jsonl as people write them: what is safe is read, any other mistake names its line."""

import json
from pathlib import Path

import pytest
from corpus_files import opened, wav

from pipelines.corpora.metadata import read_metadata
from pipelines.errors import CorpusError


def written(folder: Path, content: str | bytes, name: str = "metadata.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path) -> list[str | None]:
    return [row.text for row in read_metadata(path)]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('file_name,text\n1.wav,a\n2.wav,"b\n3.wav,c\n', 3),
        ('file_name,text\n1.wav,"a\n2.wav,b\n3.wav,c"\n', 2),  # valid CSV of one row: the next quote closes the first
        ('file_name,text\n1.wav,a\n2.wav,b\n3.wav,"c', 4),
        ('file_name,text\n\n"1.wav,a\n2.wav,b\n', 3),
        ('file_name,text\n1.wav,"a" b\n', 2),
        ('file_name,text\n1.wav,"one "two" three"\n', 2),
        ('file_name,text\r\n1.wav,a\r\n2.wav,"b\r\n', 3),
    ],
)
def test_a_stray_quote_names_its_line_and_swallows_no_row(tmp_path, content, line):
    with pytest.raises(CorpusError, match=rf"metadata\.csv' line {line}: expected quotes around whole fields"):
        texts(written(tmp_path, content))


@pytest.mark.parametrize(
    ("row", "expected", "found"),
    [
        ("1.wav,yes, it is", 2, 3),
        ('1.wav, "yes, it is"', 2, 3),
        ("1.wav", 2, 1),
        ("1.wav;yes", 2, 1),
        ("1.wav,a,b,c,d", 2, 5),
    ],
)
def test_a_row_that_does_not_fit_the_header_names_its_line(tmp_path, row, expected, found):
    with pytest.raises(CorpusError, match=rf"line 3: expected {expected} fields \(file_name, text\), found {found} in"):
        texts(written(tmp_path, f"file_name,text\n0.wav,fine\n{row}\n"))


def test_a_line_that_swallowed_the_file_is_named_and_no_quote_blamed(tmp_path):
    with pytest.raises(CorpusError, match=r"line 2: expected at most 131,072 characters, found 140,006 in '1\.wav"):
        texts(written(tmp_path, f"file_name,text\n1.wav,{'x' * 140_000}\n"))


def test_commas_of_a_text_are_read_in_quotes_and_named_without(tmp_path):
    """The text may be in any column."""
    for header, row in (
        ("file_name,text", "1.wav,{}"),
        ("text,file_name", "{},1.wav"),
        ("file_name,text,id", "1.wav,{},7"),
    ):
        for text in ("a, b", "a,b,c", ","):
            path = written(tmp_path, f"{header}\n{row.format('fine')}\n{row.format(text)}\n")
            with pytest.raises(
                CorpusError, match=r"line 3: expected . fields .*Put a text with commas into double quotes"
            ):
                texts(path)
            quoted = f'"{text}"'
            assert texts(written(tmp_path, f"{header}\n{row.format(quoted)}\n")) == [text]


@pytest.mark.parametrize(
    "header", [" file_name , text ", '"file_name","text"', "\ufefffile_name,text", "file_name,text,,"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_headers_as_programs_write_them_are_read(tmp_path, header, end):
    rows = [f"1.wav,a{',,' if header.endswith(',,') else ''}" for _ in range(2)]
    assert texts(written(tmp_path, end.join([header, *rows, ""]))) == ["a", "a"]


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "file_name,text\n"])
def test_a_file_without_rows_has_none(tmp_path, content):
    assert texts(written(tmp_path, content)) == []


def test_what_is_not_one_metadata_file_is_refused(tmp_path):
    split = tmp_path / "c" / "train"
    (split / "metadata.csv").mkdir(parents=True)
    with pytest.raises(CorpusError, match=r"train/metadata\.csv': expected a file, found a directory"):
        opened(tmp_path / "c").scan("train")
    (split / "metadata.csv").rmdir()
    for name, content in (("csv", "file_name,text\n1.wav,a\n"), ("jsonl", '{"file_name": "2.wav", "text": "b"}\n')):
        written(split, content, f"metadata.{name}")
        if name == "csv":
            assert opened(tmp_path / "c").scan("train")["transcript"].to_pylist() == ["a"]
    with pytest.raises(CorpusError, match=r"expected metadata\.csv or metadata\.jsonl, found both\. Remove one"):
        opened(tmp_path / "c").scan("train")


def test_quotes_that_are_right_are_read(tmp_path):
    content = 'file_name,text\n1.wav,"yes, it is"\n2.wav,"he said ""no"""\n3.wav,"q"\n4.wav,a 6" nail\n5.wav,""\n'
    assert texts(written(tmp_path, content)) == ["yes, it is", 'he said "no"', "q", 'a 6" nail', ""]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_unicode_with_its_mark_is_read(tmp_path, encoding, name):
    text = "caf\u00e9 \u4f60\u597d"
    line = json.dumps({"file_name": "1.wav", "text": text}, ensure_ascii=False)
    content = f"file_name,text\r\n1.wav,{text}\r\n" if name.endswith("csv") else f"{line}\r\n"
    assert texts(written(tmp_path, content.encode(encoding), name)) == [text]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("file_name,text\n1.wav,a\n2.wav,caf\u00e9\n".encode("cp1252"), 3),
        ("file_name,text\n1.wav,\u0444\u0444\n".encode("koi8-r"), 2),
        ("file_name,text\n1.wav,\u3042\n".encode("shift_jis"), 2),
        ("file_name,text\n1.wav,a\n".encode("utf-16-le"), 1),  # without a mark
        ("file_name,text\n1.wav,a\n".encode("utf-16") + b"\n", 1),  # cut in the middle of a character
        (b"file_name,text\n1.wav,a\x00b\n", 2),
    ],
)
def test_another_encoding_names_its_line_and_what_to_do(tmp_path, content, line):
    with pytest.raises(CorpusError, match=rf"line {line}: expected .* found .*Save the file as UTF-8"):
        texts(written(tmp_path, content))


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x1c", "\\n"])
def test_what_is_inside_a_json_string_ends_no_line(tmp_path, inside):
    path = written(tmp_path, f'{{"file_name": "1.wav", "text": "a{inside}b"}}\n', "metadata.jsonl")
    if inside == "\x1c":  # JSON has no raw control characters
        with pytest.raises(CorpusError, match="line 1: expected a JSON object"):
            texts(path)
    else:
        assert texts(path) == [f"a{inside}b".replace("\\n", "\n")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "1.wav"}', "expected file_name and text"),
        ('{"text": "a"}', "expected file_name and text"),
        ('{"file_name": "", "text": "a"}', "expected file_name and text"),
        ('{"file_name": "1.wav", "sentence": "a"}', "expected file_name and text"),
        ('["1.wav", "a"]', "expected a JSON object"),
        ('{"file_name": "1.wav", "te', "expected a JSON object"),
        ('{"file_name": "1.wav", "text": ["a", "b"]}', "expected text in 'text'"),
        ('{"file_name": "1.wav", "text": "\\ud800"}', "half a character"),
        ('{"file_name": "1.wav", "text": "a\\u0000b"}', "expected text in 'text', found a NUL character"),
        ('{"file_name": "1.wav\\u0000", "text": "a"}', "expected text in 'file_name', found a NUL character"),
        ('{"file_name": "1.wav", "text": NaN}', "expected text in 'text', found 'NaN'"),
        ('{"file_name": "1.wav", "text": "a", "text": "b"}', "expected each key once, found text repeated"),
        ('{"file_name": "1.wav", "text": "a", "duration": 1, "duration": 2}', "found duration repeated"),
        ('{"file_name": "1.wav", "text": "a"}{"file_name": "2.wav", "text": "b"}', "expected a JSON object"),
        ('{"file_name": "1.wav", "text": "a", "speaker": {"id": 3}}', "expected text in 'speaker'"),
        ('{"file_name": "1.wav", "text": "a", "duration": "1.8s"}', "expected a duration in seconds.*'1.8s'"),
        ('{"file_name": "1.wav", "text": "a", "duration": "1,8"}', "expected a duration in seconds"),
        ('{"file_name": "1.wav", "text": "a", "duration": -1}', "expected a duration in seconds"),
        ('{"file_name": "1.wav", "text": "a", "duration": NaN}', "expected a duration in seconds"),
        ('{"file_name": "1.wav", "text": "a", "duration": "00:01.8"}', "expected a duration in seconds"),
        ('{"file_name": "1.wav", "text": "a", "duration": true}', "expected a duration in seconds"),
        ('{"file_name": "1.wav", "text": "a", "duration": [1.8]}', "expected a duration in seconds"),
    ],
)
def test_a_json_line_that_cannot_be_used_is_named(tmp_path, line, message):
    path = written(tmp_path, '{"file_name": "0.wav", "text": "fine"}\n' + line, "metadata.jsonl")
    with pytest.raises(CorpusError, match=rf"metadata\.jsonl' line 2: {message}|line 2: .*{message}"):
        texts(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("file_name,sentence", "expected the columns file_name and text"),
        ("path,text", "expected the columns file_name and text"),
        ("file_name;text", "expected the columns file_name and text .*separated by commas"),
        ("file_name\ttext", "expected the columns file_name and text"),
        ("file_name,text,text", "found text repeated"),
    ],
)
def test_a_header_without_the_columns_is_shown(tmp_path, header, message):
    with pytest.raises(CorpusError, match=rf"line 1: .*{message}|line 1: {message}"):
        texts(written(tmp_path, f"{header}\n1.wav,x,y\n"))


def test_numbers_are_ids_and_speakers_and_0_is_one(tmp_path):
    rows = [{"file_name": f"{i}.wav", "text": "a", "id": i, "speaker": 1272 + i, "duration": "1.5"} for i in range(3)]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)), "metadata.jsonl")
    found = list(read_metadata(path))
    assert [row.others["id"] for row in found] == ["0", "1", "2"]
    assert [row.others["speaker"] for row in found] == ["1272", "1273", "1274"]
    assert [row.duration_s for row in found] == [1.5] * 3


@pytest.mark.parametrize("kind", ["outside", "inside", "up"])
def test_an_absolute_path_is_read_wherever_it_is(tmp_path, kind):
    (tmp_path / "c" / "train").mkdir(parents=True)
    audio = {
        "outside": tmp_path / "elsewhere.wav",
        "inside": tmp_path / "c" / "train" / "a.wav",
        "up": tmp_path / "c" / "b.wav",
    }[kind]
    audio.write_bytes(wav(1.5))
    written(tmp_path / "c" / "train", f"file_name,text\n{audio},hello\n")
    corpus = opened(tmp_path / "c")
    (row,) = corpus.scan("train").to_pylist()
    assert row["duration_s"] == 1.5
    assert dict(corpus.read_audio([row["source_id"]])) == {row["source_id"]: wav(1.5)}
    assert corpus.audio_bytes("train") == len(wav(1.5))
