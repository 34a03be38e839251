"""Which variant of its weights a folder has, if there is one alone."""

from __future__ import annotations

import re
from pathlib import Path

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def only_variant(folder: Path) -> str:
    """Name of the variant that a diffusers folder must be opened with, "fp16" mostly; "" where all parts have plain
    weights (or none at all). Where a part has several variants and no plain weights, fp16 goes first."""
    wanted: set[str] = set()
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = {match["variant"] or "" for path in part.iterdir() if (match := _WEIGHTS.fullmatch(path.name))}
        if found and "" not in found:
            wanted.add("fp16" if "fp16" in found else min(found))
    return "" if not wanted else "fp16" if "fp16" in wanted else min(wanted)
