"""The contract of a tracker, and how its values become JSON."""

from __future__ import annotations

import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Closing", "Tracker", "plain"]


class Tracker(Protocol):
    """Where a run's numbers, pictures and files go."""

    def log(self, record: Mapping[str, Any], step: int | None = None) -> None:
        """Record named numbers (nested mappings and lists are allowed); `step` counts trials or optimiser steps."""

    def image(self, name: str, path: str | os.PathLike[str]) -> None:
        """Record that the picture `name` is in the file `path`."""

    def artifact(
        self,
        path: str | os.PathLike[str],
        name: str,
        type: str = "schedule",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a result file, such as the schedule, under `name`."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final numbers of the whole run."""

    def close(self) -> None:
        """Write out everything; further calls of `close` do nothing."""


class Closing(ABC):
    """`with tracker:` closes the tracker."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Write out everything; further calls do nothing."""


def plain(value: Any) -> Any:
    """`value` as strict JSON data: arrays become lists, paths text, and numbers that are not finite become None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return plain(value.tolist())
    return str(value)
