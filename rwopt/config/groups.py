"""Groups: parts of recipes, chosen by name instead of copied. `recipes/<group>/<name>.yaml` may set any key.

A recipe names those that it is made of, `use: [model/sdxl, budget/card-8gb]`; its own keys come after them, and what
the command line chooses, `model=sdxl`, after these. In mappings of free names (`objective.terms`, `objective.report`,
`tuner.guard`) a null takes a name out again, or all that fit a pattern: `"judge.*": null`, and as an override
`objective.report.judge.*=null`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwopt.errors import UserError
from rwopt.files import package_folder

GROUPS = ("model", "task", "objective", "budget")

FREE = ("objective.terms.", "objective.report.", "tuner.guard.")


def groups() -> dict[str, tuple[Path, str]]:
    """Groups that ship with the package: "model/sdxl" -> (file, first comment line)."""
    out = {}
    for group in GROUPS:
        for path in sorted((package_folder("recipes") / group).glob("*.yaml")):
            out[f"{group}/{path.stem}"] = (path, heading(path))
    return out


def heading(path: Path) -> str:
    """The first line of a recipe or group, a comment that says what it is."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()


def read_group(name: str, where: str) -> dict[str, Any]:
    """What a group sets. Raises `UserError`, naming the place where it was asked for, if there is none of that name."""
    from omegaconf import OmegaConf

    known = groups()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0)
        raise UserError(f"{where}: there is no {name}: did you mean {near[0]}?")
    loaded = OmegaConf.to_container(OmegaConf.load(known[name][0]))
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items()}


def is_choice(override: str) -> bool:
    """Whether an override chooses a group: model=sdxl."""
    group, sign, name = override.partition("=")
    return bool(sign) and group in GROUPS and f"{group}/{name}" in groups()


def merged(base: Mapping[str, Any], more: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`more` over `base`, mapping by mapping."""
    out = dict(base)
    for key, value in more.items():
        path = f"{prefix}{key}."
        if value is None and path.startswith(FREE):
            out = {name: kept for name, kept in out.items() if not fnmatch.fnmatchcase(name, key)}
        elif isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merged(out[key], value, path)
        elif isinstance(value, Mapping):
            out[key] = merged({}, value, path)
        else:
            out[key] = value
    return out
