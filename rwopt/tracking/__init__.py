"""Run records: one JSON-lines file that is always written, and Weights & Biases when it is wanted.

`open_tracker` gives one object with five verbs (`log`, `image`, `artifact`, `summary`, `close`) that speaks to both.
The JSON lines in `<folder>/metrics.jsonl` are the source of truth; W&B is a mirror, so no failure of it stops a run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwopt.tracking.base import Closing, Tracker
from rwopt.tracking.jsonl import JsonlTracker
from rwopt.tracking.wandb_run import WandbSettings, WandbTracker, wandb_mode

__all__ = ["FanOut", "JsonlTracker", "Tracker", "WandbSettings", "WandbTracker", "open_tracker", "wandb_mode"]


class FanOut(Closing):
    """Says everything to every tracker; the first one is always the `JsonlTracker`."""

    def __init__(self, jsonl: JsonlTracker, *others: Tracker) -> None:
        self.jsonl = jsonl
        self.trackers: tuple[Tracker, ...] = (jsonl, *others)

    def log(self, record: Mapping[str, Any], step: int | None = None) -> None:
        for tracker in self.trackers:
            tracker.log(record, step)

    def image(self, name: str, path: str | os.PathLike[str]) -> None:
        for tracker in self.trackers:
            tracker.image(name, path)

    def artifact(
        self,
        path: str | os.PathLike[str],
        name: str,
        type: str = "schedule",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        for tracker in self.trackers:
            tracker.artifact(path, name, type, metadata)

    def summary(self, values: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.summary(values)

    def close(self) -> None:
        for tracker in reversed(self.trackers):
            tracker.close()

    def read(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, see `JsonlTracker.read`."""
        return self.jsonl.read(kind)


def open_tracker(
    folder: str | os.PathLike[str],
    wandb: str = "auto",
    project: str = "rwopt",
    name: str | None = None,
    group: str | None = None,
    config: Mapping[str, Any] | None = None,
    job_type: str = "search",
) -> FanOut:
    """Open `<folder>/metrics.jsonl` and, unless `wandb` resolves to "off", a W&B run beside it.

    Raises:
        UserError: `wandb` is no known mode, or "online" without a key.
    """
    mode = wandb_mode(wandb)  # before anything is written, so that a typing mistake leaves no folder behind
    jsonl = JsonlTracker(folder)
    if config:
        jsonl.config(config)
    if mode == "off":
        return FanOut(jsonl)
    settings = WandbSettings(mode, project, name or Path(folder).absolute().name, group, job_type, config or {})
    return FanOut(jsonl, WandbTracker(folder, settings))
