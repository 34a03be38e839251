"""Cases: what a picture is made from. `data/README.md` says what a set of cases may be.

A set with a file for each split is taken as it is; any other is split here, by a hash of the cases' ids, so that no
picture and no caption is both learned from and tested on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rwopt.errors import UserError, one_of
from rwopt.tasks.pictures import (
    fit_mask,
    fit_picture,
    mask_of_runs,
    read_mask,
    read_picture,
    transparent,
    what_is_done,
)
from rwopt.tasks.sources import SPLITS, Entry, folder_of, has_split_files, read_entries

__all__ = ["SHARES", "SPLITS", "Case", "digest", "fit_cases", "fit_picture", "load_cases", "notes", "read_picture"]

SHARES = (0.6, 0.2, 0.2)
"""What train, validation and test get of a set that is not split by its owner."""


@dataclass
class Case:
    """One case. Pictures are uint8 [H, W, 3] or None; mask: bool [H, W] of the source, true where an edit may paint, or
    None. `done`: what was done to it on the way, for `notes`."""

    id: str
    caption: str
    source_caption: str = ""
    kind: str = ""
    change: dict[str, str] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    target: dict[str, str] = field(default_factory=dict)
    source: np.ndarray | None = None
    truth: np.ndarray | None = None
    mask: np.ndarray | None = None
    done: list[str] = field(default_factory=list)


def load_cases(
    place: str, split: str, task: str, limit: int | None = None, instruction: str = "",
    size: tuple[int, int] | None = None, fit: str = "crop", shares: Sequence[float] = SHARES,
) -> list[Case]:  # fmt: skip
    """The first `limit` cases of one split for one task.

    place: "avatars", "prompts", or the path of prompts, a table, pictures or PIE-Bench (`data/README.md`).
    instruction: the caption of every edit that has none of its own. size, fit: pictures are brought to (height, width)
    as they are read, by `fit_picture`; None leaves them. shares: of train, validation and test, where the place does
    not say what is what; such a split is in the order of the ids' hashes, so that the first are a fair sample.

    Raises `UserError` that names the file and line that does not fit, or the setting that asks for too many cases.
    """
    one_of(SPLITS, "split", split)
    entries, repeated = _distinct(read_entries(place, split, task, instruction))
    found = {split: entries} if has_split_files(place) else _split(place, entries, shares)
    chosen = found[split]
    if limit is not None and len(chosen) < limit:
        others = "" if len(found) == 1 else f" (in all {_counted(found)})"
        raise UserError(f"task.cases={place}: {split} has {len(chosen)} {task} cases, {limit} were asked for{others}: "
                        f"set task.{split}={len(chosen)} or give more cases")  # fmt: skip
    folder, sheets, cases = folder_of(place), dict[str, np.ndarray](), []
    if task == "editing":
        paths = {name: folder / f"{split}_{name}.png" for name in ("source", "truth")}
        sheets = {name: read_picture(path) for name, path in paths.items() if path.is_file()}
    for entry in chosen[:limit]:
        case = Case(entry.id, entry.caption, entry.source_caption, entry.kind, **entry.about)
        if entry.id in repeated:
            case.done.append("given more than once, taken once")
        for name, path in (("source", entry.source), ("truth", entry.truth)):
            picture = None
            if task == "editing" and path is not None:
                picture = read_picture(path)
            elif name in sheets and entry.cell is not None:
                picture = _cell(sheets[name], entry.cell, f"{entry.where}: cell {entry.cell}", name)
            setattr(case, name, picture)
        if task == "editing":
            case.mask = _mask(entry, case.source)
        cases.append(case if size is None else fit_cases([case], size, fit)[0])
    return cases


def fit_cases(cases: Sequence[Case], size: tuple[int, int], how: str = "crop") -> list[Case]:
    """The same cases with their pictures brought to `size` (height, width) by `fit_picture`; the given ones stay."""
    fitted = []
    for case in cases:
        for name in ("source", "truth"):
            picture: np.ndarray | None = getattr(case, name)
            if picture is not None and picture.shape[:2] != size:
                done = f"{name} picture {what_is_done(picture.shape, size, how)}"
                case = replace(case, done=[*case.done, done])
                setattr(case, name, fit_picture(picture, size, how)[0])
        if case.mask is not None and case.mask.shape != size:
            case = replace(case, mask=fit_mask(case.mask, size, how))
        fitted.append(case)
    return fitted


def notes(cases: Sequence[Case]) -> list[str]:
    """What was done to cases on the way, a line for each kind of thing with how many cases it was done to."""
    counts = Counter(done for case in {case.id: case for case in cases}.values() for done in case.done)
    number = len({case.id for case in cases})
    return [f"{count} of {number} cases: {done}" for done, count in counts.items()]


def digest(cases: Sequence[Case]) -> str:
    """SHA-256 over all that a case is made of, pictures included: whether a set has changed since it was used."""
    total = hashlib.sha256()
    for case in cases:
        texts = case.id, case.caption, case.source_caption, case.kind, case.change, case.hidden, case.target
        total.update(json.dumps(texts, sort_keys=True).encode())
        for picture in (case.source, case.truth):
            total.update(b"none" if picture is None else repr(picture.shape).encode() + picture.tobytes())
        if case.mask is not None:
            total.update(repr(case.mask.shape).encode() + np.packbits(case.mask).tobytes())
    return total.hexdigest()


def _cell(sheet: np.ndarray, cell: int, where: str, name: str) -> np.ndarray:
    """A picture [side, side, 3] of a sheet that has 16 a row, of the side that they have then, 64 or more."""
    (y, x), side = divmod(cell, 16), max(64, sheet.shape[1] // 16)
    picture = sheet[y * side : (y + 1) * side, x * side : (x + 1) * side]
    if cell < 0 or picture.shape != (side, side, 3):
        raise UserError(f"{where} lies outside the sheet of {name} pictures")
    return picture


def _mask(entry: Entry, source: np.ndarray | None) -> np.ndarray | None:
    """Of an entry with that source picture: as given, else where the picture is transparent, else None."""
    if entry.mask is None:
        return None if entry.source is None else transparent(entry.source)
    assert source is not None
    height, width = source.shape[:2]
    if isinstance(entry.mask, Path):
        mask = read_mask(entry.mask)
        if mask.shape != (height, width):
            raise UserError(f"mask {entry.mask} is {mask.shape[1]} x {mask.shape[0]}, its picture {width} x {height}: "
                            "give both the same size")  # fmt: skip
        return mask
    try:
        return mask_of_runs(entry.mask, (height, width))
    except ValueError as error:
        raise UserError(f"{entry.where}: {error}: take the file as it was published") from None


# --- splits


def _distinct(entries: Sequence[Entry]) -> tuple[list[Entry], set[str]]:
    """Entries that say the same are taken once; which ids were said again. `UserError` if an id means two things."""
    seen: dict[str, Entry] = {}
    repeated = set()
    for entry in entries:
        first = seen.setdefault(entry.id, entry)
        if first is not entry:
            if replace(first, where="") != replace(entry, where=""):
                raise UserError(f"{entry.where}: id {entry.id} is also that of {first.where}: give each its own")
            repeated.add(entry.id)
    return list(seen.values()), repeated


def _place(key: str) -> float:
    """Where an id lies in [0, 1): a function of the id and nothing else."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def _split(place: str, entries: Sequence[Entry], shares: Sequence[float]) -> dict[str, list[Entry]]:
    """Entries by split: as they say, or all by the hash of their ids.

    Entries of one identity go together, where the first of them in the set belongs: what is added below it moves none.
    """
    if len(shares) != len(SPLITS) or min(shares) <= 0 or not abs(sum(shares) - 1) < 1e-6:
        raise UserError(f"shares={list(shares)}: give three numbers above 0 that add up to 1")
    told = [entry for entry in entries if entry.split]
    if told and len(told) < len(entries):
        lacking = next(entry for entry in entries if not entry.split)
        raise UserError(f"{lacking.where}: split is empty, but other cases have one: write train, validation or test")
    found: dict[str, list[Entry]] = {name: [] for name in SPLITS}
    for group in _identities(entries):
        if told:
            other = next((entry for entry in group if entry.split != group[0].split), None)
            if other is not None:
                raise UserError(f"{other.where}: the same picture or caption as {group[0].where}, but in split "
                                f"{other.split}, not {group[0].split}: write one split for both")  # fmt: skip
            name = group[0].split
        else:
            at = _place(group[0].id)
            name = SPLITS[(at >= shares[0]) + (at >= shares[0] + shares[1])]
        found[name] += group
    if not all(found.values()):
        raise UserError(f"task.cases={place} has too few cases, {len(entries)}: {_counted(found)}; each split needs "
                        "one, so give more, or say which is which in a column split")  # fmt: skip
    return {name: sorted(part, key=lambda entry: _place(entry.id)) for name, part in found.items()}


def _counted(found: dict[str, list[Entry]]) -> str:
    return ", ".join(f"{name} {len(part)}" for name, part in found.items())


def _identities(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that share a picture (the same bytes), or a caption where there is no source picture, in their order."""
    contents = _contents({path for entry in entries for path in (entry.source, entry.truth) if path is not None})
    leader = list(range(len(entries)))  # the first entry that each is known to be one with
    marked: dict[object, int] = {}

    def first(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    for i, entry in enumerate(entries):
        marks: list[object] = [contents[path] for path in (entry.source, entry.truth) if path is not None]
        if entry.source is None:
            marks.append(("caption", " ".join(entry.caption.lower().split())))
        for mark in marks:
            one, other = sorted((first(i), first(marked.setdefault(mark, i))))
            leader[other] = one
    groups: dict[int, list[Entry]] = {}
    for i, entry in enumerate(entries):
        groups.setdefault(first(i), []).append(entry)
    return list(groups.values())


def _contents(paths: Collection[Path]) -> dict[Path, str]:
    """What tells the files' contents apart. Only files of equal length can be equal, so that few are read."""
    try:
        sizes = {path: path.stat().st_size for path in paths}
        shared = Counter(sizes.values())
        return {
            path: hashlib.sha256(path.read_bytes()).hexdigest() if shared[size] > 1 else str(size)
            for path, size in sizes.items()
        }
    except FileNotFoundError as error:
        raise UserError(f"picture {error.filename} cannot be read: there is no such file") from None
    except OSError as error:
        raise UserError(f"picture {error.filename} cannot be read ({error.strerror}): give a readable file") from None
