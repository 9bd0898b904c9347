"""Rows that many ranks write together into one folder, and that survive being killed.

Every rank appends finished rows to its own part file, whole and synced; a torn last line is cut away on the next start.
A row is known by its "index", so that what is there need not be made again, on whatever number of ranks.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umedtrain.distributed.world import World

Row = dict[str, Any]


class PartFiles:
    """The part files of one folder, on a file system that all ranks share.

    Args:
        folder: made if it is not there.
        identity: what the rows depend on, as JSON values; written beside them.
        name: what the folder holds, as error messages call it.
        world: the ranks that write.

    Raises:
        ValueError: on every rank, when the folder holds rows of another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], world: World, *, name: str) -> None:
        self.folder, self.name, self.world = folder, name, world
        problem = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            problem = self._claim(identity)
        problem = world.gather(problem)[0]
        if problem:
            raise ValueError(problem)

    def rows(self) -> list[Row]:
        """All whole rows, by index. Collective: nobody goes on to write before all have read.

        Raises:
            ValueError: for a line that is not JSON.
        """
        self.world.barrier()
        rows = [row for part in sorted(self.folder.glob("part-*.jsonl")) for row in self._read(part)]
        self.world.barrier()
        return sorted(rows, key=lambda row: row["index"])

    @contextmanager
    def append(self) -> Iterator[Callable[[Sequence[Row]], None]]:
        """A function that appends rows to this rank's part and returns when they are on disk."""
        part = self.folder / f"part-{self.world.rank:05d}.jsonl"
        _cut_torn_line(part)
        with part.open("a", encoding="utf-8") as file:

            def write(rows: Sequence[Row]) -> None:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())

            yield write

    def _claim(self, identity: dict[str, Any]) -> str | None:
        """Write what the folder holds, or say how it differs from what it should hold."""
        path, identity = self.folder / f"{self.name.replace(' ', '_')}.json", json.loads(json.dumps(identity))
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = ", ".join(key for key in identity if before.get(key) != identity[key])
            hint = "choose another folder or remove it"
            return changed and f"{self.folder} holds a {self.name} with other {changed}; {hint}"
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(identity), encoding="utf-8")
        temporary.replace(path)
        return None

    def _read(self, part: Path) -> Iterator[Row]:
        # What follows the last newline is a row that a killed process did not finish.
        for number, line in enumerate(part.read_bytes().split(b"\n")[:-1], start=1):
            try:
                yield json.loads(line)
            except ValueError:
                raise ValueError(f"{part}, line {number}: not valid JSON; remove the line to make it again") from None


def _cut_torn_line(part: Path) -> None:
    if part.exists():
        content = part.read_bytes()
        if not content.endswith(b"\n"):
            with part.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
