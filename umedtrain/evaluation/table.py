"""Results as text tables, Markdown and JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from umedtrain.evaluation.statistics import Comparison, Estimate, Spread

Cell = str | int | float | Estimate | Comparison | Spread | None


def format_cell(cell: Cell, *, digits: int = 3) -> str:
    """A figure as text: `0.723 [0.691, 0.753]`, `+0.031 [+0.002, +0.060] p=0.037`, `0.71 (0.70 to 0.73)`."""
    if cell is None:
        return "-"
    if isinstance(cell, Estimate):
        return f"{cell.value:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    if isinstance(cell, Comparison):
        figures = f"{cell.difference:+.{digits}f} [{cell.low:+.{digits}f}, {cell.high:+.{digits}f}]"
        return f"{figures} {'p<0.001' if cell.p_value < 0.001 else f'p={cell.p_value:.3f}'}"
    if isinstance(cell, Spread):
        deviation = "" if cell.sd is None else f", sd {cell.sd:.{digits}f}"
        return f"{cell.mean:.{digits}f} ({cell.low:.{digits}f} to {cell.high:.{digits}f}{deviation})"
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    return str(cell)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, digits: int = 3) -> str:
    """A table of aligned columns: the first to the left, figures to the right."""
    texts = _texts(columns, rows, digits)
    widths = [max(len(row[column]) for row in texts) for column in range(len(columns))]
    lines = [
        "  ".join(_align(text, width, column) for column, (text, width) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, digits: int = 3) -> str:
    """The same table for a Markdown file."""
    texts = [[text.replace("|", r"\|").replace("\n", " ") for text in row] for row in _texts(columns, rows, digits)]
    lines = ["| " + " | ".join(row) + " |" for row in texts]
    lines.insert(1, "| " + " | ".join(["---", *["---:"] * (len(columns) - 1)]) + " |")
    return "\n".join(lines) + "\n"


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON: dataclasses become objects; at any moment the file is the old one or the whole
    new one.

    Raises:
        ValueError: for a figure that is not finite, which JSON cannot hold.
    """
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def _texts(columns: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int) -> list[list[str]]:
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"row {index} has {len(row)} cells, the table {len(columns)} columns")
    return [list(columns), *([format_cell(cell, digits=digits) for cell in row] for row in rows)]


def _align(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
