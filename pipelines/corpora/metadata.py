"""Reading `metadata.csv` and `metadata.jsonl` strictly: a mistake names its line, and no row is lost or cut.

CSV is UTF-8 with commas, one row a line: a quoted field ends on the line where it begins. A stray quote would otherwise
join all rows up to the next quote, and no reader can tell that from a text with line breaks. Files with a byte order
mark are read as it says (UTF-8, UTF-16, UTF-32).
"""

import codecs
import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import CorpusError

FILE_NAME, TEXT, DURATION = "file_name", ("text", "transcription"), "duration"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAX_SHOWN = 60  # characters of a line in an error


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a metadata file.

    Args:
        file_name: as written; relative to the metadata file, or absolute.
        text: the transcript, unchanged; None if a JSON line has null.
        duration_s: as stated; None if the row states none.
        others: its further values by column, as text; None for a missing one.
    """

    file_name: str
    text: str | None
    duration_s: float | None
    others: dict[str, str | None]


def read_metadata(path: Path) -> Iterator[Row]:
    """Read the rows of metadata.csv or metadata.jsonl, in order.

    Raises:
        CorpusError: with the file and the line: another encoding, a row that does not fit the header, an open quote, a
            line that is not a JSON object, a row without file name or text, or a duration that is no number of seconds.
    """
    text = _decode(path)
    for number, values in _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text):
        yield _row(path, number, values)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1 if encoding.startswith("utf-8") else 1
        raise _mistake(
            path,
            line,
            f"expected {encoding.removesuffix('-sig').upper()}, found the byte 0x{data[error.start]:02x}. Save the "
            f"file as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8`",
        ) from error
    if "\0" in text:  # UTF-16 without a mark is valid UTF-8 with a NUL after each letter
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _mistake(path, line, "expected text, found a NUL character. Save the file as UTF-8")
    return text


def _lines(text: str) -> list[str]:
    """Split at line ends only; `str.splitlines` also splits at U+2028, which may be inside a text."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        if len(line) > csv.field_size_limit():
            raise _mistake(
                path,
                number,
                f"expected at most {csv.field_size_limit():,} characters, found {len(line):,} in {_shown(line)}. Check "
                "that each row has a line of its own",
            )
        try:
            (fields,) = csv.reader([line], strict=True)
        except csv.Error as error:
            raise _mistake(
                path,
                number,
                f"expected quotes around whole fields, each closed on its line, found {_shown(line)} ({error}). Close "
                'the quote, or write a quote inside a quoted field twice: ""',
            ) from error
        if not header:
            header = [name.strip() for name in fields]
            _check_header(path, number, header, line)
        elif len(fields) != len(header):
            raise _mistake(
                path,
                number,
                f"expected {len(header)} fields ({', '.join(header)}), found {len(fields)} in {_shown(line)}. Put a "
                "text with commas into double quotes",
            )
        else:
            yield number, dict(zip(header, fields, strict=True))


def _check_header(path: Path, number: int, header: list[str], line: str) -> None:
    if FILE_NAME not in header or not any(name in header for name in TEXT):
        raise _mistake(
            path,
            number,
            f"expected the columns file_name and text (or transcription), separated by commas, found {_shown(line)}. "
            "Rename the columns",
        )
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise _mistake(
            path, number, f"expected each column once, found {', '.join(repeated)} repeated. Rename or remove one"
        )


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=partial(_object, path, number))
        except (json.JSONDecodeError, RecursionError) as error:
            raise _mistake(
                path, number, f"expected a JSON object, found {_shown(line)} ({error}). Write one object a line"
            ) from error
        if not isinstance(values, dict):
            raise _mistake(path, number, f"expected a JSON object, found {_shown(line)}. Write one object a line")
        yield number, values


def _object(path: Path, number: int, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; of a repeated key, json alone would keep the last value."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise _mistake(path, number, f"expected each key once, found {', '.join(repeated)} repeated. Remove one")
    return values


def _row(path: Path, number: int, values: dict[str, Any]) -> Row:
    text_column = next((name for name in TEXT if name in values), None)
    if not values.get(FILE_NAME) or text_column is None:
        raise _mistake(
            path,
            number,
            f"expected file_name and text (or transcription) in every row, found {_shown(json.dumps(values))}. Add it",
        )
    plain = {name: _plain(path, number, name, value) for name, value in values.items() if name != DURATION}
    return Row(
        file_name=str(plain[FILE_NAME]),
        text=plain[text_column],
        duration_s=_seconds(path, number, values.get(DURATION)),
        others={name: value for name, value in plain.items() if name not in (FILE_NAME, text_column)},
    )


def _plain(path: Path, number: int, name: str, value: Any) -> str | None:
    """Convert a value to text; a number, such as a speaker 1272, as it is written."""
    is_used = name in (FILE_NAME, *TEXT, "id", "speaker", "sex", "source")
    is_text = not isinstance(value, (dict, list)) and value == value  # NaN, which json writes for a missing value
    if is_used and not is_text:
        raise _mistake(path, number, f"expected text in {name!r}, found {_shown(json.dumps(value))}. Write a string")
    if isinstance(value, str) and "\0" in value:
        raise _mistake(path, number, f"expected text in {name!r}, found a NUL character. Remove it")
    plain = value if value is None or isinstance(value, str) else json.dumps(value)
    try:
        (plain or "").encode()
    except UnicodeEncodeError as error:  # "\\ud800" in JSON
        raise _mistake(
            path, number, f"expected text in {name!r}, found half a character ({error}). Remove it"
        ) from error
    return plain


def _seconds(path: Path, number: int, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise _mistake(
            path,
            number,
            f"expected a duration in seconds, such as 1.8, found {value!r}. Correct it, or remove the column: the "
            "recordings' own lengths are then used",
        )
    return seconds or None  # 0: unknown


def _shown(line: str) -> str:
    return repr(line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}...")


def _mistake(path: Path, line: int, found: str) -> CorpusError:
    return CorpusError(f"{str(path)!r} line {line}: {found}")
