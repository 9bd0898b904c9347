"""From data files to examples, one source per file."""

from collections.abc import Callable, Sequence

from umedtrain.data.example import Dropped, Drops, Example, Record, encode_all


def load_sources(
    files: Sequence[str],
    read: Callable[[str], list[Record]],
    encode: Callable[[Record], Example | Dropped],
    *,
    progress: bool = False,
) -> tuple[list[list[Example]], Drops]:
    """Read and encode every file; returns the examples of each file, and all that was dropped or truncated.

    Args:
        files: paths; `umedtrain.records` says which kinds.
        read: a reader of `umedtrain.records`.
        encode: from a record to an example, see `encode_all`.
        progress: show a progress bar per file.

    Raises:
        RecordError: for a file that cannot be read or a malformed row.
        ValueError: without files, or for a file none of whose records can be used.
    """
    check_files(files)
    sources: list[list[Example]] = []
    drops = Drops()
    for path in files:
        examples, dropped = encode_all(read(path), encode, progress=str(path) if progress else None)
        sources.append(examples)
        drops.rows.extend(dropped.rows)
    return sources, drops


def check_files(files: Sequence[str]) -> None:
    """Refuse a config without data."""
    if not files:
        raise ValueError("data.files is empty; name at least one file of records")
