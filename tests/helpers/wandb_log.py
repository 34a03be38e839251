"""Reads the binary log of an offline W&B run (a private format: known to hold for wandb 0.31)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024  # LevelDB log: blocks of 32 KiB, a record never starts in the last 6 bytes of one
HEADER = struct.Struct("<IHB")  # checksum, length, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbLog:
    """What a run logged."""

    run: dict[str, str] = field(default_factory=dict)  # id, project, group, job_type, name
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)  # name, type, metadata


def read_wandb_log(path: Path) -> WandbLog:
    """Everything in one `run-ID.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    log = WandbLog()
    for payload in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            log.run = {
                "id": run.run_id,
                "project": run.project,
                "group": run.run_group,
                "job_type": run.job_type,
                "name": run.display_name,
            }
            log.config.update(items(run.config.update))
        elif kind == "history":
            log.history.append(items(record.history.item))
        elif kind == "summary":
            log.summary.update(items(record.summary.update))
        elif kind == "artifact":
            artifact = record.artifact
            log.artifacts.append((artifact.name, artifact.type, json.loads(artifact.metadata or "{}")))
    return log


def items(pairs: Any) -> dict[str, Any]:
    return {pair.key or ".".join(pair.nested_key): json.loads(pair.value_json) for pair in pairs}


def payloads(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind its 7-byte file header."""
    position, parts = 7, b""
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        _, length, kind = HEADER.unpack_from(data, position)
        position += HEADER.size
        parts += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
