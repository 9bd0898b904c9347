"""Files of rows: reading them with line numbers, writing them whole or not at all.

.jsonl (an object per line), .json (an array of objects) and .parquet (needs the extra `data`). A row's number
is its line in a .jsonl file, counted from 1, and its place in the array or table of the other two.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


class RecordError(ValueError):
    """A data file that cannot be read or a row that is malformed.

    Attributes:
        path, line, field: where; line and field may be None.
        problem: what is wrong and what to do.
        unit: what `line` counts: "line", or "row" in .json and .parquet files.
    """

    def __init__(
        self,
        path: str | Path,
        problem: str,
        *,
        line: int | None = None,
        field: str | None = None,
        unit: str = "line",
    ) -> None:
        self.path, self.problem, self.line, self.field, self.unit = str(path), problem, line, field, unit
        where = [str(path)]
        if line is not None:
            where.append(f"{unit} {line}")
        if field is not None:
            where.append(field)
        super().__init__(f"{', '.join(where)}: {problem}")


@dataclass(frozen=True)
class Row:
    """A row's fields and where it stands. What its methods find wrong ends in a `RecordError`."""

    values: dict[str, Any]
    path: Path
    line: int
    unit: str

    def fail(self, field: str | None, problem: str) -> NoReturn:
        """Raise the error that names this row."""
        raise RecordError(self.path, problem, line=self.line, field=field, unit=self.unit)

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(key) is not None

    def optional(self, key: str, kind: type, name: str) -> Any:
        """The field's value or None; anything but `kind` is an error."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            self.fail(key, f"must be {name}, not {kind_name(value)}")
        return value

    def optional_text(self, key: str) -> str | None:
        """The field's text, or None when it is absent."""
        return self.text(key) if self.has(key) else None

    def text(self, key: str) -> str:
        """The field's text; it must be there."""
        return self.check_text(self.values.get(key), key)

    def check_text(self, value: Any, field: str) -> str:
        """The value, if it is a string of whole characters."""
        if not isinstance(value, str):
            self.fail(field, f"must be a string, not {kind_name(value)}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self.fail(field, "holds half of a surrogate pair, which is no character; write the text as UTF-8")
        return value

    def filled_text(self, key: str) -> str:
        """The field's text; it must hold more than white space."""
        return self.filled(self.text(key), key)

    def filled(self, text: str, field: str) -> str:
        """The text, if it holds more than white space."""
        if not text.strip():
            self.fail(field, "is empty; remove the row or fill it in")
        return text

    def record_id(self) -> str | None:
        """`id` or `prompt_id` as text, or None."""
        for key in ("id", "prompt_id"):
            value = self.values.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if value is not None:
                return self.text(key)
        return None

    def expected(self, wanted: str) -> NoReturn:
        """Raise the error of a row that has none of the layouts wanted."""
        found = ", ".join(sorted(key for key in self.values if self.has(key))) or "none"
        self.fail(None, f"needs {wanted}; its fields are: {found}")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order; blank lines of a .jsonl file are no rows.

    Raises:
        RecordError: for a file that is missing, empty, damaged or of an unknown kind, and for a row that is no object.
    """
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise RecordError(path, f"unknown kind of file; known are {', '.join(readers)}")
    unit = "line" if path.suffix == ".jsonl" else "row"
    number = None
    try:
        for number, values in readers[path.suffix](path):
            if not isinstance(values, dict):
                raise RecordError(path, f"must be an object, not {kind_name(values)}", line=number, unit=unit)
            yield Row(values, path, number, unit)
    except OSError as error:
        raise RecordError(path, f"cannot be read: {error.strerror or error}") from None
    if number is None:
        raise RecordError(path, "is empty; it needs at least one row")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: bytes) -> Any:
    whole = line.endswith(b"\n")
    torn = "" if whole else "; the file does not end with a newline, so its last line may be cut off"
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        problem = f"not valid JSON at column {error.colno} ({error.msg})"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON that can be read ({error})"
    raise RecordError(path, f"{problem}{torn}", line=number)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    content = path.read_bytes()
    if not content.strip():
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecordError(path, f"not UTF-8 at byte {error.start + 1} of the file", line=line) from None
    except json.JSONDecodeError as error:
        hint = "; an object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        problem = f"not valid JSON at column {error.colno} ({error.msg}){hint}"
        raise RecordError(path, problem, line=error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise RecordError(path, f"not JSON that can be read ({error})") from None
    if not isinstance(rows, list):
        raise RecordError(path, f"must hold an array of objects, not {kind_name(rows)}")
    yield from enumerate(rows, start=1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RecordError(path, "reading parquet needs pyarrow: pip install 'umedtrain[data]'") from None
    number = 0
    with path.open("rb") as file:
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            problem = f"not a parquet file that can be read ({str(error).splitlines()[0]})"
            raise RecordError(path, problem, line=number + 1 if number else None, unit="row") from None


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line; at any moment `path` is either the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    # The rename itself lasts only once its directory is on disk.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def file_fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex: what a run notes about the data that it read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecordError(path, f"cannot be read: {error.strerror}") from None


def kind_name(value: Any) -> str:
    """What to call a value of JSON in an error message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "missing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
