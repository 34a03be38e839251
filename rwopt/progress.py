"""One progress bar for a whole search: what it works on, the best score so far, the time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self


class Progress(Protocol):
    """What a search tells of its way. Units are evaluations (one candidate on all train cases)."""

    def start(self, total: int) -> None: ...

    def skip(self, stage: str, units: int) -> None: ...

    def advance(self, stage: str, best: float | None = None, units: int = 1) -> None: ...


class Silent:
    """No output; counts, so that tests can ask."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, total: int) -> None:
        self.total = total

    def skip(self, stage: str, units: int) -> None:
        self.done += units

    def advance(self, stage: str, best: float | None = None, units: int = 1) -> None:
        self.done += units


class Bar:
    """A rich progress bar on standard error; `with Bar() as bar`. Without a terminal: one line a stage."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._rich = Rich(
            TextColumn("[bold]{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("best {task.fields[best]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._rich.add_task("start", total=None, best="-")
        self._stage = ""
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()

    def _enter(self, stage: str) -> None:
        if stage != self._stage and not self._live:
            done = self._rich.tasks[0]
            count = f"{int(done.completed)} of {int(done.total or 0)} evaluations done"
            self._console.print(f"{stage}: {count}, {time.monotonic() - self._began:.0f} s", highlight=False)
        self._stage = stage

    def start(self, total: int) -> None:
        self._rich.update(self._task, total=total)

    def skip(self, stage: str, units: int) -> None:
        self._enter(stage)
        self._rich.update(self._task, description=stage)
        self._rich.advance(self._task, units)

    def advance(self, stage: str, best: float | None = None, units: int = 1) -> None:
        self._enter(stage)
        self._rich.update(self._task, description=stage, best="-" if best is None else f"{best:.4f}")
        self._rich.advance(self._task, units)
