"""A record of a run as JSON lines that survives a kill at any moment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwopt.errors import UserError
from rwopt.tracking.base import Closing, plain

__all__ = ["JsonlTracker"]


class JsonlTracker(Closing):
    """One JSON object per line in `<folder>/metrics.jsonl`.

    A line of `log` holds the record's own keys and `step`. Keys that start with an underscore are the tracker's:
    `_kind` (log, image, artifact, summary, config) and `_time` (seconds since 1970).
    A line is a single `os.write` on an O_APPEND descriptor, so a kill tears at most the last one, and opening the
    file again mends that. One process writes to a folder at a time.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend(self.path)
        self._descriptor: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def log(self, record: Mapping[str, Any], step: int | None = None) -> None:
        self._write("log", record if step is None else {**record, "step": step})

    def image(self, name: str, path: str | os.PathLike[str]) -> None:
        self._write("image", {"name": name, "path": self._relative(path)})

    def artifact(
        self,
        path: str | os.PathLike[str],
        name: str,
        type: str = "schedule",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        record = {"name": name, "type": type, "path": self._relative(path), "metadata": metadata or {}}
        self._write("artifact", record)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._write("summary", values)

    def config(self, values: Mapping[str, Any]) -> None:
        """Record the settings of the run; a resumed run writes them again."""
        self._write("config", values)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All records in order, or those of one `_kind`.

        Raises:
            UserError: a line before the last is not a JSON object.
        """
        records = []
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None and line and number < len(lines):
                raise UserError(f"{self.path}, line {number}: not a JSON object, delete that line or the file")
            if record is not None and kind in (None, record.get("_kind")):
                records.append(record)
        return records

    def _relative(self, path: str | os.PathLike[str]) -> str:
        # Relative inside the run folder, so that a run folder can be moved.
        whole, folder = Path(path).absolute(), self.path.parent.absolute()
        return str(whole.relative_to(folder)) if whole.is_relative_to(folder) else str(whole)

    def _write(self, kind: str, record: Mapping[str, Any]) -> None:
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        whole = {**plain(record), "_kind": kind, "_time": round(time.time(), 3)}
        line = json.dumps(whole, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        written = os.write(self._descriptor, line)
        if written < len(line):  # a full disk: leave no torn line for the next record to be glued to
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(f"{self.path}: disk full, wrote {written} of {len(line)} bytes")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _mend(path: Path) -> None:
    """Cut off a torn last line; a whole last line that only lacks its newline gets one."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return
    with path.open("r+b") as file:
        if _parse(data[end:]) is None:
            file.truncate(end)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
