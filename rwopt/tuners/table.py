"""The trials of a study as one JSON file, rewritten whole at each change: the entire state of the tuners that use it.

A tuner that derives everything else (centre, moments, random draws) from this table resumes exactly: JSON keeps every
bit of a float. One process writes a table; for several, use Optuna's storages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rwopt.errors import UserError
from rwopt.files import write_text
from rwopt.tuners import Candidate, Trial

FORMAT = "rwopt.trials"


@dataclass
class Row:
    """One candidate. state: open (proposed), done (scored) or failed (no finite score); note: the tuner's own."""

    number: int
    values: dict[str, float]
    origin: str
    state: str = "open"
    score: float | None = None
    calls: int = 0
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.number, dict(self.values), self.origin)


class Table:
    """Rows in the order of their numbers. Raises `UserError` if the file belongs to another `fingerprint`."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint, self.rows = path, fingerprint, list[Row]()
        self._given: set[int] = set()  # open rows that this process has proposed; others were left by a killed one
        if path.exists():
            try:
                body = json.loads(path.read_text())
                found, rows = body["fingerprint"], [Row(**row) for row in body["rows"]]
                if body["format"] != FORMAT:
                    raise KeyError(FORMAT)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is no table of trials ({error!r}): use a new run folder") from None
            if found != fingerprint:
                raise UserError(f"{path} belongs to another recipe: use a new run folder")
            self.rows = rows

    def left_over(self) -> Candidate | None:
        """A candidate that a killed process proposed and nobody scored: it is proposed again, under its number."""
        for row in self.rows:
            if row.state == "open" and row.number not in self._given:
                self._given.add(row.number)
                return row.candidate
        return None

    def add(self, values: Mapping[str, float], origin: str, calls: int = 0, **note: Any) -> Candidate:
        row = Row(len(self.rows), {k: float(v) for k, v in values.items()}, origin, calls=calls, note=note)
        self.rows.append(row)
        self._given.add(row.number)
        self._write()
        return row.candidate

    def close(self, number: int, score: float, calls: int = 0) -> None:
        """Score a candidate; a score that is not finite fails it. `calls` add to those spent on proposing it."""
        row = self.rows[number]
        if row.state != "open":
            raise UserError(f"trial {number} of {self.path.name} was scored before: observe each candidate once")
        row.state, row.score = ("done", float(score)) if math.isfinite(score) else ("failed", None)
        row.calls += calls
        self._write()

    def trials(self) -> list[Trial]:
        """The scored rows."""
        return [Trial(r.candidate, r.score, r.calls) for r in self.rows if r.score is not None]

    def _write(self) -> None:
        body = {"format": FORMAT, "fingerprint": self.fingerprint, "rows": [asdict(r) for r in self.rows]}
        write_text(self.path, json.dumps(body, indent=1) + "\n")
